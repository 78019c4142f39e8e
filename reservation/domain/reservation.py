"""A buyer's basket, and the reservation that comes of it."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

import msgspec

from reservation.domain.states import Status

__all__ = ["PAYMENT_ATTEMPTS_MAX", "Basket", "Line", "Reservation", "merge_lines"]

#: Payment attempts that one order may make: a buyer tries a few cards, a script tries a thousand.
PAYMENT_ATTEMPTS_MAX: Final = 5
#: Bodies whose lines and digest are kept: in a flash sale most are alike.
_BODIES_MAX: Final = 1_024


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """So many units of one SKU, at the price that was promised for each."""

    sku: str
    quantity: int
    #: Minor units; 0 in a basket, whose price the sale decides.
    price: int = 0


class Basket(msgspec.Struct, frozen=True, kw_only=True):
    """What a buyer wants to hold. Its order id is derived from sale, buyer and idempotency key."""

    sale_id: str
    order_id: str
    buyer_id: str
    #: One line per SKU.
    lines: tuple[Line, ...]
    amount: int
    currency: str
    #: What the PG's page shows: the caller's own, or made from the items.
    order_name: str
    #: Whether the caller gave the name: a made one may change between two sends of one body.
    name_given: bool
    #: Whether the caller showed a good admission; the script knows whether the sale asks for one.
    admitted: bool

    def digest(self) -> str:
        """Tells this body from another under the same key: 128 bits in hex."""
        return _digest(self.lines, self.amount, self.order_name if self.name_given else None)


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A reservation as it stands in Redis (or, after its sale, in SQL)."""

    order_id: str
    sale_id: str
    buyer_id: str
    status: Status
    lines: tuple[Line, ...]
    amount: int
    currency: str
    order_name: str
    created_at_ms: int
    updated_at_ms: int
    expires_at_ms: int
    seq: int
    #: Rises with each claim; who writes under an older one is refused.
    fence: int = 0
    #: The PG's id of the latest attempt.
    payment_key: str | None = None
    #: When the buyer came back from the PG with that key.
    claimed_at_ms: int | None = None
    #: Payment key -> how its attempt ended, e.g. `declined:REJECT_CARD_COMPANY`.
    attempts: dict[str, str] = {}

    def shown_status(self, now_ms: int) -> Status:
        """What a reader is told: a hold past its deadline is EXPIRED even before it is reaped."""
        if now_ms >= self.expires_at_ms and self.status in (Status.HELD, Status.PREPARED):
            return Status.EXPIRED
        return self.status


@lru_cache(maxsize=_BODIES_MAX)
def _digest(lines: tuple[Line, ...], amount: int, name: str | None) -> str:
    body = msgspec.json.encode([[(line.sku, line.quantity) for line in lines], amount, name])
    return hashlib.sha256(body).hexdigest()[:32]


def merge_lines(lines: Iterable[tuple[str, int]]) -> tuple[Line, ...]:
    """One line per SKU, in the order of first mention, quantities summed."""
    return _merged(tuple(lines))


@lru_cache(maxsize=_BODIES_MAX)
def _merged(lines: tuple[tuple[str, int], ...]) -> tuple[Line, ...]:
    quantities: dict[str, int] = {}
    for sku, quantity in lines:
        quantities[sku] = quantities.get(sku, 0) + quantity
    return tuple([Line(sku=sku, quantity=quantity) for sku, quantity in quantities.items()])
