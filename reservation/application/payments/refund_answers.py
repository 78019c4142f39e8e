"""Rules for the PG's answers to a refund: pure, no I/O."""

import re
from typing import Final

from reservation.domain.payment_gateway import (
    Answer,
    Answered,
    Declined,
    Misconfigured,
    OrderIdUsed,
    Payment,
    PaymentMissing,
    PaymentStatus,
    TryAgain,
    Unknown,
)

__all__ = ["code_of", "has_no_capture", "is_refunded", "may_still_succeed"]

#: An earlier call under the same idempotency key is still in flight at the PG.
_STILL_RUNNING: Final = "IDEMPOTENT_REQUEST_PROCESSING"
#: A failure that the PG itself reports: that call has ended. A 502 or 504 may be a proxy's.
_FAILED: Final = re.compile(r"500 [A-Z][A-Z0-9_]*")
#: A payment in one of these can take no more money.
_ENDED: Final = (PaymentStatus.CANCELED, PaymentStatus.ABORTED, PaymentStatus.EXPIRED)


def is_refunded(payment: Payment) -> bool:
    """Whether all of its money went back."""
    ended = (PaymentStatus.CANCELED, PaymentStatus.PARTIAL_CANCELED)
    return payment.status in ended and payment.balance_amount == 0


def has_no_capture(payment: Payment) -> bool:
    """Whether it ended without money, or with a deposit that the bank reversed."""
    return payment.status in _ENDED and payment.approved_at is None


def may_still_succeed(answer: Answer, *, before: bool) -> bool:
    """Whether a cancel of ours may still be carried out, after this answer to the last one.

    The PG processes one call of a key at a time: its own answer implies that every earlier call has
    ended too. A rejection before processing implies nothing about an earlier call.
    """
    match answer:
        case Answered() | Declined() | PaymentMissing() | OrderIdUsed():
            return False
        case TryAgain(code):
            return before or code == _STILL_RUNNING
        case Misconfigured(bound_to_key=bound):
            return before and not bound
        case Unknown(reason, bound_to_key=bound):
            return not (bound or _FAILED.fullmatch(reason))


def code_of(answer: Answer) -> str | None:
    """The answer as one word, for the operator."""
    match answer:
        case Answered(payment):
            return payment.status
        case Unknown(reason):
            return reason
        case _:
            return answer.code
