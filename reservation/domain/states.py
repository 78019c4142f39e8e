"""The states of a reservation and the transitions between them; only the Lua scripts perform one.

The diagram in docs/explanation/architecture.md is generated from these tables (`make reference`).
"""

from enum import StrEnum
from typing import NamedTuple

__all__ = [
    "EDGES",
    "ENDED",
    "HOLDING",
    "LIVE",
    "PAID",
    "TRANSITIONS",
    "TRANSITION_RULES",
    "UNPAID",
    "Edge",
    "HoldPolicy",
    "SaleStatus",
    "Status",
    "TransitionRule",
    "Visibility",
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
    #: When the buyer comes back from the payment page, right before the payment is requested.
    SUCCESS = "success"


class SaleStatus(StrEnum):
    """The status of a sale in the shop; an operator also switches to `PAUSED` and `CLOSED`."""

    SCHEDULED = "scheduled"
    OPEN = "open"
    PAUSED = "paused"
    SOLD_OUT = "sold_out"
    CLOSED = "closed"


class Visibility(StrEnum):
    """Who sees a sale."""

    #: Operators alone; nothing can be prepared.
    DRAFT = "draft"
    #: Everybody who has its address; it is in no list.
    UNLISTED = "unlisted"
    PUBLIC = "public"


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


class TransitionRule(NamedTuple):
    """The script that performs a transition, and the condition for it."""

    script: str
    condition: str


class Edge(NamedTuple):
    """A transition of a reservation: an edge of the state diagram."""

    #: None at the creation of a reservation.
    origin: Status | None
    to: Status
    #: The letter of its rule.
    rule: str
    #: The label in the diagram.
    trigger: str


#: The rules of the transitions, by letter.
TRANSITION_RULES: dict[str, TransitionRule] = {
    "a": TransitionRule("prepare", "price, limit, window and stock are valid"),
    "b": TransitionRule(
        "claim", "the buyer returned from the PG; from here no deadline ends the hold"
    ),
    "c": TransitionRule("release", "the buyer leaves, or the PG's page failed"),
    "d": TransitionRule("expire", "the deadline has passed on Redis' clock and on the caller's"),
    "e": TransitionRule("finish", "the PG declined, or the payment ended without money"),
    "f": TransitionRule(
        "finish",
        "no money was requested: the attempt is void and the old deadline applies again",
    ),
    "g": TransitionRule(
        "claim", "a buyer returns late; the same basket is held again if the stock allows"
    ),
    "h": TransitionRule(
        "finish", "the payment is a virtual account, and the sale accepts virtual accounts"
    ),
    "i": TransitionRule(
        "finish", "the payment is done, the deposit arrived, or the account lapsed"
    ),
    "j": TransitionRule("refund", "an operator refunds the order"),
    "k": TransitionRule("finish", "money that cannot be served was cancelled at the PG"),
    "l": TransitionRule("finish", "the bank reversed a deposit"),
}

#: Every transition of a reservation. RELEASED and EXPIRED lead on only through a buyer who came
#: back from the PG after all (the same basket is taken again in the same step) or through money
#: that arrived and cannot be served.
EDGES: tuple[Edge, ...] = (
    Edge(None, Status.HELD, "a", 'prepare, policy "prepare"'),
    Edge(None, Status.PREPARED, "a", 'prepare, policy "success"'),
    Edge(Status.HELD, Status.CONFIRMING, "b", "claim"),
    Edge(Status.PREPARED, Status.CONFIRMING, "b", "claim takes the stock"),
    Edge(Status.HELD, Status.RELEASED, "c", "the buyer leaves"),
    Edge(Status.PREPARED, Status.RELEASED, "c", "the buyer leaves"),
    Edge(Status.HELD, Status.EXPIRED, "d", "the deadline passes"),
    Edge(Status.PREPARED, Status.EXPIRED, "d", "the deadline passes"),
    Edge(Status.CONFIRMING, Status.HELD, "f", "void: no money was requested"),
    Edge(Status.CONFIRMING, Status.PREPARED, "f", 'void, policy "success"'),
    Edge(Status.CONFIRMING, Status.CONFIRMED, "i", "paid"),
    Edge(Status.CONFIRMING, Status.AWAITING_DEPOSIT, "h", "virtual account issued"),
    Edge(Status.CONFIRMING, Status.RELEASED, "e", "declined"),
    Edge(Status.CONFIRMING, Status.EXPIRED, "e", "ended unpaid, or void after the deadline"),
    Edge(Status.CONFIRMING, Status.REFUNDED, "k", "the charge cannot be served"),
    Edge(Status.AWAITING_DEPOSIT, Status.CONFIRMED, "i", "the deposit arrives"),
    Edge(Status.AWAITING_DEPOSIT, Status.RELEASED, "e", "the account is cancelled"),
    Edge(Status.AWAITING_DEPOSIT, Status.EXPIRED, "i", "the account lapses"),
    Edge(Status.AWAITING_DEPOSIT, Status.REFUNDED, "k", "the deposit cannot be served"),
    Edge(Status.RELEASED, Status.CONFIRMING, "g", "re-take, if the stock allows"),
    Edge(Status.EXPIRED, Status.CONFIRMING, "g", "re-take, if the stock allows"),
    Edge(Status.RELEASED, Status.REFUNDED, "k", "the money arrived too late"),
    Edge(Status.EXPIRED, Status.REFUNDED, "k", "the money arrived too late"),
    Edge(Status.CONFIRMED, Status.REFUNDED, "j", "an operator refunds"),
    Edge(Status.CONFIRMED, Status.AWAITING_DEPOSIT, "l", "the bank reverses the deposit"),
)

#: The states that may follow each state.
TRANSITIONS: dict[Status, frozenset[Status]] = {
    status: frozenset(edge.to for edge in EDGES if edge.origin is status) for status in Status
}
