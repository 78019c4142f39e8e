"""Payment outcomes and causes: the codes shared by events, order hashes and responses.

Events and hashes store codes. The sentence for people is made from the code (`Reason.sentence`), so
it may be reworded at any time: no code parses it. Events of earlier versions carry sentences or the
provider's code instead; `Reason.read` maps them to the corresponding codes.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

import msgspec

from reservation.domain.states import Status

__all__ = [
    "FORGOTTEN",
    "SENTENCES",
    "UNPROVEN",
    "Attempt",
    "Cause",
    "ClaimLost",
    "Claimed",
    "Finished",
    "LeaseElsewhere",
    "Outcome",
    "PaymentOutcome",
    "Present",
    "Reason",
]


class PaymentOutcome(StrEnum):
    """How a payment attempt ended; also the name of its event."""

    CONFIRMED = "confirmed"
    AWAITING_DEPOSIT = "awaiting_deposit"
    DECLINED = "declined"
    VOIDED = "voided"
    EXPIRED = "expired"
    REFUNDED = "refunded"


class Cause(StrEnum):
    """Why a reservation left its state. The values are stored: add members, never change one."""

    #: The buyer gave the hold back.
    BUYER = "buyer"
    #: The provider's payment page failed or was cancelled; `provider_code` has the reason.
    PAYMENT_PAGE = "payment_page"
    #: The hold's deadline passed.
    DEADLINE = "deadline"
    #: The provider refused the confirm, with its own code.
    PROVIDER_DECLINED = "provider_declined"
    #: The provider shows the payment as ABORTED.
    PAYMENT_ABORTED = "payment_aborted"
    #: The provider shows the payment as EXPIRED.
    PAYMENT_EXPIRED = "payment_expired"
    #: The provider's time between authentication and confirm had passed.
    SESSION_EXPIRED = "session_expired"
    #: An unpaid payment was cancelled at the provider.
    PAYMENT_CANCELLED = "payment_cancelled"
    #: The buyer chose a virtual account in a sale that takes none.
    ACCOUNT_NOT_ACCEPTED = "account_not_accepted"
    #: No deposit arrived in the virtual account before its due date.
    NO_DEPOSIT = "no_deposit"
    #: The provider never approved the payment within its window.
    NEVER_APPROVED = "never_approved"
    #: The provider has neither the payment key nor any payment of the order.
    PAYMENT_NOT_FOUND = "payment_not_found"
    #: The payment key belongs to another order.
    KEY_OF_ANOTHER_ORDER = "key_of_another_order"
    #: The intent could not be written to SQL; the same key may be claimed again.
    INTENT_NOT_WRITTEN = "intent_not_written"
    #: The provider's amount or currency is not the order's.
    AMOUNT_MISMATCH = "amount_mismatch"
    #: A paid payment was cancelled at the provider.
    CANCELLED_AT_PROVIDER = "cancelled_at_provider"
    #: Money arrived after the reservation had ended.
    PAID_AFTER_END = "paid_after_end"
    #: The payment key is another order's at the provider: it can never pay for this one.
    PAYMENT_OF_ANOTHER_ORDER = "payment_of_another_order"
    #: The provider has another payment of this order id and takes no second one.
    ORDER_ID_USED = "order_id_used"
    #: Requested by an operator.
    OPERATOR = "operator"


#: One sentence for people per cause.
SENTENCES: Final[Mapping[str, str]] = MappingProxyType(
    {
        Cause.BUYER: "The buyer released the hold.",
        Cause.PAYMENT_PAGE: "The payment page reported a failure.",
        Cause.DEADLINE: "The hold's deadline passed.",
        Cause.PROVIDER_DECLINED: "The payment provider declined the payment.",
        Cause.PAYMENT_ABORTED: "The payment provider aborted the payment.",
        Cause.PAYMENT_EXPIRED: "The payment expired at the payment provider.",
        Cause.SESSION_EXPIRED: "The payment session had expired before the confirm.",
        Cause.PAYMENT_CANCELLED: "The unpaid payment was cancelled at the payment provider.",
        Cause.ACCOUNT_NOT_ACCEPTED: "The sale does not accept virtual accounts.",
        Cause.NO_DEPOSIT: "No deposit arrived before the virtual account's due date.",
        Cause.NEVER_APPROVED: "The payment provider never approved the payment.",
        Cause.PAYMENT_NOT_FOUND: "The payment provider has no such payment.",
        Cause.KEY_OF_ANOTHER_ORDER: "The payment key belongs to another order.",
        Cause.INTENT_NOT_WRITTEN: "The payment intent could not be written to SQL.",
        Cause.AMOUNT_MISMATCH: "The payment's amount or currency is not the order's.",
        Cause.CANCELLED_AT_PROVIDER: "The payment was cancelled at the payment provider.",
        Cause.PAID_AFTER_END: "Money arrived after the reservation had ended.",
        Cause.PAYMENT_OF_ANOTHER_ORDER: "The payment is another order's at the payment provider.",
        Cause.ORDER_ID_USED: "The payment provider takes no second payment of this order id.",
        Cause.OPERATOR: "An operator requested it.",
    }
)

_CODES: Final[frozenset[str]] = frozenset(Cause)

#: After these the attempt counts as never made: the same payment key may be claimed again.
FORGOTTEN: Final = frozenset({Cause.INTENT_NOT_WRITTEN})

#: Causes as earlier versions wrote them to events and to the hashes' attempts. The texts are data
#: in SQL: they never change.
_ALIASES: Final[Mapping[str, Cause]] = MappingProxyType(
    {
        "no deposit came": Cause.NO_DEPOSIT,
        "deposit": Cause.NO_DEPOSIT,
        "the PG never approved the payment": Cause.NEVER_APPROVED,
        "never approved": Cause.NEVER_APPROVED,
        "EXPIRED": Cause.PAYMENT_EXPIRED,
        "NOT_FOUND_PAYMENT_SESSION": Cause.SESSION_EXPIRED,
        "CANCELED": Cause.PAYMENT_CANCELLED,
        "ABORTED": Cause.PAYMENT_ABORTED,
        "VIRTUAL_ACCOUNT_NOT_ACCEPTED": Cause.ACCOUNT_NOT_ACCEPTED,
        "the PG knows no such payment": Cause.PAYMENT_NOT_FOUND,
        "NOT_FOUND_PAYMENT": Cause.PAYMENT_NOT_FOUND,
        "key of another order": Cause.KEY_OF_ANOTHER_ORDER,
        "KEY_OF_ANOTHER_ORDER": Cause.KEY_OF_ANOTHER_ORDER,
        "the intent could not be written": Cause.INTENT_NOT_WRITTEN,
        "cancelled at the PG": Cause.CANCELLED_AT_PROVIDER,
        "money came after the end": Cause.PAID_AFTER_END,
        "too late": Cause.PAID_AFTER_END,
    }
)
#: The provider's code that a cause implies, if the provider's answer carried none.
_IMPLIED_CODES: Final[Mapping[str, str]] = MappingProxyType(
    {
        Cause.PAYMENT_ABORTED: "ABORTED",
        Cause.PAYMENT_EXPIRED: "EXPIRED",
        Cause.SESSION_EXPIRED: "NOT_FOUND_PAYMENT_SESSION",
        Cause.PAYMENT_CANCELLED: "CANCELED",
        Cause.ACCOUNT_NOT_ACCEPTED: "VIRTUAL_ACCOUNT_NOT_ACCEPTED",
        Cause.PAYMENT_NOT_FOUND: "NOT_FOUND_PAYMENT",
    }
)
_PAGE_PREFIX: Final = "payment page: "


class Reason(msgspec.Struct, frozen=True):
    """A cause with its facts."""

    #: A `Cause`; other text if a version unknown to this one wrote it.
    cause: str
    #: The payment provider's own code.
    provider_code: str = ""
    #: Of `Cause.OPERATOR`: the operator's name and note.
    operator: str = ""
    note: str = ""

    @property
    def code(self) -> str:
        """The provider's code, or the one that the cause implies."""
        return self.provider_code or _IMPLIED_CODES.get(self.cause, "")

    def members(self) -> dict[str, str]:
        """The members of the event that this reason explains."""
        optional = {
            "providerCode": self.provider_code,
            "operator": self.operator,
            "note": self.note,
        }
        return {"cause": str(self.cause)} | {name: text for name, text in optional.items() if text}

    def sentence(self) -> str:
        """The reason in one sentence, for people."""
        said = SENTENCES.get(self.cause, f"{self.cause}.")
        facts = self.provider_code or ": ".join(filter(None, (self.operator, self.note)))
        return f"{said.removesuffix('.')} ({facts})." if facts else said

    @classmethod
    def read(cls, event: str, data: Mapping[str, Any]) -> "Reason | None":
        """The reason in an event's data, also of earlier versions; None if it has none."""
        cause = str(data.get("cause") or "")
        if not cause:
            return None
        provider_code = str(data.get("providerCode") or "")
        if cause in _CODES:
            operator, note = str(data.get("operator") or ""), str(data.get("note") or "")
            return cls(Cause(cause), provider_code, operator, note)
        if event == PaymentOutcome.REFUNDED and data.get("from") == Status.CONFIRMED:
            operator, _, note = cause.partition(": ")
            return cls(Cause.OPERATOR, "", operator, note)
        if cause.startswith(_PAGE_PREFIX):
            return cls(Cause.PAYMENT_PAGE, cause.removeprefix(_PAGE_PREFIX))
        return _read_alias(event, cause) or cls(cause, provider_code)


