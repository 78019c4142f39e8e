"""The states of a reservation and the transitions between them.

Letters name the transitions in docs/explanation/architecture.md; only the Lua scripts perform them.
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
    """The state of a reservation."""

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
    #: Released by the buyer or by the payment's outcome.
    RELEASED = "RELEASED"
    #: Released at its deadline or due date.
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
    """The status of a sale in the shop; an operator also switches to `PAUSED` and `CLOSED`."""

    SCHEDULED = "scheduled"
    OPEN = "open"
    PAUSED = "paused"
    SOLD_OUT = "sold_out"
    CLOSED = "closed"


#: States in which a reservation keeps units from others (the `held` counter).
HOLDING = frozenset({Status.HELD, Status.CONFIRMING, Status.AWAITING_DEPOSIT})

#: Final states: only the buyer or an operator can continue from them.
ENDED = frozenset({Status.RELEASED, Status.EXPIRED, Status.REFUNDED})

#: States in which the buyer's reservation is still in progress.
LIVE = frozenset({Status.PREPARED, Status.HELD, Status.CONFIRMING, Status.AWAITING_DEPOSIT})

#: States of a paid order, refunded or not.
PAID = frozenset({Status.CONFIRMED, Status.REFUNDED})

#: States of an unpaid order without a hold: the number of these is limited per buyer.
UNPAID = frozenset({Status.PREPARED, Status.RELEASED, Status.EXPIRED})

#: Every transition of a reservation. RELEASED and EXPIRED lead on only through a buyer who came
#: back from the PG after all (the same basket is taken again in the same step) or through money
#: that arrived and cannot be served.
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
