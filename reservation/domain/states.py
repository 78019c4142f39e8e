"""The states of a reservation and the edges between them.

Letters name the edges in docs/architecture.md; the Lua scripts are the only code that walks them.
"""

from enum import StrEnum

__all__ = [
    "ENDED",
    "HOLDING",
    "LIVE",
    "PAID",
    "TRANSITIONS",
    "UNPAID",
    "HoldPolicy",
    "SaleStatus",
    "Status",
]


class Status(StrEnum):
    """Where a reservation stands."""

    #: Signed, no stock taken: the sale's policy takes it when the buyer comes back.
    PREPARED = "PREPARED"
    #: Stock is held until the deadline.
    HELD = "HELD"
    #: Stock is held without a deadline: money may be moving.
    CONFIRMING = "CONFIRMING"
    #: Stock is held until the virtual account's due date.
    AWAITING_DEPOSIT = "AWAITING_DEPOSIT"
    #: Sold.
    CONFIRMED = "CONFIRMED"
    #: Given back by someone.
    RELEASED = "RELEASED"
    #: Given back by the clock.
    EXPIRED = "EXPIRED"
    #: Paid, and the money went back.
    REFUNDED = "REFUNDED"


class HoldPolicy(StrEnum):
    """When a sale takes its stock."""

    #: At prepare, with a deadline.
    PREPARE = "prepare"
    #: When the buyer comes back from the payment page, right before the money is asked for.
    SUCCESS = "success"


class SaleStatus(StrEnum):
    """What the shop sees of a sale; `PAUSED` and `CLOSED` are switched by an operator as well."""

    SCHEDULED = "scheduled"
    OPEN = "open"
    PAUSED = "paused"
    SOLD_OUT = "sold_out"
    CLOSED = "closed"


#: States in which a reservation keeps units from others (the `held` counter).
HOLDING = frozenset({Status.HELD, Status.CONFIRMING, Status.AWAITING_DEPOSIT})

#: States from which nothing goes on without the buyer or an operator.
ENDED = frozenset({Status.RELEASED, Status.EXPIRED, Status.REFUNDED})

#: States that count as "the buyer has something going on".
LIVE = frozenset({Status.PREPARED, Status.HELD, Status.CONFIRMING, Status.AWAITING_DEPOSIT})

#: States of a paid order, whatever became of the money.
PAID = frozenset({Status.CONFIRMED, Status.REFUNDED})

#: States of an order that keeps nothing from others and was not paid: a buyer may leave so many.
UNPAID = frozenset({Status.PREPARED, Status.RELEASED, Status.EXPIRED})

#: Every edge that a reservation may take. RELEASED and EXPIRED lead on only through a buyer who
#: came back from the PG after all (the same basket is taken again in the same step) or through
#: money that came and cannot be served.
TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.PREPARED: frozenset({Status.CONFIRMING, Status.RELEASED, Status.EXPIRED}),
    Status.HELD: frozenset({Status.CONFIRMING, Status.RELEASED, Status.EXPIRED}),
    Status.CONFIRMING: frozenset(
        {
            Status.CONFIRMED,
            Status.AWAITING_DEPOSIT,
            Status.RELEASED,
            Status.HELD,
            Status.PREPARED,
            Status.EXPIRED,
            Status.REFUNDED,
        }
    ),
    Status.AWAITING_DEPOSIT: frozenset(
        {Status.CONFIRMED, Status.RELEASED, Status.EXPIRED, Status.REFUNDED}
    ),
    Status.CONFIRMED: frozenset({Status.REFUNDED, Status.AWAITING_DEPOSIT}),
    Status.RELEASED: frozenset({Status.CONFIRMING, Status.REFUNDED}),
    Status.EXPIRED: frozenset({Status.CONFIRMING, Status.REFUNDED}),
    Status.REFUNDED: frozenset(),
}
