"""Follow-up of a payment that the PG shows, for an order that is not being confirmed.

    AWAITING_DEPOSIT  its own account: paid, lapsed or cancelled
    CONFIRMED         its own payment: cancelled at the PG's console in full or in part, or a
                      deposit that the bank took back
    REFUNDED          its own account: a refund that the bank did not pay out
    RELEASED EXPIRED  money that came after the end goes back
    any               a further payment of the order, which cannot pay for it, goes back

Every new state that the PG shows is stored, for the audit and the order's history.
"""

from reservation.adapters.sql.store import SqlStore
from reservation.application.payments.attempt import PaymentAttempt
from reservation.application.payments.resolve import AnswerKind, PaymentResolver
from reservation.application.sales.catalog import Catalog
from reservation.domain.alarms import Alarm
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.payment_gateway import (
    CANCELLED_PAYMENT,
    OPEN_PAYMENT,
    Answered,
    Payment,
    PaymentStatus,
)
from reservation.domain.payment_rules import AnswerTo
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.telemetry.metrics import alarm

__all__ = ["FollowUp"]

#: Delay before the recheck of a payment that could not be refunded.
RETRY_SECONDS = 60.0
#: The PG's statuses of a refund that the bank did not pay out, or not in full.
_BANK_FAILED = ("FAILED", "PARTIAL_FAILED")
_TOO_LATE = Outcome(name=PaymentOutcome.REFUNDED, reason=Reason(Cause.PAID_AFTER_END))


class FollowUp:
    """Reconciles an order with a lookup of one of its payments."""

    def __init__(self, catalog: Catalog, sql: SqlStore, resolver: PaymentResolver) -> None:
        self._catalog = catalog
        self._sql = sql
        self._resolver = resolver

    async def follow(
        self, order: Reservation, answer: Answered, *, is_listed: bool = False
    ) -> bool:
        """Act on the payment's state; false if it must be rechecked.

        Args:
            order: as it was read before the lookup; not CONFIRMING.
            answer: a lookup of a payment whose order id is this order's.
            is_listed: whether the caller works the list of rechecks and reschedules this payment
                by itself.

        Raises:
            SQLAlchemyError, OSError: SQL is down; the payment must be rechecked.
        """
        payment = answer.payment
        kept = await self._store_changes(order, answer)
        known = await self._catalog.get(order.sale_id)
        case = PaymentAttempt(order, known, order.fence, payment.payment_key)
        if payment.payment_key == order.payment_key:
            match order.status:
                case Status.AWAITING_DEPOSIT:
                    return kept and await self._follow_account(case, answer)
                case Status.CONFIRMED:
                    return kept and await self._follow_sold(case, answer)
                case Status.REFUNDED if not (
                    payment.status in OPEN_PAYMENT and payment.balance_amount
                ):
                    account = payment.virtual_account
                    if account is not None and account.refund_status in _BANK_FAILED:
                        alarm(Alarm.BANK_REFUND_FAILED, order_id=order.order_id)
                    return kept
                case _:
                    # Of a REFUNDED order: another payment's late money was refunded before.
                    pass
        if order.status in (Status.RELEASED, Status.EXPIRED):
            settled = kept and await self._follow_ended(case, answer)
        else:
            settled = kept and await self._cancel_further_payment(case, payment)
        if settled or is_listed:
            return settled
        # The PG repeats a webhook for some days only, and the service may be down then.
        await self._resolver.schedule_recheck(case, RETRY_SECONDS)
        return False

    async def _store_changes(self, order: Reservation, answer: Answered) -> bool:
        """Store the payment and the answer if they differ from SQL; whether SQL has them."""
        payment = answer.payment
        before = await self._sql.payments.get(payment.payment_key)
        if before is not None and _progress(before) == _progress(payment):
            return True
        return await self._resolver.remember_payment(
            order.order_id, payment.payment_key, AnswerKind.LOOK_UP, answer
        )

    async def _follow_account(self, case: PaymentAttempt, answer: Answered) -> bool:
        return await self._resolver.resolve(case, answer, AnswerTo.LOOK_UP) is not None

    async def _follow_sold(self, case: PaymentAttempt, answer: Answered) -> bool:
        payment, order_id = answer.payment, case.order.order_id
        if payment.status == PaymentStatus.WAITING_FOR_DEPOSIT:
            # The bank reversed a deposit after its own error.
            alarm(Alarm.DEPOSIT_REVERSED, order_id=order_id)
            return await self._resolver.resolve(case, answer, AnswerTo.LOOK_UP) is not None
        if payment.status in CANCELLED_PAYMENT:
            # By another party, or by a refund of ours in flight, which finishes by itself.
            refund = await self._sql.refunds.get(order_id)
            if refund is None or refund.status == "refused":
                if payment.balance_amount == 0 or payment.status == PaymentStatus.CANCELED:
                    alarm(Alarm.CANCELLED_AT_THE_PG, order_id=order_id)
                else:
                    left = payment.balance_amount
                    alarm(Alarm.PARTLY_CANCELLED_AT_THE_PG, order_id=order_id, left=left)
        return True

    async def _follow_ended(self, case: PaymentAttempt, answer: Answered) -> bool:
        """Refund money that arrived after the order ended, with retries until it succeeds."""
        payment = answer.payment
        if payment.status == PaymentStatus.WAITING_FOR_DEPOSIT:
            return await self._cancel_payment(case, payment, "the reservation has ended")
        if payment.status in OPEN_PAYMENT and payment.balance_amount:
            cancelled = await self._resolver.cancel(case, _TOO_LATE, "money came after the end")
            return cancelled is not None
        if payment.status in CANCELLED_PAYMENT and payment.approved_at is not None:
            # A cancel of ours whose answer was lost.
            return await self._resolver.finish(case, _TOO_LATE, answer) is not None
        return True

    async def _cancel_further_payment(self, case: PaymentAttempt, payment: Payment) -> bool:
        """Cancel a payment that does not pay for the order; the order stays as it is."""
        if payment.status not in OPEN_PAYMENT or not payment.balance_amount:
            return True
        if payment.status != PaymentStatus.WAITING_FOR_DEPOSIT:
            alarm(
                Alarm.SECOND_PAYMENT,
                order_id=case.order.order_id,
                payment=payment.payment_key[-4:],
            )
        return await self._cancel_payment(case, payment, "the order has another payment")

    async def _cancel_payment(self, case: PaymentAttempt, payment: Payment, reason: str) -> bool:
        """Cancel a payment that is not part of the order's state."""
        order, key = case.order, payment.payment_key
        if not await self._resolver.bar(order.order_id, order.sale_id, case.fence, key):
            return False
        answer = await self._resolver.cancel_at_pg(order.order_id, key, reason)
        if isinstance(answer, Answered) and answer.payment.status in CANCELLED_PAYMENT:
            return await self._resolver.store_payment(answer.payment)
        alarm(Alarm.AUTOMATIC_CANCEL_FAILED, order_id=order.order_id, reason=reason)
        return False


def _progress(payment: Payment) -> tuple[str, int, str | None]:
    """The fields whose change is news: status, balance, and the status of the bank's refund."""
    account = payment.virtual_account
    return payment.status, payment.balance_amount, account.refund_status if account else None
