"""Payment resolution: acts on the PG's answers until the payment is decided or must wait."""

from enum import StrEnum
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from reservation.adapters.sql.errors import is_row_error
from reservation.adapters.sql.payments import AnswerRow
from reservation.application.payments.attempt import PaymentAttempt
from reservation.application.payments.gateway_health import GatewayHealth
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.application.readiness.data_loss import DataLossDetector
from reservation.domain.alarms import Alarm
from reservation.domain.errors import HoldLost
from reservation.domain.idempotency_keys import cancel_key
from reservation.domain.payment import Cause, ClaimLost, Outcome, PaymentOutcome, Reason
from reservation.domain.payment_gateway import (
    Answer,
    Answered,
    Declined,
    Misconfigured,
    OrderIdUsed,
    Payment,
    PaymentMissing,
    RefundAccount,
    TryAgain,
)
from reservation.domain.payment_rules import (
    AnswerTo,
    CancelFirst,
    Finish,
    LookUp,
    Unapproved,
    Undecided,
    decide,
    is_fully_cancelled,
    may_be_refunded,
    refunded_outcome,
)
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.failpoints import reach
from reservation.telemetry.metrics import PAYMENTS, alarm

__all__ = ["AnswerKind", "PaymentResolver"]

log = structlog.get_logger(__name__)

#: A confirm, the lookup that it requires, and one more lookup: no verdict needs a fourth answer.
STEPS_MAX: Final = 4

#: Outcomes that give the units to the buyer.
_SELLS: Final = (PaymentOutcome.CONFIRMED, PaymentOutcome.AWAITING_DEPOSIT)

#: Outcomes that the audit compares with the payment in SQL.
_MOVES_MONEY: Final = (*_SELLS, PaymentOutcome.REFUNDED)

_FABRICATED: Final = Outcome(name=PaymentOutcome.VOIDED, reason=Reason(Cause.PAYMENT_NOT_FOUND))

#: A deposit, or its reversal by the bank, moves an order between these without a claim.
_BY_ACCOUNT: Final = (Status.AWAITING_DEPOSIT, Status.CONFIRMED)


class AnswerKind(StrEnum):
    """The call to which an answer in an order's history belongs."""

    CONFIRM = "confirm"
    LOOK_UP = "look_up"
    LOOK_UP_ORDER = "look_up_order"
    CANCEL = "cancel"


