"""A buyer's basket, and the reservation made from it."""

import hashlib
from collections.abc import Iterable
from typing import Final

import msgspec

from reservation.domain import base64url
from reservation.domain.states import Status

__all__ = [
    "PAID_ORDERS",
    "PAYMENT_ATTEMPTS_MAX",
    "Basket",
    "Line",
    "Reservation",
    "Wish",
    "digest_of",
    "merge_lines",
]

#: Payment attempts of one order: a buyer tries a few cards, a script tries a thousand.
PAYMENT_ATTEMPTS_MAX: Final = 5
#: Among a buyer's unit counts by SKU, this field counts the buyer's paid orders (lib/paid.lua).
PAID_ORDERS: Final = ":paid"
#: 72 bits are enough: a collision affects only the buyer who made it.
_DIGEST_BYTES: Final = 9


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A quantity of one SKU, at the promised unit price."""

    sku: str
    quantity: int
    #: Minor units; 0 in a basket, whose price the sale decides.
    price: int = 0


class Wish(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A buyer's request. Most buyers of a sale send the same one, and may share an object.

    Equality is identity: a batch sends the members of a shared object once.
    """

    #: One line per SKU.
    lines: tuple[Line, ...]
    #: The total that the page showed, minor units.
    amount: int
    currency: str
    #: The title on the PG's page: the caller's own, or made from the items.
    order_name: str
    #: Whether the caller's admission is valid; the script checks whether the sale requires one.
    admitted: bool
    #: Distinguishes this body from another under the same key: 72 bits in base64url.
    digest: str


class Basket(msgspec.Struct, frozen=True, kw_only=True):
    """One buyer's basket. Its order id is derived from sale, buyer and idempotency key."""

    sale_id: str
    order_id: str
    buyer_id: str
    wish: Wish


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """A reservation as stored in Redis (or, after its sale, in SQL)."""

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
    #: Fencing token: rises with each claim; a write under an older one is refused.
    fence: int = 0
    #: The PG's id of the latest attempt.
    payment_key: str | None = None
    #: When the buyer came back from the PG with that key.
    claimed_at_ms: int | None = None
    #: Distinguishes its body from another one under the same key; empty if it was not read.
    digest: str = ""
    #: Payment key -> how its attempt ended, e.g. `declined:REJECT_CARD_COMPANY`.
    attempts: dict[str, str] = {}

    def shown_status(self, now_ms: int) -> Status:
        """The status for readers: a hold past its deadline is EXPIRED even before it is reaped."""
        if now_ms >= self.expires_at_ms and self.status in (Status.HELD, Status.PREPARED):
            return Status.EXPIRED
        return self.status


def digest_of(lines: tuple[Line, ...], amount: int, name: str | None) -> str:
    """The digest of a body; `name` is the caller's own, since a made one may follow the sale."""
    body = msgspec.json.encode([[(line.sku, line.quantity) for line in lines], amount, name])
    return base64url.encode(hashlib.sha256(body).digest()[:_DIGEST_BYTES])


def merge_lines(lines: Iterable[tuple[str, int]]) -> tuple[Line, ...]:
    """One line per SKU, in the order of first mention, quantities summed."""
    quantities: dict[str, int] = {}
    for sku, quantity in lines:
        quantities[sku] = quantities.get(sku, 0) + quantity
    return tuple([Line(sku=sku, quantity=quantity) for sku, quantity in quantities.items()])
