"""Follows up a payment that the PG shows, for an order that is not being confirmed.

    AWAITING_DEPOSIT  its own account: paid, lapsed or cancelled
    CONFIRMED         its own payment: cancelled at the PG's console in full or in part, or a
                      deposit that the bank took back
    REFUNDED          its own account: a refund that the bank did not pay out
    RELEASED EXPIRED  money that came after the end goes back
    any               a further payment of the order, which it cannot be paid with, goes back

What the PG shows is kept whenever it is new, so that the audit and the order's history have it.
"""

from reservation.adapters.sql.ledger import Ledger
from reservation.application.payments.resolve import AnswerKind, PaymentAttempt, PaymentResolver
from reservation.application.sales.catalog import Catalog
from reservation.domain.alarms import Alarm
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.payment_gateway import Answered, Payment, PaymentStatus
from reservation.domain.payment_rules import AnswerTo
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.telemetry.metrics import alarm

__all__ = ["FollowUp"]

#: When a payment that could not be given back is looked at again.
RETRY_SECONDS = 60.0
#: Money that is there, or an account that may still be paid into.
_OPEN = (PaymentStatus.DONE, PaymentStatus.PARTIAL_CANCELED, PaymentStatus.WAITING_FOR_DEPOSIT)
_CANCELLED = (PaymentStatus.CANCELED, PaymentStatus.PARTIAL_CANCELED)
#: The PG's words for a refund to an account that the bank did not pay out, or not all of it.
_BANK_FAILED = ("FAILED", "PARTIAL_FAILED")
_TOO_LATE = Outcome(
    name=PaymentOutcome.REFUNDED, reason=Reason(Cause.PAID_AFTER_END), members={"restock": True}
)


class FollowUp:
    """Brings an order in line with what a look-up shows of one of its payments."""

    def __init__(self, catalog: Catalog, ledger: Ledger, resolver: PaymentResolver) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self._resolver = resolver

    async def follow(
        self, order: Reservation, answer: Answered, *, is_listed: bool = False
    ) -> bool:
        """Carry out what the payment obliges us to; false where it must be looked at again.

        Args:
            order: as it was read before the PG was asked; not CONFIRMING.
            answer: what a look-up shows of a payment whose order id is this order's.
            is_listed: whether the caller works the list of payments to look at, and puts this one
                off by itself.

        Raises:
            SQLAlchemyError, OSError: SQL is away; it must be looked at again.
        """
        payment = answer.payment
        kept = await self._keep_news(order, answer)
        known = await self._catalog.get(order.sale_id)
        case = PaymentAttempt(order, known, order.fence, payment.payment_key)
        if payment.payment_key == order.payment_key:
            match order.status:
                case Status.AWAITING_DEPOSIT:
                    return kept and await self._of_account(case, answer)
                case Status.CONFIRMED:
                    return kept and await self._of_sold(case, answer)
                case Status.REFUNDED:
                    account = payment.virtual_account
                    if account is not None and account.refund_status in _BANK_FAILED:
                        alarm(Alarm.BANK_REFUND_FAILED, order_id=order.order_id)
                    return kept
                case _:
                    pass
        if order.status in (Status.RELEASED, Status.EXPIRED):
            settled = kept and await self._of_ended(case, answer)
        else:
            settled = kept and await self._of_further(case, payment)
        if settled or is_listed:
            return settled
        # The PG's webhook comes again for days only, and to a service that is up.
        await self._resolver.look_again(case, RETRY_SECONDS)
        return False

    async def _keep_news(self, order: Reservation, answer: Answered) -> bool:
        """Keep the payment and the answer where they differ from what SQL has; whether it has."""
        payment = answer.payment
        before = await self._ledger.payment_by_key(payment.payment_key)
        account = payment.virtual_account
        news = (payment.status, payment.balance_amount, account and account.refund_status)
        if before is not None:
            known = (before.status, before.balance_amount, before.account_refund)
            if news == known:
                return True
        await self._resolver.remember(
            order.order_id, payment.payment_key, AnswerKind.LOOK_UP, answer
        )
        return await self._resolver.keep_payment(payment)

    async def _of_account(self, case: PaymentAttempt, answer: Answered) -> bool:
        return await self._resolver.resolve(case, answer, AnswerTo.LOOK_UP) is not None

    async def _of_sold(self, case: PaymentAttempt, answer: Answered) -> bool:
        payment, order_id = answer.payment, case.order.order_id
        if payment.status == PaymentStatus.WAITING_FOR_DEPOSIT:
            # The bank took a deposit back after an error of its own.
            alarm(Alarm.DEPOSIT_REVERSED, order_id=order_id)
            return await self._resolver.resolve(case, answer, AnswerTo.LOOK_UP) is not None
        if payment.status in _CANCELLED:
            # By someone else, or by a refund of ours on its way, which finishes by itself.
            refund = await self._ledger.refund_of(order_id)
            if refund is None or refund.status == "refused":
                if payment.balance_amount == 0 or payment.status == PaymentStatus.CANCELED:
                    alarm(Alarm.CANCELLED_AT_THE_PG, order_id=order_id)
                else:
                    left = payment.balance_amount
                    alarm(Alarm.PARTLY_CANCELLED_AT_THE_PG, order_id=order_id, left=left)
        return True

    async def _of_ended(self, case: PaymentAttempt, answer: Answered) -> bool:
        """Money that came after the end goes back, however often that has to be tried."""
        payment = answer.payment
        if payment.status == PaymentStatus.WAITING_FOR_DEPOSIT:
            return await self._give_back(case, payment, "the reservation has ended")
        if payment.status in _OPEN and payment.balance_amount:
            cancelled = await self._resolver.cancel(case, _TOO_LATE, "money came after the end")
            return cancelled is not None
        if payment.status in _CANCELLED and payment.approved_at is not None:
            # A cancel of ours whose answer was lost.
            return await self._resolver.finish(case, _TOO_LATE, answer) is not None
        return True

    async def _of_further(self, case: PaymentAttempt, payment: Payment) -> bool:
        """A payment that the order is not paid with: it is cancelled, the order stays as it is."""
        if payment.status not in _OPEN or not payment.balance_amount:
            return True
        if payment.status != PaymentStatus.WAITING_FOR_DEPOSIT:
            alarm(
                Alarm.SECOND_PAYMENT,
                order_id=case.order.order_id,
                payment=payment.payment_key[-4:],
            )
        return await self._give_back(case, payment, "the order has another payment")

    async def _give_back(self, case: PaymentAttempt, payment: Payment, reason: str) -> bool:
        """Cancel a payment that is no part of the order's state."""
        order, key = case.order, payment.payment_key
        if not await self._resolver.bar(order.order_id, order.sale_id, case.fence, key):
            return False
        answer = await self._resolver.cancel_at_pg(order.order_id, key, reason)
        if isinstance(answer, Answered) and answer.payment.status in _CANCELLED:
            return await self._resolver.keep_payment(answer.payment)
        alarm(Alarm.AUTOMATIC_CANCEL_FAILED, order_id=order.order_id, reason=reason)
        return False
