"""Confirmation of a payment: claim the hold, write the intent, confirm at the PG, finish.

    prepare --> PG's page --> success URL
                                |  token and amount are ours?      no: refused, nothing happens
                                v
                              claim      CONFIRMING: no deadline can take the hold any more
                                v
                              intent     in SQL, committed: from here on a crash leaves a trace
                                v
                              confirm    at the PG: the one call that moves money
                                v
                              finish     CONFIRMED, AWAITING_DEPOSIT or RELEASED

A process may crash between any two steps; the settler resumes from there.
"""

import asyncio
import math
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.payment_intents import IntentOutcome
from reservation.application.payments.attempt import PaymentAttempt, attempt_answer
from reservation.application.payments.resolve import PaymentResolver
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.application.readiness.data_loss import DataLossDetector
from reservation.application.reservations.acknowledged_reads import AcknowledgedReads
from reservation.application.sales.catalog import CachedSale
from reservation.domain.errors import (
    InvalidToken,
    RateLimited,
    ReservationError,
    SaleRecovering,
    Unavailable,
)
from reservation.domain.idempotency_keys import confirm_key
from reservation.domain.payment import (
    Attempt,
    Cause,
    ClaimLost,
    Outcome,
    PaymentOutcome,
    Present,
    Reason,
)
from reservation.domain.payment_gateway import Answer
from reservation.domain.payment_rules import AnswerTo
from reservation.domain.rate_limit import Limiter, Rate
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.failpoints import reach
from reservation.telemetry import tracing

__all__ = ["PaymentConfirmation"]

log = structlog.get_logger(__name__)

#: An attempt without a trace in an order in one of these was given up before the call, or was lost.
_NOT_BEGUN: Final = (Status.HELD, Status.PREPARED, Status.EXPIRED, Status.RELEASED)
_NOT_STARTED: Final = "The payment could not be started; reload this page."
#: An earlier confirm of this payment may have been sent; only SQL shows it.
_STATE_UNAVAILABLE: Final = "The payment's state is temporarily unavailable; reload this page."
#: A hold of the backup may have ended after it, and its units may be sold.
_RESTORED: Final = "The service is being restored; reload this page later."
RESTORED_RETRY_SECONDS: Final = 5
#: How often a retry of the success URL polls for the outcome of the first one.
POLL_SECONDS: Final = 0.1
#: At shutdown: grace period of confirms in flight; the settler takes over the rest.
SHUTDOWN_SECONDS: Final = 2.0
#: At shutdown: how long the buyers' requests still wait, within the server's grace of 3 s. Most
#: confirms take less than a second.
LAST_ANSWER_SECONDS: Final = 1.5
#: At shutdown: time-out of moving the lease of a cancelled confirm.
MOVE_SECONDS_MAX: Final = 0.5
#: Attempts of one buyer, in one process, with payments that can never be the order's: made-up keys,
#: another order's, another amount. Each costs the PG three calls and SQL five rows.
VOIDS_PER_BUYER: Final = Rate(count=10, per_seconds=3600)


