"""Call of prepare.lua, for one basket or many, and its reply."""

import base64
import hashlib
import hmac
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from benchmarks.support.sale import PRICE, SALE_ID, SKU
from reservation.adapters.redis.keys import Keys, SaleKeys
from reservation.adapters.redis.marks import NO_MARK

__all__ = ["BURST", "INTERVAL_MS", "Basket", "Held", "basket_of", "call_of", "held_of"]

#: The service's default rate of a buyer, `20/s`: the script keeps it for every contender.
INTERVAL_MS: Final = 50
BURST: Final = 20
#: No lasting rate and no limit of unpaid orders: each buyer of a benchmark holds many times.
NO_LIMITS: Final = (0, 0, 0)
#: Turns are kept, and no buyer has waited for holds that ran out.
TURNS: Final = (1, "")
#: As the service's: a call that reaches the script later does nothing.
NOT_AFTER_MS: Final = 2_000

_KEYS: Final[SaleKeys] = Keys().of(SALE_ID)
_HEAD_KEYS: Final = [
    _KEYS.sale,
    _KEYS.deadlines,
    _KEYS.outbox,
    _KEYS.confirming,
    _KEYS.deposits,
    _KEYS.stock(SKU),
]


class Basket(msgspec.Struct, frozen=True):
    """One unit, of one buyer."""

    order_id: str
    buyer: str
    digest: str
    amount: int = PRICE
    quantity: int = 1

    @property
    def wish(self) -> tuple[str, int, int]:
        """The wish of this basket."""
        return self.digest, self.amount, self.quantity


class Held(msgspec.Struct, frozen=True):
    """The reply of prepare.lua for the first basket of a call that it held."""

    expires_at: int
    created_at: int
    items: str


def basket_of(secret: bytes, buyer: str, idempotency_key: str, body: bytes) -> Basket:
    """The basket of one request: the same key names the same order."""
    mac = hmac.digest(secret, f"{buyer}:{idempotency_key}".encode(), "sha256")
    tail = base64.urlsafe_b64encode(mac[:18]).decode()
    return Basket(f"{SALE_ID}-{tail}", buyer, _digest(body))


def _digest(body: bytes) -> str:
    """A digest of the same length as the service's."""
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()[:9]).decode()


def call_of(
    epoch: str, baskets: Sequence[Basket], *, not_after_ms: int = NOT_AFTER_MS
) -> tuple[list[str], list[str | int]]:
    """The keys and arguments of one call; scripts/lua/prepare.lua names each of them."""
    now_ms = time.time_ns() // 1_000_000
    wishes = list(dict.fromkeys([basket.wish for basket in baskets]))
    keys = list(_HEAD_KEYS)
    for basket in baskets:
        keys += _KEYS.of_basket(basket.order_id, basket.buyer)
    asked = " ".join([str(wishes.index(basket.wish) + 1) for basket in baskets])
    args: list[str | int] = [
        now_ms + not_after_ms, epoch, *NO_MARK, now_ms, INTERVAL_MS, BURST, *NO_LIMITS,
        1, len(wishes), len(baskets), asked, *TURNS, SKU,
    ]  # fmt: skip
    for digest, amount, quantity in wishes:
        args += (digest, "Hoodie", '"Hoodie"', amount, 0, f"1 {quantity}")
    return keys, args


def held_of(reply: list[Any]) -> Held | str:
    """The reply for the first basket of a call; the word where it was not held."""
    (word, *facts), *replies = reply
    if replies and not isinstance(replies[0], int):
        return str(replies[0][0])
    return Held(int(facts[0]), int(facts[1]), facts[3]) if replies else str(word)
