"""The answer to a payment attempt: its order, or the refusal of the attempt."""

from typing import Final

from reservation.adapters.toss.declines import decline_sentence
from reservation.domain.errors import (
    AmountMismatch,
    InvalidToken,
    PaymentDeclined,
    ReservationExpired,
)
from reservation.domain.payment import Attempt, Cause, PaymentOutcome
from reservation.domain.reservation import Reservation

__all__ = ["attempt_answer"]

_FOREIGN: Final = (Cause.KEY_OF_ANOTHER_ORDER, Cause.PAYMENT_OF_ANOTHER_ORDER)


def attempt_answer(order: Reservation, payment_key: str) -> Reservation:
    """The order as the answer to this attempt.

    Raises:
        PaymentDeclined, InvalidToken, AmountMismatch, ReservationExpired: the attempt was refused.
    """
    attempt = Attempt.read(order.attempts.get(payment_key, ""))
    code = attempt.reason.code if attempt.reason else ""
    match attempt.outcome:
        case PaymentOutcome.DECLINED:
            raise PaymentDeclined(
                f"{decline_sentence(code)} The stock was released.", providerCode=code
            )
        case PaymentOutcome.VOIDED if attempt.cause in _FOREIGN:
            raise InvalidToken("This payment belongs to another order.")
        case PaymentOutcome.VOIDED if attempt.cause == Cause.AMOUNT_MISMATCH:
            raise AmountMismatch(
                "The payment's amount differs from the order's amount.", expectedAmount=order.amount
            )
        case PaymentOutcome.VOIDED:
            raise PaymentDeclined(decline_sentence(code), providerCode=code)
        case PaymentOutcome.EXPIRED:
            raise ReservationExpired
        case _:
            return order
