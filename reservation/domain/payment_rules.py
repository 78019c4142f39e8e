"""Payment decisions: the consequence of each PG answer for an order. Pure rules, no I/O.

The rules that protect the money:

- Nothing is sold unless order, key, amount, currency and status of the PG's answer are ours.
- A decline releases the stock only if it answers the first confirm of that payment key; any later
  one may describe the second call, so the PG is queried first.
- An answer that is not a known refusal is unknown, and the stock stays held.
- We cancel at the PG only after a lookup by that very key that shows this very order.
- A confirm that the PG refuses as our mistake is a mistake of the buyer if a lookup shows a
  payment that can never be this order's: another order's, or an unpaid one of another amount.
"""

import re
from enum import Enum, auto
from typing import Any, Final

import msgspec

from reservation.domain.alarms import Alarm
from reservation.domain.clock import as_ms
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.payment_gateway import (
    CANCELLED_PAYMENT,
    ENDED_PAYMENT,
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
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status

__all__ = [
    "AnswerTo",
    "CancelFirst",
    "Decision",
    "Finish",
    "LookUp",
    "Unapproved",
    "Undecided",
    "code_of",
    "decide",
    "has_no_capture",
    "is_fully_cancelled",
    "is_refunded",
    "may_be_refunded",
    "may_still_succeed",
    "payment_facts",
    "refunded_outcome",
]

#: The provider's code after its ten minutes between authentication and confirm have passed.
SESSION_EXPIRED_CODES = "NOT_FOUND_PAYMENT_SESSION"
#: An earlier call under the same idempotency key is still in flight at the PG.
_STILL_RUNNING: Final = "IDEMPOTENT_REQUEST_PROCESSING"
#: A failure that the PG itself reports: that call has ended. A 502 or 504 may be a proxy's.
_FAILED: Final = re.compile(r"500 [A-Z][A-Z0-9_]*")


class AnswerTo(Enum):
    """The call that the answer belongs to."""

    #: The first confirm ever sent for this payment key.
    FIRST_CONFIRM = auto()
    #: A confirm that follows another one whose reply was lost or unclear.
    LATER_CONFIRM = auto()
    #: A lookup by this payment key.
    LOOK_UP = auto()


class Finish(msgspec.Struct, frozen=True):
    """Decided: write this outcome."""

    outcome: Outcome


class CancelFirst(msgspec.Struct, frozen=True):
    """The PG must give the money (or the account) back before this outcome may be written."""

    outcome: Outcome
    reason: str


#: No money has moved, and at another amount than ours none ever can for this order.
_UNPAID: Final = frozenset(
    {
        PaymentStatus.READY,
        PaymentStatus.IN_PROGRESS,
        PaymentStatus.ABORTED,
        PaymentStatus.EXPIRED,
    }
)


class LookUp(msgspec.Struct, frozen=True):
    """Ask the PG for the payment before deciding anything."""

    #: Whether the PG answered that it has no such payment.
    missing: bool = False


class Unapproved(msgspec.Struct, frozen=True):
    """A lookup shows no money: not yet confirmed, or not known."""

    missing: bool


class Undecided(msgspec.Struct, frozen=True):
    """No decision is possible now; `alarm` is for an operator, if set."""

    alarm: Alarm | None = None


Decision = Finish | CancelFirst | LookUp | Unapproved | Undecided


def decide(
    answer: Answer,
    *,
    order: Reservation,
    payment_key: str,
    asked: AnswerTo,
    virtual_accounts: bool,
    refused: Answer | None = None,
) -> Decision:
    """The decision that this answer requires for this order.

    Args:
        answer: the PG's.
        order: as it was read before the call to the PG.
        payment_key: the payment of the call.
        asked: the kind of call.
        virtual_accounts: whether the sale accepts them.
        refused: the refusal of the confirm that a lookup follows, if there was one.
    """
    if refused is not None and asked is AnswerTo.LOOK_UP and isinstance(answer, Answered):
        verdict = _after_refusal(refused, answer.payment, order, payment_key)
        if verdict is not None:
            return verdict
    match answer:
        case Answered(payment):
            return _judge_payment(
                payment, order, payment_key, asked, virtual_accounts=virtual_accounts
            )
        case Declined(code):
            return (
                Finish(_declined(Cause.PROVIDER_DECLINED, code))
                if asked is AnswerTo.FIRST_CONFIRM
                else LookUp()
            )
        case PaymentMissing(code):
            if asked is AnswerTo.LOOK_UP:
                return Unapproved(missing=True)
            if asked is AnswerTo.FIRST_CONFIRM and code == SESSION_EXPIRED_CODES:
                return Finish(_expired(Cause.SESSION_EXPIRED, code))
            return LookUp(missing=True)
        case OrderIdUsed():
            return LookUp()
        case Misconfigured():
            if asked is not AnswerTo.LOOK_UP:
                return LookUp()
            return Undecided(alarm=Alarm.GATEWAY_MISCONFIGURED)
        case TryAgain() | Unknown():
            return Undecided()


def _after_refusal(
    refused: Answer, payment: Payment, order: Reservation, payment_key: str
) -> Decision | None:
    """The decision from a refused confirm and its lookup; None: the lookup alone decides."""
    if payment.payment_key != payment_key:
        return None
    match refused:
        case Misconfigured(bound_to_key=True) if payment.order_id != order.order_id:
            return Finish(_voided(Cause.PAYMENT_OF_ANOTHER_ORDER))
        case Misconfigured(bound_to_key=True) if (
            not _is_priced(payment, order) and payment.status in _UNPAID
        ):
            return Finish(_voided(Cause.AMOUNT_MISMATCH))
        case OrderIdUsed(code) if payment.status in _UNPAID and payment.order_id == order.order_id:
            return Finish(_declined(Cause.ORDER_ID_USED, code))
        case Misconfigured() if payment.status in (PaymentStatus.READY, PaymentStatus.IN_PROGRESS):
            return Undecided(alarm=Alarm.GATEWAY_MISCONFIGURED)
        case _:
            return None


def _is_priced(payment: Payment, order: Reservation) -> bool:
    """Whether amount and currency are the order's."""
    return payment.total_amount == order.amount and payment.currency == order.currency


def _judge_payment(
    payment: Payment,
    order: Reservation,
    payment_key: str,
    asked: AnswerTo,
    *,
    virtual_accounts: bool,
) -> Decision:
    if payment.payment_key != payment_key or payment.order_id != order.order_id:
        # Another order's answer: it is not evidence about this one's money.
        return Undecided(alarm=Alarm.ANSWER_FOR_ANOTHER_ORDER)
    if asked is AnswerTo.LATER_CONFIRM:
        # The PG repeats its earlier answer to this idempotency key, even if the payment has changed
        # since: it may have been refunded. Only a lookup shows its current state.
        return LookUp()
    is_valid = _is_priced(payment, order)
    if not is_valid and asked is not AnswerTo.LOOK_UP:
        return LookUp()
    match payment.status:
        case PaymentStatus.DONE:
            if is_valid:
                return Finish(_confirmed(payment))
            return CancelFirst(_refunded(Cause.AMOUNT_MISMATCH), reason="amount mismatch")
        case PaymentStatus.WAITING_FOR_DEPOSIT:
            if is_valid and virtual_accounts and payment.due_at is not None:
                return Finish(_awaiting_deposit(payment))
            if asked is not AnswerTo.LOOK_UP:
                return LookUp()
            return CancelFirst(_declined(Cause.ACCOUNT_NOT_ACCEPTED), reason="no virtual accounts")
        case PaymentStatus.ABORTED:
            return Finish(_declined(Cause.PAYMENT_ABORTED, payment.failure_code or ""))
        case PaymentStatus.EXPIRED:
            return Finish(_expired(Cause.PAYMENT_EXPIRED))
        case PaymentStatus.CANCELED:
            return Finish(refunded_outcome(payment))
        case PaymentStatus.PARTIAL_CANCELED if payment.balance_amount == 0:
            return Finish(refunded_outcome(payment))
        case PaymentStatus.READY | PaymentStatus.IN_PROGRESS:
            return Unapproved(missing=False) if asked is AnswerTo.LOOK_UP else LookUp()
        case _:
            return Undecided(alarm=Alarm.UNEXPECTED_PAYMENT_STATUS)


def payment_facts(payment: Payment) -> dict[str, Any]:
    """The members of a payment that an event stores; no secret, no card."""
    return {
        "paymentKey": payment.payment_key,
        "method": payment.method,
        "approvedAt": payment.approved_at.isoformat() if payment.approved_at else None,
        "totalAmount": payment.total_amount,
        "currency": payment.currency,
    }


def _confirmed(payment: Payment) -> Outcome:
    return Outcome(name=PaymentOutcome.CONFIRMED, members={"payment": payment_facts(payment)})


def _awaiting_deposit(payment: Payment) -> Outcome:
    due_ms = as_ms(payment.due_at) if payment.due_at else 0
    return Outcome(
        name=PaymentOutcome.AWAITING_DEPOSIT,
        due_ms=due_ms,
        members={"dueAt": due_ms, "payment": payment_facts(payment)},
    )


def _declined(cause: Cause, code: str = "") -> Outcome:
    return Outcome(name=PaymentOutcome.DECLINED, reason=Reason(cause, code))


def _expired(cause: Cause, code: str = "") -> Outcome:
    return Outcome(name=PaymentOutcome.EXPIRED, reason=Reason(cause, code))


def _voided(cause: Cause) -> Outcome:
    return Outcome(name=PaymentOutcome.VOIDED, reason=Reason(cause))


def _refunded(cause: Cause) -> Outcome:
    return Outcome(name=PaymentOutcome.REFUNDED, reason=Reason(cause))


def refunded_outcome(payment: Payment) -> Outcome:
    """Cancelled at the PG: an approved payment is a refund, an unpaid account is not."""
    if payment.approved_at is not None:
        return _refunded(Cause.CANCELLED_AT_PROVIDER)
    return _declined(Cause.PAYMENT_CANCELLED)


def may_be_refunded(status: Status, outcome: PaymentOutcome, *, is_cancelled: bool) -> bool:
    """Whether an operator may have begun a refund of an order that ends from this status.

    The refund then decides whether the units are for sale again. Only a sold order can be refunded:
    one whose deposit the bank reversed, or one that is paid and whose sale Redis has lost.

    Args:
        status: the order's, in Redis.
        outcome: of its payment.
        is_cancelled: whether the PG shows the payment as cancelled in full.
    """
    if status is Status.AWAITING_DEPOSIT:
        return outcome in (PaymentOutcome.DECLINED, PaymentOutcome.EXPIRED, PaymentOutcome.REFUNDED)
    return status is Status.CONFIRMING and (outcome is PaymentOutcome.REFUNDED or is_cancelled)


def is_fully_cancelled(payment: Payment) -> bool:
    """Whether it is cancelled in full: all of its money is back, or none ever came."""
    nothing_left = payment.balance_amount == 0 or payment.approved_at is None
    return payment.status in CANCELLED_PAYMENT and nothing_left


def is_refunded(payment: Payment) -> bool:
    """Whether all of its money went back."""
    return payment.status in CANCELLED_PAYMENT and payment.balance_amount == 0


def has_no_capture(payment: Payment) -> bool:
    """Whether it ended without money, or with a deposit that the bank reversed."""
    return payment.status in ENDED_PAYMENT and payment.approved_at is None


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