class PaymentConfirmation(PaymentUseCase):
    """Confirms payments, each in its own task that outlives the buyer's request."""

    def __init__(
        self,
        systems: PaymentSystems,
        resolver: PaymentResolver,
        data_loss: DataLossDetector,
    ) -> None:
        super().__init__(systems)
        self._resolver = resolver
        self._data_loss = data_loss
        self._reads = AcknowledgedReads(systems.catalog, systems.store, systems.sql)
        self._voids = Limiter(VOIDS_PER_BUYER)
        self._under_way: dict[tuple[str, str], asyncio.Task[None]] = {}
        #: Those of them whose intent is in SQL.
        self._requested: set[tuple[str, str]] = set()
        #: Resolved at shutdown, when the waiting requests must be answered.
        self._ending: asyncio.Future[None] | None = None

    async def confirm(
        self, order: Reservation, *, payment_key: str, may_claim: bool
    ) -> Reservation:
        """Take one payment attempt to its outcome, or to CONFIRMING while the outcome is unknown.

        Args:
            order: the reservation that the return token names, its amount checked by the caller.
            payment_key: the PG's id of this attempt.
            may_claim: false if the token may only read the outcome of an earlier attempt.

        Raises:
            PaymentDeclined, ReservationExpired, SoldOut, BuyerLimitExceeded: no money was taken.
            InvalidToken: the payment belongs to another order.
            Unavailable: no money was requested; the same URL may be loaded again.
        """
        try:
            known = await self._catalog.get(order.sale_id)
        except SaleRecovering as refusal:
            return await self._as_settling_or_raise(order, refusal)
        if payment_key in order.attempts:
            return await self._acknowledged(order, payment_key)
        if not may_claim:
            if order.payment_key != payment_key:
                raise InvalidToken
            return await self._known_or_settling(order, payment_key)
        if tracing.tracer is not None:
            tracing.tracer.note(order=order.order_id)
        key = (order.order_id, payment_key)
        task = self._under_way.get(key)
        if task is None:
            if self._data_loss.restore_pending and order.status in _NOT_BEGUN:
                refusal = Unavailable(_RESTORED, retryAfter=RESTORED_RETRY_SECONDS)
                return await self._as_settling_or_raise(order, refusal)
            if order.status in _NOT_BEGUN:
                self._limit_voids(order.buyer_id)
            task = asyncio.create_task(self._pay(order, known, payment_key))
            self._under_way[key] = task
            task.add_done_callback(lambda done: self._done(key, done))
        give_up_at = self._clock.monotonic() + self._limits.answer_seconds
        ending = self._end()
        await asyncio.wait(
            {task, ending},
            timeout=self._limits.answer_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        try:
            if task.done():
                task.result()
            found = await self._outcome(order, payment_key, give_up_at)
        except InvalidToken:
            raise
        except (ReservationError, StoreUnavailable, StoreUncertain) as refusal:
            return await self._as_settling_or_raise(order, refusal)
        return await self._known_or_settling(found, payment_key)

    def is_requested(self, order_id: str, payment_key: str) -> bool:
        """Whether this process is confirming this payment, and SQL has its intent."""
        return (order_id, payment_key) in self._requested

    def _limit_voids(self, buyer_id: str) -> None:
        """Rate-limit a buyer whose recent attempts were void.

        Raises:
            RateLimited: too many void attempts; each costs the PG three calls.
        """
        wait = self._voids.peek(buyer_id, self._clock.monotonic())
        if wait:
            raise RateLimited(
                "Too many invalid payments of this buyer.", retryAfter=math.ceil(wait)
            )

    async def _known_or_settling(self, order: Reservation, payment_key: str) -> Reservation:
        """The order as the answer to this attempt, if Redis has the state of the attempt."""
        known = payment_key in order.attempts or order.status not in _NOT_BEGUN
        if known:
            return await self._acknowledged(order, payment_key)
        if (order.order_id, payment_key) in self._under_way:
            # Still not claimed after the time-out: the attempt continues in its own task.
            return msgspec.structs.replace(order, status=Status.CONFIRMING)
        refusal = Unavailable(_NOT_STARTED, retryAfter=1)
        return await self._as_settling_or_raise(order, refusal)

    async def _acknowledged(self, order: Reservation, payment_key: str) -> Reservation:
        """The answer to this attempt, once enough replicas have it; until then, CONFIRMING.

        Raises:
            The refusals of `attempt_answer`.
            Unavailable: the attempt is missing in the state that the replicas have.
        """
        if order.status is Status.CONFIRMING:
            return attempt_answer(order, payment_key)
        try:
            found = await self._reads.state(order)
        except (StoreUnavailable, StoreUncertain) as error:
            log.info("outcome_unacknowledged", order_id=order.order_id, reason=str(error))
            return msgspec.structs.replace(order, status=Status.CONFIRMING)
        if payment_key not in found.attempts and found.status in _NOT_BEGUN:
            raise Unavailable(_STATE_UNAVAILABLE, retryAfter=1)
        return attempt_answer(found, payment_key)

    async def _as_settling_or_raise(self, order: Reservation, refusal: Exception) -> Reservation:
        """The order as CONFIRMING, if a confirm may have been sent.

        Raises:
            The refusal: SQL has no intent of this order without an end: no money was requested.
            Unavailable: SQL does not answer.
        """
        try:
            settling = await self._data_loss.settling(order)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable(_STATE_UNAVAILABLE, retryAfter=1) from error
        if settling is None:
            raise refusal
        return settling

    def stop_waiting(self) -> None:
        """On shutdown: answer each waiting request soon, as after its time-out."""
        ending = self._end()
        asyncio.get_running_loop().call_later(
            LAST_ANSWER_SECONDS, lambda: ending.done() or ending.set_result(None)
        )

    def _end(self) -> asyncio.Future[None]:
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_future()
        return self._ending

    async def aclose(self) -> None:
        """Wait a moment for the confirms in flight; the settler takes over the rest."""
        tasks = list(self._under_way.values())
        if not tasks:
            return
        _, pending = await asyncio.wait(tasks, timeout=SHUTDOWN_SECONDS)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    def _done(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        self._under_way.pop(key, None)
        self._requested.discard(key)
        if not task.cancelled() and (error := task.exception()):
            # Each waiting request raises it as well; without one it must still be logged.
            log.info("confirm_refused", order_id=key[0], reason=type(error).__name__)

    async def _outcome(
        self, order: Reservation, payment_key: str, give_up_at: float
    ) -> Reservation:
        """The order once the attempt is decided; waits if another process has the attempt."""
        while True:
            found = await self._store.read(order.order_id) or order
            undecided = found.status is Status.CONFIRMING and payment_key not in found.attempts
            over = self._clock.monotonic() >= give_up_at or self._end().done()
            if not undecided or over:
                return found
            if (order.order_id, payment_key) not in self._under_way and (
                found.payment_key != payment_key
            ):
                return found
            await asyncio.sleep(POLL_SECONDS)

    async def _pay(self, order: Reservation, known: CachedSale, payment_key: str) -> None:
        lease_ends_at = self._clock.monotonic() + self._limits.lease_ms / 1000
        self._store.require_acks(order.sale_id)
        reach("confirm:before_claim", order.order_id)
        claimed = await self._store.claim(
            order,
            epoch=known.epoch,
            payment_key=payment_key,
            lease_ms=self._limits.lease_ms,
            known_fence=await self._known_fence(order.order_id),
        )
        reach("confirm:after_claim", order.order_id)
        if isinstance(claimed, Present):
            return
        case = PaymentAttempt(
            order, known, claimed.fence, payment_key, claimed.claim_id, lease_ends_at
        )
        if not claimed.is_acknowledged:
            await self._give_up_claim(case)
            found = await self._store.read(order.order_id)
            if found and found.status is Status.CONFIRMING and found.fence == case.fence:
                # The settler may confirm it after its lease.
                return
            raise Unavailable(_NOT_STARTED, retryAfter=1)
        try:
            await self._ask(case)
        except asyncio.CancelledError:
            # Shutdown: the settler need not wait for a lease without an owner.
            await self._give_up_lease(case)
            raise

    async def _give_up_claim(self, case: PaymentAttempt) -> None:
        """Void a claim that too few replicas have; without an intent no payment can be requested.

        If the claim remains nevertheless, the settler ends it after its lease.
        """
        try:
            await self._void(case, Cause.INTENT_NOT_WRITTEN)
        except (ReservationError, StoreUnavailable, StoreUncertain, ClaimLost) as error:
            log.info("claim_given_up", order_id=case.order.order_id, reason=type(error).__name__)

    async def _give_up_lease(self, case: PaymentAttempt) -> None:
        try:
            async with asyncio.timeout(MOVE_SECONDS_MAX):
                await self._move_lease(case, self._limits.cut_short_seconds)
        except (ReservationError, StoreUnavailable, StoreUncertain, TimeoutError) as error:
            log.warning(
                "lease_move_failed", order_id=case.order.order_id, reason=type(error).__name__
            )

    async def _move_lease(self, case: PaymentAttempt, seconds: float) -> None:
        await self._store.move_lease(
            case.order, epoch=case.known.epoch, fence=case.fence, lease_ms=round(seconds * 1000)
        )

    async def _ask(self, case: PaymentAttempt) -> None:
        """Write the intent, confirm at the PG and record the outcome."""
        order = case.order
        written = await self._write_intent(case)
        if written is None:
            return
        self._requested.add((order.order_id, case.payment_key))
        reach("confirm:after_intent", order.order_id)
        asked = await self._confirm_kind(case, written)
        if not self._resolver.lease_suffices(case):
            return
        reach("confirm:before_call", order.order_id)
        answer = await self._gateway.confirm(
            payment_key=case.payment_key,
            order_id=order.order_id,
            amount=order.amount,
            idempotency_key=confirm_key(case.payment_key, 0),
        )
        reach("confirm:after_call", order.order_id)
        await self._execute(case, answer, asked)

    async def _execute(self, case: PaymentAttempt, answer: Answer, asked: AnswerTo) -> None:
        """Carry out the answer, or leave the payment to the settler.

        The money may have moved: a refusal by Redis from here on must not reach the buyer.
        """
        try:
            status = await self._resolver.resolve(case, answer, asked)
            if status in (Status.HELD, Status.PREPARED, Status.EXPIRED):
                await self._count_void(case)
            if status is None:
                await self._move_lease(case, self._limits.hand_over_seconds)
        except (ReservationError, StoreUnavailable, StoreUncertain) as error:
            log.warning(
                "confirm_deferred_to_settler",
                order_id=case.order.order_id,
                reason=str(error) or type(error).__name__,
            )

    async def _count_void(self, case: PaymentAttempt) -> None:
        """Count a void attempt against its buyer."""
        found = await self._store.read(case.order.order_id)
        text = found.attempts.get(case.payment_key, "") if found else ""
        if Attempt.read(text).outcome == PaymentOutcome.VOIDED:
            self._voids.wait(case.order.buyer_id, self._clock.monotonic())

    async def _known_fence(self, order_id: str) -> int:
        try:
            return await self._sql.intents.known_fence(order_id)
        except (SQLAlchemyError, OSError) as error:
            log.warning("fence_read_failed", order_id=order_id, reason=str(error))
            raise Unavailable(_STATE_UNAVAILABLE, retryAfter=1) from error

    async def _write_intent(self, case: PaymentAttempt) -> IntentOutcome | None:
        """Commit the intent to SQL; None if no money may be requested."""
        try:
            outcome = await self._sql.intents.add(
                case.intent(
                    idempotency_key=confirm_key(case.payment_key, 0), now_ms=self._clock.now_ms()
                )
            )
        except (SQLAlchemyError, OSError) as error:
            log.warning("intent_not_written", order_id=case.order.order_id, reason=str(error))
            # Whether the row was written or not: void it in Redis, and no call is sent under it.
            await self._void(case, Cause.INTENT_NOT_WRITTEN)
            raise Unavailable(_NOT_STARTED, retryAfter=1) from error
        match outcome:
            case IntentOutcome.WRITTEN | IntentOutcome.ALREADY_WRITTEN:
                return outcome
            case IntentOutcome.VOIDED:
                return None
            case IntentOutcome.FENCE_OF_ANOTHER_KEY:
                reason = f"order {case.order.order_id} lost the claim of fence {case.fence}"
                self._data_loss.report(case.order.sale_id, case.known.epoch, reason)
                return None
            case IntentOutcome.KEY_OF_ANOTHER_ORDER:
                await self._void(case, Cause.KEY_OF_ANOTHER_ORDER)
                self._voids.wait(case.order.buyer_id, self._clock.monotonic())
                raise InvalidToken("This payment belongs to another order.")

    async def _confirm_kind(self, case: PaymentAttempt, written: IntentOutcome) -> AnswerTo:
        """Whether an earlier confirm of this key may have been sent: each one has its intent."""
        if written is IntentOutcome.ALREADY_WRITTEN:
            return AnswerTo.LATER_CONFIRM
        if case.fence == 1:
            return AnswerTo.FIRST_CONFIRM
        try:
            intents = await self._sql.intents.list_by_order(case.order.order_id)
        except (SQLAlchemyError, OSError) as error:
            # Unknown counts as a later one: a decline will be verified by a lookup.
            log.warning("intents_read_failed", order_id=case.order.order_id, reason=str(error))
            return AnswerTo.LATER_CONFIRM
        earlier = any(
            intent.payment_key == case.payment_key and intent.fence < case.fence
            for intent in intents
            if intent.kind == "intent"
        )
        return AnswerTo.LATER_CONFIRM if earlier else AnswerTo.FIRST_CONFIRM

    async def _void(self, case: PaymentAttempt, cause: Cause) -> None:
        await self._store.finish(
            case.order,
            epoch=case.known.epoch,
            fence=case.fence,
            outcome=Outcome(name=PaymentOutcome.VOIDED, reason=Reason(cause)),
            payment_key=case.payment_key,
            claim_id=case.claim_id,
        )
