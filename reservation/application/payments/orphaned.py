"""Orphaned payments: requested under a claim that Redis lost.

The intent is in SQL before the call to the PG. If a rebuild cannot assign the payment to its order
again, because the stock is gone or the order has another payment by now, it cannot be served: the
PG is polled until the outcome is known, and the money goes back.

A later rebuild may place the payment after all, while this process waits for the PG. It writes the
intent again before the sale can sell, so a bar (`PaymentResolver.bar`) is either refused then, or
seen by the settler, which cancels the payment instead of selling it.
"""

import asyncio
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.payment_intents import UnmetIntent
from reservation.application.payments.absence import Absence, AbsentPayment
from reservation.application.payments.resolve import AnswerKind, PaymentResolver
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.application.readiness.data_loss import DataLossDetector, is_under_way
from reservation.domain.alarms import Alarm
from reservation.domain.errors import SaleRecovering
from reservation.domain.payment_gateway import (
    ENDED_PAYMENT,
    OPEN_PAYMENT,
    Answered,
    Payment,
    PaymentMissing,
    PaymentStatus,
)
from reservation.domain.payment_rules import is_fully_cancelled
from reservation.domain.states import Status
from reservation.telemetry.metrics import alarm

__all__ = ["OrphanedPayments"]

log = structlog.get_logger(__name__)

#: Authenticated and never confirmed: it ends by itself once its window has closed.
_UNAPPROVED: Final = (PaymentStatus.READY, PaymentStatus.IN_PROGRESS)
#: An order in one of these was sold for its payment.
_SOLD: Final = (Status.AWAITING_DEPOSIT, Status.CONFIRMED, Status.REFUNDED)

#: Orphaned payments that are handled at the same time.
AT_ONCE: Final = 8
#: Age of an intent without an end at which its order is checked.
UNMET_SECONDS: Final = 10.0


class _Backoff(msgspec.Struct, frozen=True):
    """The next check, by a monotonic clock, and the back-off before it."""

    at: float
    pause: float


