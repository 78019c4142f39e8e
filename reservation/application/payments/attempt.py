"""One payment attempt: the order under its fence, its intent, and its answer to the buyer."""

import math
from typing import Final

import msgspec

from reservation.adapters.sql.payment_intents import Intent
from reservation.adapters.toss.error_codes import decline_sentence
from reservation.application.sales.catalog import CachedSale
from reservation.domain.errors import (
    AmountMismatch,
    InvalidToken,
    PaymentDeclined,
    ReservationExpired,
)
from reservation.domain.payment import Attempt, Cause, PaymentOutcome
from reservation.domain.reservation import Reservation

__all__ = ["PaymentAttempt", "attempt_answer"]

_FOREIGN: Final = (Cause.KEY_OF_ANOTHER_ORDER, Cause.PAYMENT_OF_ANOTHER_ORDER)

#: The account was cancelled at the request of the buyer or of an operator.
_RELEASED_BY: Final = (Cause.BUYER, Cause.OPERATOR)


class PaymentAttempt(msgspec.Struct, frozen=True):
    """One payment attempt of one order, under the fence that may decide it."""

    order: Reservation
    known: CachedSale
    fence: int
    payment_key: str
    #: The claim or take-over that got the fence; empty if the fence was only read.
    claim_id: str = ""
    #: By the monotonic clock, from before the claim; without a lease no money is requested.
    lease_ends_at: float = -math.inf

    def intent(self, *, idempotency_key: str, now_ms: int) -> Intent:
        """The row that must be in SQL before a confirm with this key is sent."""
        order = self.order
        return Intent(
            order_id=order.order_id,
            sale_id=order.sale_id,
            fence=self.fence,
            payment_key=self.payment_key,
            amount=order.amount,
            currency=order.currency,
            idempotency_key=idempotency_key,
            now_ms=now_ms,
            epoch=self.known.epoch,
            reservation=msgspec.json.encode(order).decode(),
        )


def attempt_answer(order: Reservation, payment_key: str) -> Reservation:
    """The order as the answer to this attempt.

    Raises:
        PaymentDeclined, InvalidToken, AmountMismatch, ReservationExpired: the attempt was refused.
    """
    attempt = Attempt.read(order.attempts.get(payment_key, ""))
    code = attempt.reason.code if attempt.reason else ""
    match attempt.outcome:
        case PaymentOutcome.DECLINED if attempt.cause in _RELEASED_BY:
            return order
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