def _read_alias(outcome: str, text: str) -> Reason | None:
    if text in _ALIASES:
        return Reason(_ALIASES[text])
    if outcome == PaymentOutcome.DECLINED and not text.partition(":")[0].islower():
        # Earlier versions named a decline by the provider's code alone.
        return Reason(Cause.PROVIDER_DECLINED, text)
    return None


class Attempt(msgspec.Struct, frozen=True):
    """How the attempt of one payment key ended, as stored in the order's hash."""

    outcome: str
    reason: Reason | None = None

    @property
    def cause(self) -> str:
        """The reason's cause; empty if there is none."""
        return self.reason.cause if self.reason else ""

    def text(self) -> str:
        """`OUTCOME`, `OUTCOME:CAUSE` or `OUTCOME:CAUSE:PROVIDER_CODE`."""
        if self.reason is None:
            return str(self.outcome)
        parts = (self.outcome, self.reason.cause, self.reason.provider_code)
        return ":".join(filter(None, parts))

    @classmethod
    def read(cls, text: str) -> "Attempt":
        """An attempt from the hash's text, also of earlier versions."""
        word, _, rest = text.partition(":")
        outcome = PaymentOutcome.VOIDED if word == "void" else word
        if not rest:
            return cls(outcome)
        cause, _, provider_code = rest.partition(":")
        if cause in _CODES:
            return cls(outcome, Reason(Cause(cause), provider_code))
        return cls(outcome, _read_alias(outcome, rest) or Reason(cause, provider_code))


