"""The call of prepare.lua, for one basket or many."""

import base64
import hashlib
import hmac
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from benchmarks.sale import PRICE, SALE_ID, SKU
from reservation.redis.keys import Keys, SaleKeys

__all__ = ["BURST", "INTERVAL_MS", "Basket", "basket_of", "call_of"]

#: The service's default rate of a buyer, `20/s`: the script keeps it for every contender.
INTERVAL_MS: Final = 50
BURST: Final = 20
#: As the service's: a call that reaches the script later does nothing.
NOT_AFTER_MS: Final = 2_000

_KEYS: Final[SaleKeys] = Keys().of(SALE_ID)
_HEAD_KEYS: Final = [_KEYS.sale, _KEYS.deadlines, _KEYS.outbox, _KEYS.stock(SKU)]


class Basket(msgspec.Struct, frozen=True):
    """One piece, of one buyer."""

    order_id: str
    buyer: str
    digest: str
    amount: int = PRICE
    quantity: int = 1


def basket_of(secret: bytes, buyer: str, idempotency_key: str, body: bytes) -> Basket:
    """The basket of one request: the same key names the same order."""
    mac = hmac.digest(secret, f"{buyer}:{idempotency_key}".encode(), "sha256")
    tail = base64.urlsafe_b64encode(mac[:18]).decode()
    return Basket(f"{SALE_ID}-{tail}", buyer, hashlib.sha256(body).hexdigest()[:32])


def call_of(
    epoch: str, baskets: Sequence[Basket], *, not_after_ms: int = NOT_AFTER_MS
) -> tuple[list[str], list[str | int]]:
    """The keys and arguments of one call; scripts/lua/prepare.lua names each of them."""
    now_ms = time.time_ns() // 1_000_000
    keys = list(_HEAD_KEYS)
    args: list[str | int] = [
        now_ms + not_after_ms, epoch, now_ms, INTERVAL_MS, BURST, 1, len(baskets), SKU,
    ]  # fmt: skip
    for basket in baskets:
        buyer = basket.buyer
        keys += (
            _KEYS.order(basket.order_id),
            _KEYS.buyer(buyer),
            _KEYS.buyer_orders(buyer),
            _KEYS.rate(buyer),
        )
        args += (
            basket.order_id,
            buyer,
            "Hoodie",
            basket.digest,
            basket.amount,
            0,
            f'"buyer":"{buyer}","name":"Hoodie"',
            f"1 {basket.quantity}",
        )
    return keys, args