class PaymentResolver(PaymentUseCase):
    """Resolves payments by the PG's answers."""

    def __init__(
        self,
        systems: PaymentSystems,
        data_loss: DataLossDetector,
        health: GatewayHealth,
    ) -> None:
        super().__init__(systems)
        self._data_loss = data_loss
        self._health = health

    def lease_suffices(self, case: PaymentAttempt) -> bool:
        """Whether the lease outlives a confirm sent now.

        While this process was frozen another may have taken over the payment or given it back.
        """
        least = self._limits.confirm_seconds + self._limits.lease_left_seconds
        if case.lease_ends_at - self._clock.monotonic() >= least:
            return True
        log.warning("lease_too_short", order_id=case.order.order_id, fence=case.fence)
        return False

    async def resolve(self, case: PaymentAttempt, answer: Answer, asked: AnswerTo) -> Status | None:
        """Decide the payment, with further calls to the PG if the answer requires them.

        Returns:
            The order's status now; None while the payment is undecided.
        """
        first = asked is AnswerTo.FIRST_CONFIRM
        refused: Answer | None = None
        for _ in range(STEPS_MAX):
            kind = AnswerKind.LOOK_UP if asked is AnswerTo.LOOK_UP else AnswerKind.CONFIRM
            verdict = decide(
                answer,
                order=case.order,
                payment_key=case.payment_key,
                asked=asked,
                # A deposit that the bank reversed is awaited again, even if the sale takes none.
                virtual_accounts=case.known.sale.virtual_accounts
                or case.order.status in _BY_ACCOUNT,
                refused=refused,
            )
            kept: bool | None = None
            if isinstance(verdict, Finish) and isinstance(answer, Answered):
                kept = await self.remember_payment(
                    case.order.order_id, case.payment_key, kind, answer
                )
            else:
                await self.remember(case.order.order_id, case.payment_key, kind, answer)
            match verdict:
                case Finish(outcome) if asked is AnswerTo.LOOK_UP and outcome.name in _SELLS:
                    return await self._sell(case, outcome, answer, kept=kept)
                case Finish(outcome):
                    return await self.finish(case, outcome, answer, kept=kept)
                case CancelFirst(outcome, reason):
                    return await self.cancel(case, outcome, reason)
                case LookUp(missing):
                    # A later confirm may meet the first one's success under the same order id.
                    if first or not isinstance(answer, OrderIdUsed):
                        refused = answer
                    answer, asked = await self._gateway.look_up(case.payment_key), AnswerTo.LOOK_UP
                    if _is_key_refused(refused) and _is_key_refused(answer):
                        self._health.refuse()
                    if missing and first and await self._is_fabricated(case, answer):
                        return await self.finish(case, _FABRICATED, answer)
                case Unapproved():
                    return None
                case Undecided(name):
                    if name:
                        alarm(name, order_id=case.order.order_id, fence=case.fence)
                    return None
        return None

    async def _is_fabricated(self, case: PaymentAttempt, by_key: Answer) -> bool:
        """Whether the PG has neither this payment nor another one of the order."""
        if not isinstance(by_key, PaymentMissing):
            return False
        by_order = await self._gateway.look_up_order(case.order.order_id)
        await self.remember(
            case.order.order_id, case.payment_key, AnswerKind.LOOK_UP_ORDER, by_order
        )
        return isinstance(by_order, PaymentMissing) and await self._health.sees_own_payments()

    async def finish(
        self,
        case: PaymentAttempt,
        outcome: Outcome,
        answer: Answer | None,
        *,
        kept: bool | None = None,
    ) -> Status | None:
        """Record the outcome under the case's fencing token.

        Args:
            case: the payment.
            outcome: to be recorded.
            answer: the answer that decided, if any; its payment is stored first.
            kept: whether SQL has stored the answer's payment, if that was tried before.

        Returns:
            The order's status now; None if another fence has it, if a deposit changed it since it
            was read, so that it must be checked again, or if SQL did not store the payment that
            sells or refunds it, or did not show the refund that decides on its units: the settler
            continues as soon as SQL does. None as well if Redis has lost the claim: the payment is
            claimed again by its intent.
        """
        if isinstance(answer, Answered):
            if kept is None:
                kept = await self.store_payment(answer.payment)
            if outcome.name in _MOVES_MONEY and not kept:
                return None
        restock = await self._restocks(case.order, outcome, answer)
        if restock is None:
            return None
        if outcome.is_unproven:
            await self.schedule_recheck(case, self._limits.recheck_seconds, anew=True)
        elif outcome.name is PaymentOutcome.AWAITING_DEPOSIT:
            await self.schedule_recheck(case, self._limits.deposit_check_seconds)
        outcome = msgspec.structs.replace(outcome, restock=restock)
        reach("conclude:before_finish", case.order.order_id)
        try:
            finished = await self._store.finish(
                case.order,
                epoch=case.known.epoch,
                fence=case.fence,
                outcome=outcome,
                payment_key=case.payment_key,
                claim_id=case.claim_id,
            )
        except (ClaimLost, HoldLost) as lost:
            reason = f"order {case.order.order_id} lacks the claim of its payment: {lost}"
            self._data_loss.report(case.order.sale_id, case.known.epoch, reason)
            return None
        reach("conclude:after_finish", case.order.order_id)
        if not finished.applied:
            log.info("finish_fence_stale", order_id=case.order.order_id, fence=case.fence)
            # The winner may have called the PG before we did: our answer may be the newer one.
            moved = case.order.status in _BY_ACCOUNT and finished.status in _BY_ACCOUNT
            return None if moved or finished.status is Status.CONFIRMING else finished.status
        PAYMENTS.labels(outcome.name).inc()
        log.info(
            "payment_finished",
            order_id=case.order.order_id,
            outcome=outcome.name,
            status=finished.status.value,
        )
        return finished.status

    async def _restocks(
        self, order: Reservation, outcome: Outcome, answer: Answer | None
    ) -> bool | None:
        """Whether units that the order gives up are for sale again; None while SQL is down."""
        is_cancelled = isinstance(answer, Answered) and is_fully_cancelled(answer.payment)
        if not may_be_refunded(order.status, outcome.name, is_cancelled=is_cancelled):
            return True
        try:
            refund = await self._sql.refunds.get(order.order_id)
        except (SQLAlchemyError, OSError) as error:
            log.warning("refund_not_read", order_id=order.order_id, reason=str(error))
            return None
        return refund is None or refund.status == "refused" or refund.restock

    async def schedule_recheck(
        self, case: PaymentAttempt, seconds: float, *, anew: bool = False
    ) -> None:
        """Schedule a recheck of the payment, in case no webhook comes; works without SQL.

        Args:
            case: the payment.
            seconds: until the recheck.
            anew: the look-ups so far do not count, since the payment has ended after them.
        """
        due_at_ms = self._clock.now_ms() + round(seconds * 1000)
        try:
            await self._sql.payments.schedule_check(
                case.payment_key, case.order.order_id, due_at_ms, anew=anew
            )
        except (SQLAlchemyError, OSError) as error:
            log.warning("recheck_schedule_failed", order_id=case.order.order_id, reason=str(error))

    async def cancel(self, case: PaymentAttempt, outcome: Outcome, reason: str) -> Status | None:
        """Give the money back at the PG, and record the outcome once the PG shows it.

        The payment is barred from being sold first: a cancel whose answer is lost may be carried
        out at any later time.
        """
        order = case.order
        if not await self.bar(order.order_id, order.sale_id, case.fence, case.payment_key):
            return None
        reach("cancel:after_bar", order.order_id)
        answer = await self._cancel_at_pg(case, reason)
        if isinstance(answer, Answered) and is_fully_cancelled(answer.payment):
            return await self.finish(case, outcome, answer)
        alarm(Alarm.AUTOMATIC_CANCEL_FAILED, order_id=order.order_id, reason=reason)
        return None

    async def bar(self, order_id: str, sale_id: str, fence: int, payment_key: str) -> bool:
        """Bar a payment from being sold, before its cancel is sent.

        Returns:
            False if it may not be cancelled now: SQL is down, or another process requests the same
            money under a later fence, and will decide; or an operator must decide after a restore.
        """
        try:
            if await self._sql.differences.is_left_to_operator(payment_key):
                alarm(Alarm.PAYMENT_WITHOUT_ORDER, order_id=order_id)
                return False
            barred = await self._sql.intents.intend_cancel(
                order_id=order_id,
                sale_id=sale_id,
                fence=fence,
                payment_key=payment_key,
                now_ms=self._clock.now_ms(),
            )
        except (SQLAlchemyError, OSError) as error:
            log.warning("cancel_intent_write_failed", order_id=order_id, reason=str(error))
            return False
        if not barred:
            log.info("cancel_superseded", order_id=order_id, fence=fence)
        return barred

    async def _sell(
        self, case: PaymentAttempt, outcome: Outcome, answer: Answer, *, kept: bool | None
    ) -> Status | None:
        """Sell a payment that a lookup shows as paid, unless a cancel of it may have been sent.

        An answer to a confirm needs no such check: no intent is written after that of a cancel.
        Neither does a deposit that the bank reversed: it sells nothing, and ends at its due date.
        """
        if case.order.status is Status.CONFIRMED:
            return await self.finish(case, outcome, answer, kept=kept)
        try:
            cancelling = await self._sql.intents.is_cancel_intended(case.payment_key)
        except (SQLAlchemyError, OSError) as error:
            log.warning(
                "cancel_intent_read_failed", order_id=case.order.order_id, reason=str(error)
            )
            return None
        if not cancelling:
            return await self.finish(case, outcome, answer, kept=kept)
        again = await self._cancel_at_pg(case, "cancelled before")
        if isinstance(again, Answered) and is_fully_cancelled(again.payment):
            return await self.finish(case, refunded_outcome(again.payment), again)
        if isinstance(again, Declined):
            # The PG has refused the cancel under each key, so none can take effect any more. The
            # money stays, as with an account that was paid while we cancelled it.
            return await self.finish(case, outcome, answer, kept=kept)
        return None

    async def _cancel_at_pg(self, case: PaymentAttempt, reason: str) -> Answer:
        try:
            return await self.cancel_at_pg(case.order.order_id, case.payment_key, reason)
        except (SQLAlchemyError, OSError) as error:
            log.warning("cancel_key_read_failed", order_id=case.order.order_id, reason=str(error))
            return TryAgain("SQL is away")

    async def cancel_at_pg(
        self,
        order_id: str,
        payment_key: str,
        reason: str,
        *,
        account: RefundAccount | None = None,
    ) -> Answer:
        """Cancel a payment with money in full at the PG, and store the answer.

        A refusal stays bound to its idempotency key, while what it was for may pass: an account
        that was paid for a moment, a bank that is closed. So each try after it has the next key.

        Args:
            order_id: of the payment's order.
            payment_key: the PG's id of the payment.
            reason: for the PG's records.
            account: the refund account of a deposit.

        Raises:
            SQLAlchemyError, OSError: the idempotency key is unknown, and nothing was sent.
        """
        attempt = await self._sql.payments.count_bound_cancels(order_id, payment_key)
        answer = await self._gateway.cancel(
            payment_key=payment_key,
            reason=reason,
            idempotency_key=cancel_key(payment_key, attempt),
            refund_account=account,
        )
        await self.remember(order_id, payment_key, AnswerKind.CANCEL, answer, attempt=attempt)
        return answer

    async def remember(
        self,
        order_id: str,
        payment_key: str,
        kind: AnswerKind,
        answer: Answer,
        *,
        attempt: int = 0,
    ) -> None:
        """Store an answer in the order's history; a failure does not stop the payment.

        `attempt` numbers the idempotency keys of its call, from 0 on.
        """
        self._note_own_payment(order_id, answer)
        try:
            await self._sql.payments.add_answer(
                self._row_of(order_id, payment_key, kind, answer, attempt=attempt)
            )
        except (SQLAlchemyError, OSError) as error:
            log.warning("answer_write_failed", order_id=order_id, reason=type(error).__name__)

    async def remember_payment(
        self, order_id: str, payment_key: str, kind: AnswerKind, answer: Answered
    ) -> bool:
        """Store an answer and its payment in one transaction; whether SQL has the payment."""
        self._note_own_payment(order_id, answer)
        row = self._row_of(order_id, payment_key, kind, answer)
        try:
            await self._sql.payments.put(answer.payment, self._clock.now_ms(), answer=row)
        except (SQLAlchemyError, OSError) as error:
            log.warning("payment_write_failed", order_id=order_id, reason=type(error).__name__)
            if not (isinstance(error, DBAPIError) and is_row_error(error)):
                return False
        else:
            return True
        # SQL refuses one of the rows; the other one is stored.
        await self.remember(order_id, payment_key, kind, answer)
        return await self.store_payment(answer.payment)

    def _note_own_payment(self, order_id: str, answer: Answer) -> None:
        if isinstance(answer, Answered) and answer.payment.order_id == order_id:
            self._health.note_own_payment()

    def _row_of(
        self,
        order_id: str,
        payment_key: str,
        kind: AnswerKind,
        answer: Answer,
        *,
        attempt: int = 0,
    ) -> AnswerRow:
        members = msgspec.to_builtins(_without_secret(answer))
        text = msgspec.json.encode(members | {"attempt": attempt} if attempt else members).decode()
        return AnswerRow(
            order_id=order_id,
            payment_key=payment_key,
            kind=kind.value,
            answer=text,
            created_at_ms=self._clock.now_ms(),
        )

    async def store_payment(self, payment: Payment) -> bool:
        """Store the payment as the PG shows it, with its webhook secret; whether SQL has it."""
        try:
            await self._sql.payments.put(payment, self._clock.now_ms())
        except (SQLAlchemyError, OSError) as error:
            log.warning(
                "payment_write_failed", order_id=payment.order_id, reason=type(error).__name__
            )
            return False
        return True


def _is_key_refused(answer: Answer | None) -> bool:
    return isinstance(answer, Misconfigured) and answer.key_refused


def _without_secret(answer: Answer) -> Answer:
    if isinstance(answer, Answered):
        return Answered(msgspec.structs.replace(answer.payment, secret=None))
    return answer
