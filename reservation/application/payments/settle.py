"""Settlement of undecided payments, from any state in which a process may have crashed.

The PG is the source of truth about money, so it is polled with back-off until the outcome is known:

    money moved, refused or gone        finish at once
    not approved, buyer just back       confirm again, under the same idempotency key
    not approved for a long time        wait until the PG's own window has closed, then release
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.sql.payment_intents import IntentOutcome, VoidOutcome
from reservation.application.payments.absence import Absence, AbsentPayment
from reservation.application.payments.attempt import PaymentAttempt
from reservation.application.payments.resolve import AnswerKind, PaymentResolver
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.domain.alarms import Alarm
from reservation.domain.idempotency_keys import confirm_key
from reservation.domain.payment import (
    Cause,
    LeaseElsewhere,
    Outcome,
    PaymentOutcome,
    Reason,
)
from reservation.domain.payment_gateway import (
    Answer,
    Answered,
    PaymentMissing,
    PaymentStatus,
)
from reservation.domain.payment_rules import AnswerTo, CancelFirst, Unapproved, decide
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.failpoints import reach
from reservation.telemetry import tracing
from reservation.telemetry.metrics import SETTLED, alarm

__all__ = ["PaymentSettlement"]

log = structlog.get_logger(__name__)

_MINUTE_MS: Final = 60_000
#: The pause before the next poll of an undecided payment is its age divided by this.
PAUSE_SHARE: Final = 4
#: Lookups in flight, for at most 10 s each: half of the gateway client's connections.
LOOK_UPS_AT_ONCE: Final = 32
#: Second confirms and cancels in flight. Each may hang for a minute at one card company; payments
#: with other companies must not wait for them, so they have their own slots.
SLOW_AT_ONCE: Final = 128

#: The outcome of an account whose due date has passed.
_LAPSED: Final = Outcome(name=PaymentOutcome.EXPIRED, reason=Reason(Cause.NO_DEPOSIT))


class PaymentSettlement(PaymentUseCase):
    """Takes over payments whose process is gone."""

    def __init__(
        self,
        systems: PaymentSystems,
        resolver: PaymentResolver,
        absence: Absence,
    ) -> None:
        super().__init__(systems)
        self._resolver = resolver
        self._absence = absence
        self._look_ups = asyncio.Semaphore(LOOK_UPS_AT_ONCE)
        self._slow = asyncio.Semaphore(SLOW_AT_ONCE)

    async def settle(self, order_id: str, *, order: Reservation | None = None) -> Status | None:
        """Settle one CONFIRMING order whose lease has expired; None while it is undecided.

        Args:
            order_id: its id.
            order: the order, if it was just read.
        """
        if tracing.tracer is None:
            return await self._settle(order_id, order)
        with tracing.tracer.root("settle", order=order_id):
            return await self._settle(order_id, order)

    async def _settle(self, order_id: str, order: Reservation | None) -> Status | None:
        async with self._look_ups:
            taken = await self._take_over(order_id, order)
        return await self._conclude(*taken) if taken is not None else None

    async def settle_now(self, order_id: str) -> bool:
        """Look a CONFIRMING order up without waiting for the end of a pause, and settle it.

        Returns:
            Whether it was looked up; false while another process may be calling the PG for it.
        """
        async with self._look_ups:
            taken = await self._take_over(order_id, None, during_pause=True)
        if taken is None:
            return False
        await self._conclude(*taken)
        return True

    async def _conclude(self, case: PaymentAttempt, answer: Answer) -> Status | None:
        status = await self._decide(case, answer)
        SETTLED.labels(status.value if status else "undecided").inc()
        if status is None:
            await self._postpone(case)
        return status

    async def _take_over(
        self, order_id: str, order: Reservation | None, *, during_pause: bool = False
    ) -> tuple[PaymentAttempt, Answer] | None:
        """Take over a payment whose lease has expired, and query the PG; None if not available."""
        order = order or await self._store.read(order_id)
        if order is None or order.status is not Status.CONFIRMING or not order.payment_key:
            return None
        if not during_pause and await self._store.is_leased(order):
            # The webhook of a payment comes while its confirm is in progress: not worth a query.
            return None
        known = await self._catalog.get(order.sale_id)
        lease_ends_at = self._clock.monotonic() + self._limits.lease_ms / 1000
        claimed = await self._store.take_over(
            order,
            epoch=known.epoch,
            lease_ms=self._limits.lease_ms,
            known_fence=await self._sql.intents.known_fence(order_id),
            during_pause=during_pause,
        )
        reach("settle:after_take_over", order_id)
        if isinstance(claimed, LeaseElsewhere):
            return None
        case = PaymentAttempt(
            order, known, claimed.fence, order.payment_key, claimed.claim_id, lease_ends_at
        )
        answer = await self._gateway.look_up(case.payment_key)
        reach("settle:after_look_up", order_id)
        return case, answer

    async def _decide(self, case: PaymentAttempt, answer: Answer) -> Status | None:
        verdict = decide(
            answer,
            order=case.order,
            payment_key=case.payment_key,
            asked=AnswerTo.LOOK_UP,
            virtual_accounts=case.known.sale.virtual_accounts,
        )
        age_ms = self._age_ms(case.order)
        may_confirm = age_ms < self._limits.confirm_again_seconds * 1000
        closed = age_ms >= self._limits.window_closed_seconds * 1000
        foreign = _of_another_order(answer, case)
        absent = AbsentPayment(case.order.order_id, case.payment_key)
        if foreign and closed and await self._absence.shows_no_money(absent):
            return await self._expire(case)
        if not isinstance(verdict, Unapproved) and not (foreign and may_confirm):
            return await self._run_slow_step(
                lambda: self._resolver.resolve(case, answer, AnswerTo.LOOK_UP),
                at_once=not isinstance(verdict, CancelFirst),
            )
        await self._resolver.remember(
            case.order.order_id, case.payment_key, AnswerKind.LOOK_UP, answer
        )
        if may_confirm:
            # If the payment is another order's, the PG refuses it, which voids the attempt.
            unapproved = isinstance(verdict, Unapproved) and not verdict.missing
            return await self._run_slow_step(
                lambda: self._confirm_again(case, unapproved=unapproved)
            )
        missing = isinstance(verdict, Unapproved) and verdict.missing
        if closed and missing and await self._absence.is_proven(absent):
            return await self._expire(case)
        return None

    async def _run_slow_step(
        self, step: Callable[[], Awaitable[Status | None]], *, at_once: bool = False
    ) -> Status | None:
        """Run a step that may hang at the PG for a minute; None if too many do: a retry follows."""
        if at_once:
            return await step()
        if self._slow.locked():
            return None
        async with self._slow:
            return await step()

    def _age_ms(self, order: Reservation) -> int:
        return self._clock.now_ms() - (order.claimed_at_ms or order.updated_at_ms)

    async def _confirm_again(self, case: PaymentAttempt, *, unapproved: bool) -> Status | None:
        try:
            intents = await self._sql.intents.list_by_order(case.order.order_id)
            bound = await self._sql.payments.count_bound_confirms(
                case.order.order_id, case.payment_key
            )
            # Another idempotency key only if the PG itself shows that no money moved.
            key = confirm_key(case.payment_key, bound if unapproved else 0)
            outcome = await self._sql.intents.add(
                case.intent(idempotency_key=key, now_ms=self._clock.now_ms())
            )
        except (SQLAlchemyError, OSError) as error:
            log.warning(
                "settle_deferred_without_sql", order_id=case.order.order_id, reason=str(error)
            )
            return None
        if outcome not in (IntentOutcome.WRITTEN, IntentOutcome.ALREADY_WRITTEN):
            return None
        reach("settle:after_intent", case.order.order_id)
        earlier = any(
            intent.kind == "intent" and intent.payment_key == case.payment_key for intent in intents
        )
        if not self._resolver.lease_suffices(case):
            return None
        answer = await self._gateway.confirm(
            payment_key=case.payment_key,
            order_id=case.order.order_id,
            amount=case.order.amount,
            idempotency_key=key,
        )
        asked = AnswerTo.LATER_CONFIRM if earlier else AnswerTo.FIRST_CONFIRM
        return await self._resolver.resolve(case, answer, asked)

    async def _expire(self, case: PaymentAttempt) -> Status | None:
        """No money can come any more: bar every process that may still wake up, then expire."""
        try:
            barred = await self._bar_all(case)
        except (SQLAlchemyError, OSError) as error:
            log.warning(
                "settle_deferred_without_sql", order_id=case.order.order_id, reason=str(error)
            )
            return None
        if not barred:
            return None
        outcome = Outcome(name=PaymentOutcome.EXPIRED, reason=Reason(Cause.NEVER_APPROVED))
        return await self._resolver.finish(case, outcome, None)

    async def _bar_all(self, case: PaymentAttempt) -> bool:
        """Void every fence up to the case's own; false if a confirm may be in flight.

        The confirm of an existing intent may have been sent, perhaps since the lookup. That call is
        over one lease after its intent.
        """
        order_id, now_ms = case.order.order_id, self._clock.now_ms()
        outcomes = [
            await self._sql.intents.void(
                order_id=order_id, sale_id=case.order.sale_id, fence=fence, now_ms=now_ms
            )
            for fence in range(1, case.fence + 1)
        ]
        if VoidOutcome.INTENT_EXISTS not in outcomes:
            return True
        over_ms = now_ms - self._limits.lease_ms
        intents = await self._sql.intents.list_by_order(order_id)
        return all(intent.kind != "intent" or intent.created_at_ms <= over_ms for intent in intents)

    async def _postpone(self, case: PaymentAttempt) -> None:
        age_ms = self._age_ms(case.order)
        if age_ms >= self._limits.alarm_seconds * 1000:
            alarm(
                Alarm.PAYMENT_UNDECIDED, order_id=case.order.order_id, minutes=age_ms // _MINUTE_MS
            )
        least, most = self._limits.pause_least_seconds, self._limits.pause_most_seconds
        pause_ms = round(min(most * 1000, max(least * 1000, age_ms / PAUSE_SHARE)))
        await self._store.pause_lease(
            case.order, epoch=case.known.epoch, fence=case.fence, lease_ms=pause_ms
        )

    async def deposit(self, order_id: str) -> Status | None:
        """Close an account whose deposit is overdue; CONFIRMED if the deposit came after all.

        An account that the PG provably no longer has, has ended as well: its bank closed it at
        the due date. Late money goes back, as for each end that no answer of the PG proves.
        """
        order = await self._store.read(order_id)
        if order is None or order.status is not Status.AWAITING_DEPOSIT or not order.payment_key:
            return None
        known = await self._catalog.get(order.sale_id)
        case = PaymentAttempt(order, known, order.fence, order.payment_key)
        _, status = await self._look_at_account(case, _LAPSED, "no deposit came in time")
        overdue_ms = self._clock.now_ms() - order.expires_at_ms
        if status is None and overdue_ms >= self._limits.alarm_seconds * 1000:
            alarm(Alarm.PAYMENT_UNDECIDED, order_id=order_id, minutes=overdue_ms // _MINUTE_MS)
        return status

    async def release_account(self, order: Reservation, reason: Reason) -> Status | None:
        """Cancel the account of an AWAITING_DEPOSIT order; CONFIRMED if it was paid meanwhile.

        Args:
            order: as just read.
            reason: of its release.

        Returns:
            The order's status now; None while the PG shows neither an end nor the deposit.
        """
        case = await self._account_case(order)
        outcome = Outcome(name=PaymentOutcome.DECLINED, reason=reason)
        _, status = await self._look_at_account(case, outcome, "the reservation was released")
        return status

    async def look_at_account(self, order: Reservation) -> bool:
        """Look the account of an AWAITING_DEPOSIT order up, and act on what the PG shows.

        An open account stays open until its due date.

        Returns:
            Whether the PG answered.
        """
        case = await self._account_case(order)
        overdue = self._clock.now_ms() >= order.expires_at_ms
        answered, _ = await self._look_at_account(
            case, _LAPSED if overdue else None, "no deposit came in time"
        )
        return answered

    async def _account_case(self, order: Reservation) -> PaymentAttempt:
        known = await self._catalog.get(order.sale_id)
        return PaymentAttempt(order, known, order.fence, order.payment_key or "")

    async def _look_at_account(
        self, case: PaymentAttempt, end: Outcome | None, why: str
    ) -> tuple[bool, Status | None]:
        """Look an account up, and end it if it is still open.

        Args:
            case: the account's payment.
            end: the outcome of an open account once it is cancelled; None leaves it open.
            why: for the PG's records.

        Returns:
            Whether the PG answered, and the order's status now; None while it is undecided.
        """
        async with self._look_ups:
            answer = await self._gateway.look_up(case.payment_key)
        reach("request:after_look_up", case.order.order_id)
        answered = isinstance(answer, Answered | PaymentMissing)
        return answered, await self._act_on_account(case, answer, end, why)

    async def _act_on_account(
        self, case: PaymentAttempt, answer: Answer, end: Outcome | None, why: str
    ) -> Status | None:
        waiting = (
            isinstance(answer, Answered)
            and answer.payment.status == PaymentStatus.WAITING_FOR_DEPOSIT
        )
        if isinstance(answer, PaymentMissing) and await self._is_gone(case):
            outcome = Outcome(name=PaymentOutcome.EXPIRED, reason=Reason(Cause.PAYMENT_NOT_FOUND))
            return await self._resolver.finish(case, outcome, answer)
        if not waiting:
            return await self._resolver.resolve(case, answer, AnswerTo.LOOK_UP)
        # It contradicts the 404s before it.
        await self._resolver.remember(
            case.order.order_id, case.payment_key, AnswerKind.LOOK_UP, answer
        )
        if end is None:
            return None
        return await self._run_slow_step(lambda: self._resolver.cancel(case, end, why))

    async def _is_gone(self, case: PaymentAttempt) -> bool:
        """Whether no deposit can come any more into an account that the PG does not have."""
        overdue_ms = self._clock.now_ms() - case.order.expires_at_ms
        if overdue_ms < self._limits.window_closed_seconds * 1000:
            return False
        absent = AbsentPayment(case.order.order_id, case.payment_key, was_shown=True)
        return await self._absence.is_proven(absent)


def _of_another_order(answer: Answer, case: PaymentAttempt) -> bool:
    """Whether the payment is another order's: it can never pay for this one."""
    return isinstance(answer, Answered) and answer.payment.order_id != case.order.order_id
