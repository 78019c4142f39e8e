"""Settler: takes over payments and deposits whose process is gone."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, Final

import structlog

from reservation.adapters.redis.pending_work import PendingWork
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.application.payments.settle import PaymentSettlement
from reservation.domain.clock import Clock
from reservation.domain.payment_timeouts import DEFAULT_LIMITS, PaymentTimeouts
from reservation.telemetry.metrics import UNDECIDED
from reservation.workers.loops import TRANSIENT
from reservation.workers.pauses import Pauses

__all__ = ["Settler"]

log = structlog.get_logger(__name__)

#: Orders of one sale in flight, for payments and for deposits each. `PaymentSettlement` bounds how
#: many of them call the PG at once.
RUNNING_MAX: Final = 200
#: Upper bound of the back-off of a payment whose lease has expired and that could not be settled:
#: its buyer is waiting.
PAYMENT_PAUSE_MAX: Final = 5.0


class _Running:
    """Orders in flight, each in its own task."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._failures: list[BaseException] = []

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def order_ids(self) -> Collection[str]:
        """The orders in flight."""
        return self._tasks.keys()

    @property
    def is_busy(self) -> bool:
        """Whether an order is in flight, or its failure was not reported yet."""
        return bool(self._tasks or self._failures)

    def start(self, order_id: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks[order_id] = task
        task.add_done_callback(lambda done: self._end(order_id, done))

    def _end(self, order_id: str, task: asyncio.Task[None]) -> None:
        del self._tasks[order_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)

    def failed(self) -> list[BaseException]:
        """The errors of the tasks that ended since the last call."""
        failed, self._failures = self._failures, []
        return failed

    async def ended(self) -> None:
        """Wait for all tasks in flight."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))

    async def cancel(self) -> None:
        """Cancel all tasks and wait for them to end."""
        for task in self._tasks.values():
            task.cancel()
        await self.ended()


class Settler:
    """Settles due payments and deposits."""

    def __init__(
        self,
        store: ReservationStore,
        settlement: PaymentSettlement,
        *,
        clock: Clock,
        limits: PaymentTimeouts = DEFAULT_LIMITS,
    ) -> None:
        self._store = store
        self._settlement = settlement
        self._payments_running = defaultdict[str, _Running](_Running)
        self._accounts_running = defaultdict[str, _Running](_Running)
        #: Orders in CONFIRMING at the last tick of each sale, as the metric shows.
        self._undecided = defaultdict[str, int](int)
        least, most = limits.pause_least_seconds, limits.pause_most_seconds
        self._payments = defaultdict[str, Pauses](lambda: Pauses(clock, least, PAYMENT_PAUSE_MAX))
        self._accounts = defaultdict[str, Pauses](lambda: Pauses(clock, least, most))

    def has_work(self, sale_id: str, work: PendingWork, server_now_ms: int) -> bool:
        """Whether a sale needs a tick: for an order that may be due, or to end the last tick's."""
        return (
            work.lease_ms is not None
            or (work.deposit_ms is not None and work.deposit_ms <= server_now_ms)
            or self._undecided[sale_id] > 0
            or any(
                running.is_busy
                for running in (self._payments_running[sale_id], self._accounts_running[sale_id])
            )
        )

    def forget(self, sale_id: str) -> None:
        """Leave this sale to another worker; this one completes its orders in flight."""
        self._undecided.pop(sale_id, None)
        UNDECIDED.labels(sale_id).set(0)

    async def tick(self, sale_id: str) -> int:
        """Start the due orders that are not in flight; how many were started.

        It does not wait for those in flight: one payment that hangs at the PG delays no other.

        Raises:
            Exception: the error of the first damaged order that ended since the last tick.
        """
        taken = await self._start_due(sale_id)
        _raise_first(self._failures(sale_id))
        return taken

    async def _start_due(self, sale_id: str) -> int:
        payments, accounts = self._payments_running[sale_id], self._accounts_running[sale_id]
        taken = 0
        for running, over, pauses, settle in (
            (payments, self._store.leases_over, self._payments[sale_id], self._settlement.settle),
            (
                accounts,
                self._store.deposits_over,
                self._accounts[sale_id],
                self._settlement.deposit,
            ),
        ):
            room = RUNNING_MAX - len(running)
            due = await over(sale_id, RUNNING_MAX + len(pauses) + len(running))
            for order_id in pauses.take(due, room, busy=running.order_ids):
                running.start(order_id, self._settle_one(settle, order_id))
                taken += 1
        self._undecided[sale_id] = undecided = await self._store.undecided(sale_id)
        UNDECIDED.labels(sale_id).set(undecided)
        return taken

    def _failures(self, sale_id: str) -> list[BaseException]:
        payments, accounts = self._payments_running[sale_id], self._accounts_running[sale_id]
        return [*payments.failed(), *accounts.failed()]

    async def run_once(self, sale_id: str) -> int:
        """One tick that waits for every order in flight.

        Raises:
            Exception: the error of the first damaged order, after all the others.
        """
        taken = await self._start_due(sale_id)
        for running in (self._payments_running[sale_id], self._accounts_running[sale_id]):
            await running.ended()
        _raise_first(self._failures(sale_id))
        return taken

    async def aclose(self) -> None:
        """Cancel the orders in flight: another process takes them over when their leases end."""
        for running in (*self._payments_running.values(), *self._accounts_running.values()):
            await running.cancel()

    async def _settle_one(
        self, settlement: Callable[[str], Awaitable[object]], order_id: str
    ) -> None:
        """Settle one order; after a transient failure a later tick tries it again."""
        try:
            await settlement(order_id)
        except TRANSIENT as error:
            log.warning("settle_deferred", order_id=order_id, reason=str(error))
        except Exception:
            log.exception("settle_crashed", order_id=order_id)
            raise


def _raise_first(errors: Sequence[BaseException]) -> None:
    if errors:
        raise errors[0]