class OrphanedPayments(PaymentUseCase):
    """Finds orphaned payments and gives their money back."""

    def __init__(
        self,
        systems: PaymentSystems,
        resolver: PaymentResolver,
        data_loss: DataLossDetector,
        absence: Absence,
    ) -> None:
        super().__init__(systems)
        self._resolver = resolver
        self._data_loss = data_loss
        self._absence = absence
        self._backoffs: dict[tuple[str, str], _Backoff] = {}
        #: When to read all intents without an end again. Nearly all of them are met, and while the
        #: flusher is stopped each payment has one; in between, only new ones are read.
        self._next_full_scan: _Backoff | None = None
        self._read_until_ms = 0

    async def run_once(self) -> int:
        """One round over all sales; how many payments were checked.

        An intent whose claim is missing in Redis is a loss, and closes its sale.
        """
        now, before_ms = self._clock.monotonic(), self._clock.now_ms() - round(UNMET_SECONDS * 1000)
        full_scan = self._next_full_scan is None or self._next_full_scan.at <= now
        since_ms = None if full_scan else self._read_until_ms
        intents = await self._sql.intents.list_unmet(since_ms=since_ms, before_ms=before_ms)
        epochs = await self._sql.sales.epochs() if intents else {}
        due: list[UnmetIntent] = []
        backoffs: dict[tuple[str, str], _Backoff] = {} if full_scan else self._backoffs.copy()
        for intent, order in await self._data_loss.with_orders(intents, self._store):
            epoch = epochs.get(intent.sale_id, "")
            if self._data_loss.report_unmet(intent, order, epoch) or is_under_way(intent, order):
                continue
            name = (intent.order_id, intent.payment_key)
            backoff = self._backoffs.get(name)
            if backoff is None or backoff.at <= now:
                due.append(intent)
                backoff = self._next_backoff(backoff, now)
            backoffs[name] = backoff
        self._backoffs, self._read_until_ms = backoffs, before_ms
        if full_scan or due:
            self._next_full_scan = self._next_backoff(None if due else self._next_full_scan, now)
        await self.resolve_all(due)
        return len(due)

    def _next_backoff(self, before: _Backoff | None, now: float) -> _Backoff:
        least, most = self._limits.pause_least_seconds, self._limits.pause_most_seconds
        pause = min(most, 2 * before.pause) if before else least
        return _Backoff(now + pause, pause)

    async def of(self, sale_id: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Check the sale's orphaned payments; returns the same as `resolve_all`."""
        intents = await self._sql.intents.list_unmet(sale_id)
        found = await self._data_loss.with_orders(intents, self._store)
        return await self.resolve_all(
            [intent for intent, order in found if not is_under_way(intent, order)]
        )

    async def resolve_all(
        self, intents: list[UnmetIntent]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Give the payments' money back; the orders that got it, and those still undecided."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def resolve_one(intent: UnmetIntent) -> bool | None:
            async with slots:
                return await self._resolve_one(intent)

        # Side by side: a call to the PG that hangs delays none of the others.
        decided = await asyncio.gather(*(resolve_one(intent) for intent in intents))
        by_order = [
            (intent.order_id, ended) for intent, ended in zip(intents, decided, strict=True)
        ]
        return (
            tuple(order_id for order_id, ended in by_order if ended),
            tuple(order_id for order_id, ended in by_order if ended is None),
        )

    async def _resolve_one(self, intent: UnmetIntent) -> bool | None:
        """Whether money was refunded; None while the payment is orphaned and undecided."""
        try:
            if not await self._is_orphaned(intent):
                return False
            decided = await self._resolve(intent)
            if decided is None and not await self._is_orphaned(intent):
                # A rebuild has claimed it meanwhile, or its sale has another loss.
                return False
        except (StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError) as error:
            log.warning("orphaned_payment_deferred", order_id=intent.order_id, reason=str(error))
            decided = None
        if decided is None:
            alarm(Alarm.PAYMENT_WITHOUT_ORDER, order_id=intent.order_id)
        return decided

    async def _is_orphaned(self, intent: UnmetIntent) -> bool:
        """Whether the order lacks this payment in a state of Redis that is whole.

        A rebuild gives SQL its epoch first and restores the orders afterwards. Until it hands the
        sale over, a missing order says nothing about the payment: the rebuild may claim it again.
        The order is therefore read between two comparisons that find the same epoch.
        """
        before = await self._data_loss.whole_epoch(intent.sale_id)
        if before is None:
            return False
        try:
            order = await self._store.read(intent.order_id)
        except SaleRecovering:
            return False
        if is_under_way(intent, order):
            return False
        return await self._data_loss.whole_epoch(intent.sale_id) == before

    async def _resolve(self, intent: UnmetIntent) -> bool | None:
        """Whether money was refunded; None while the outcome is unknown."""
        decided = await self._decide(intent)
        if decided is not None:
            now_ms = self._clock.now_ms()
            await self._sql.intents.mark_ended(intent.order_id, intent.payment_key, now_ms)
        return decided

    async def _decide(self, intent: UnmetIntent) -> bool | None:
        order_id, payment_key = intent.order_id, intent.payment_key
        row = await self._sql.orders.get(order_id)
        if row is not None and row.payment_key == payment_key and row.status in _SOLD:
            return False
        kept = await self._sql.payments.get(payment_key)
        if kept is not None and kept.status in ENDED_PAYMENT:
            return False
        answer = await self._gateway.look_up(payment_key)
        await self._resolver.remember(order_id, payment_key, AnswerKind.LOOK_UP, answer)
        absent = AbsentPayment(order_id, payment_key)
        match answer:
            case Answered(payment) if (payment.order_id, payment.payment_key) == (
                order_id,
                payment_key,
            ):
                return await self._end(intent, payment)
            case Answered(payment) if payment.order_id != order_id:
                # Another order's payment. A single answer may be wrong: it ends this one only if
                # the PG shows no other payment of the order that has money.
                is_gone = self._is_closed(intent) and await self._absence.shows_no_money(absent)
            case PaymentMissing():
                absent = msgspec.structs.replace(absent, may_be_paid_otherwise=True)
                is_gone = self._is_closed(intent) and await self._absence.is_proven(absent)
            case _:
                return None
        return False if is_gone and await self._bar(intent) else None

    async def _end(self, intent: UnmetIntent, payment: Payment) -> bool | None:
        """Finish a payment that the PG shows, if it can be finished now."""
        if payment.status in ENDED_PAYMENT or is_fully_cancelled(payment):
            await self._resolver.store_payment(payment)
            return False
        if payment.status in _UNAPPROVED:
            return False if self._is_closed(intent) and await self._bar(intent) else None
        # A replay of the buyer's key makes the same order again: this payment must not sell it.
        if payment.status not in OPEN_PAYMENT or not await self._bar(intent):
            return None
        # An account without a deposit is closed too: a later deposit would have no order.
        cancelled = await self._resolver.cancel_at_pg(
            intent.order_id, intent.payment_key, "the reservation was lost"
        )
        if isinstance(cancelled, Answered) and is_fully_cancelled(cancelled.payment):
            await self._resolver.store_payment(cancelled.payment)
            return cancelled.payment.approved_at is not None
        return None

    def _is_closed(self, intent: UnmetIntent) -> bool:
        """Whether the PG accepts no further confirm of it."""
        age_ms = self._clock.now_ms() - intent.created_at_ms
        return age_ms >= self._limits.window_closed_seconds * 1000

    async def _bar(self, intent: UnmetIntent) -> bool:
        return await self._resolver.bar(
            intent.order_id, intent.sale_id, intent.fence, intent.payment_key
        )