#: Ends that rest on a refusal or on silence: the PG may still show money later.
UNPROVEN: Final = frozenset(
    {
        Cause.PROVIDER_DECLINED,
        Cause.PAYMENT_ABORTED,
        Cause.SESSION_EXPIRED,
        Cause.PAYMENT_NOT_FOUND,
        Cause.NEVER_APPROVED,
        Cause.AMOUNT_MISMATCH,
        Cause.ORDER_ID_USED,
    }
)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a payment ended, as `finish.lua` takes it."""

    name: PaymentOutcome
    #: None if the units are the buyer's.
    reason: Reason | None = None
    due_ms: int = 0
    #: Whether units that this outcome gives up are for sale again; else they leave the sale.
    restock: bool = True
    #: More members of the event.
    members: dict[str, Any] = {}

    @property
    def attempt(self) -> str:
        """The text stored for the payment key; empty forgets the attempt."""
        if self.reason is not None and self.reason.cause in FORGOTTEN:
            return ""
        return Attempt(self.name, self.reason).text()

    @property
    def is_unproven(self) -> bool:
        """Whether the PG may still show money for this payment."""
        ended = self.reason is not None and self.name is not PaymentOutcome.REFUNDED
        return ended and self.reason is not None and self.reason.cause in UNPROVEN

    @property
    def event_members(self) -> dict[str, Any]:
        """All members that this outcome adds to its event."""
        return (self.reason.members() if self.reason else {}) | self.members


class Claimed(msgspec.Struct, frozen=True):
    """This caller may ask the PG for the money under this fence, until the lease ends."""

    fence: int
    lease_until_ms: int
    #: Names the call that got the fence; empty if the call only read it.
    claim_id: str = ""
    #: Whether enough replicas have the claim: without them no money may be requested.
    is_acknowledged: bool = True


class ClaimLost(Exception):
    """Redis lacks a claim that it had acknowledged: it has lost events."""


class Present(msgspec.Struct, frozen=True):
    """Nothing to claim: the order's status, and how this payment key's attempt ended."""

    status: Status
    #: As `Attempt.read` takes it; empty if this key has no outcome of its own.
    outcome: str


class LeaseElsewhere(msgspec.Struct, frozen=True):
    """Another process has the lease of this payment, or it is no longer CONFIRMING."""


class Finished(msgspec.Struct, frozen=True):
    """The order's status; `applied` is false if its fence, status or seq forbade it."""

    status: Status
    applied: bool
