"""Decoded event data, and the transitions that each event allows for an order."""

from typing import Final, Literal

import msgspec

from reservation.domain.states import HOLDING, HoldPolicy, SaleStatus, Status

__all__ = [
    "AVAILABLE",
    "BALANCE",
    "EDGES",
    "ENDS",
    "MOVED",
    "PREPARED",
    "RESTOCKED",
    "SALE_PUT",
    "SWITCHED",
    "TRANSFERRED",
    "Basket",
    "Edge",
    "Moved",
    "Prepared",
    "StatusName",
    "counter_of",
]

AVAILABLE: Final = "available"
_HELD: Final = "held"
_SOLD: Final = "sold"
#: Final statuses: an order reaches one, and leaves it by an edge only.
ENDS: Final = frozenset({"CONFIRMED", "RELEASED", "EXPIRED", "REFUNDED"})

#: The sign of each kind of entry in the PG's ledger, in the balance that the shop was paid.
BALANCE: Final = {"charge": 1, "deposit": 1, "deposit_reversed": -1, "cancel": -1}

#: As plain text: an enum's hash is several times slower, and there are millions of these.
StatusName = Literal[
    "PREPARED",
    "HELD",
    "CONFIRMING",
    "AWAITING_DEPOSIT",
    "CONFIRMED",
    "RELEASED",
    "EXPIRED",
    "REFUNDED",
]


def counter_of(status: str) -> str:
    """The counter of an order's units in this status."""
    if status in HOLDING:
        return _HELD
    return _SOLD if status == Status.CONFIRMED else AVAILABLE


#: Where each event may take an order from, and to.
_WAYS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "claimed": dict.fromkeys(("HELD", "PREPARED", "RELEASED", "EXPIRED"), ("CONFIRMING",)),
    "taken_over": {"CONFIRMING": ("CONFIRMING",)},
    "confirmed": dict.fromkeys(("CONFIRMING", "AWAITING_DEPOSIT"), ("CONFIRMED",)),
    "awaiting_deposit": dict.fromkeys(("CONFIRMING", "CONFIRMED"), ("AWAITING_DEPOSIT",)),
    "declined": dict.fromkeys(("CONFIRMING", "AWAITING_DEPOSIT"), ("RELEASED",)),
    "voided": {"CONFIRMING": ("HELD", "PREPARED", "EXPIRED")},
    "released": dict.fromkeys(("HELD", "PREPARED"), ("RELEASED",)),
    "expired": dict.fromkeys(("HELD", "PREPARED", "AWAITING_DEPOSIT", "CONFIRMING"), ("EXPIRED",)),
    "refunded": dict.fromkeys(
        ("CONFIRMING", "AWAITING_DEPOSIT", "RELEASED", "EXPIRED", "CONFIRMED"), ("REFUNDED",)
    ),
}


class Edge(msgspec.Struct, frozen=True):
    """One transition of an order by an event."""

    #: The counters that its units leave and enter.
    origin: str
    target: str
    #: Whether the order's fence goes up: by 1, or by more over claims that Redis lost.
    step: int
    #: Whether it depends on the clock.
    timed: bool


def _edge(event: str, origin: str, to: str) -> Edge:
    expires = event == "expired" and origin in ("HELD", "PREPARED")
    again = event == "claimed" and origin in ("RELEASED", "EXPIRED")
    return Edge(
        counter_of(origin),
        counter_of(to),
        step=int(event in ("claimed", "taken_over")),
        timed=expires or again,
    )


#: Each edge by (event, from, to).
EDGES: Final = {
    (event, origin, to): _edge(event, origin, to)
    for event, ways in _WAYS.items()
    for origin, targets in ways.items()
    for to in targets
}


#: SKU, quantity and price of each line.
Basket = tuple[tuple[str, int, int], ...]


class Prepared(msgspec.Struct, rename="camel", gc=False):
    """A `prepared` event."""

    to: StatusName
    buyer: str
    items: Basket
    amount: int
    expires_at: int
    origin: str = msgspec.field(name="from", default="")
    digest: str = ""
    #: Restored by a rebuild from its intent, at the prices and in the time of the lost one.
    remade: bool = False


class Moved(msgspec.Struct, rename="camel", gc=False):
    """An event that takes an order along an edge."""

    to: StatusName
    origin: StatusName = msgspec.field(name="from")
    fence: int | None = None
    payment_key: str = ""
    cause: str = ""
    restock: bool = True
    #: The sale's version, where this moved a total; 0 where the event has none.
    version: int = 0


class ItemRow(msgspec.Struct):
    """One item of a sale as it is put."""

    sku: str
    price: int
    total: int
    limit: int


class SalePut(msgspec.Struct, rename="camel"):
    """A `sale_put` event."""

    items: list[ItemRow]
    opens_at: int
    closes_at: int
    hold_policy: HoldPolicy
    version: int = 0


class Switched(msgspec.Struct):
    """A `sale_switched` event."""

    status: SaleStatus


class Restocked(msgspec.Struct):
    """A `restocked` event."""

    sku: str
    delta: int
    total: int
    version: int = 0


class Transferred(msgspec.Struct, rename="camel"):
    """A `lent` or `borrowed` event of a partition."""

    peer: int
    sku: str
    number: int
    units: int
    up_to: int
    total: int
    version: int


PREPARED: Final = msgspec.json.Decoder(Prepared)
MOVED: Final = msgspec.json.Decoder(Moved)
SALE_PUT: Final = msgspec.json.Decoder(SalePut)
SWITCHED: Final = msgspec.json.Decoder(Switched)
RESTOCKED: Final = msgspec.json.Decoder(Restocked)
TRANSFERRED: Final = msgspec.json.Decoder(Transferred)
