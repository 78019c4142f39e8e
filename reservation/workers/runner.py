"""Worker process: runs the background loops; a round per sale, so that no sale delays another."""

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.adapters.redis.pending_work import PendingWork, PendingWorkReader
from reservation.adapters.sql.errors import reason_of
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.alarms import Alarm
from reservation.telemetry import start_notice
from reservation.telemetry.metrics import (
    FLUSHED,
    OUTBOX_AGE,
    OUTBOX_BACKLOG,
    WORKER_BEAT,
    WORKER_CLOCK_OFFSET,
    alarm,
    served,
)
from reservation.workers.flusher import Flusher
from reservation.workers.loops import forever
from reservation.workers.reaper import Reaper
from reservation.workers.refunder import Refunder
from reservation.workers.sale_rounds import TICK_SECONDS, RoundKind, SaleRounds
from reservation.workers.settler import Settler

__all__ = ["run"]

log = structlog.get_logger(__name__)

#: Poll interval for new sales.
SALES_SECONDS: Final = 0.5
#: Limit of the read of SQL's cursors, which delays the first rounds of new sales.
CURSORS_SECONDS_MAX: Final = 1.0
#: Pauses after an idle round.
REAP_SECONDS: Final = 0.5
SETTLE_SECONDS: Final = 0.5
FLUSH_SECONDS: Final = 0.1
REFUND_SECONDS: Final = 2.0
RECHECK_SECONDS: Final = 5.0
ORPHAN_SECONDS: Final = 2.0
CLOCK_SECONDS: Final = 5.0


async def run(settings: Settings) -> None:
    """Run reaper, settler, refunder and flusher until SIGTERM."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopped.set)
    with served(settings.host, settings.metrics_port):
        await _run_until(stopped, settings)


async def _run_until(stopped: asyncio.Event, settings: Settings) -> None:
    async with opened(settings, sql_may_be_away=True) as service:
        work = asyncio.create_task(Worker(service).run())
        start_notice.send()
        waiting = asyncio.create_task(stopped.wait())
        await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, waiting):
            task.cancel()
        await asyncio.gather(work, waiting, return_exceptions=True)
        if not stopped.is_set():
            work.result()


class Worker:
    """The loops of one process."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._reaper = Reaper(service.catalog, service.store)
        self._settler = Settler(service.store, service.settlement, clock=service.clock)
        self._refunder = Refunder(service.sql, service.refunds, clock=service.clock)
        self._flusher = Flusher(service.outbox, service.sql, on_alarm=alarm, on_flushed=FLUSHED.inc)
        self._heartbeat = Heartbeat(
            service.connections,
            service.keys,
            name=f"{socket.gethostname()}-{os.getpid()}",
            role="worker",
        )
        #: Whether the sales of earlier lives of this process were listed.
        self._listed = False
        self._expires = True
        self._rounds = SaleRounds(
            PendingWorkReader(service.connections, service.keys).read,
            (
                RoundKind(
                    name="reaper",
                    once=self._reap,
                    is_due=_has_overdue_hold,
                    pause=REAP_SECONDS,
                ),
                RoundKind(
                    name="settler",
                    once=self._settler.tick,
                    is_due=self._settler.has_work,
                    pause=SETTLE_SECONDS,
                ),
                RoundKind(
                    name="flusher",
                    once=self._flush,
                    is_due=self._has_unflushed,
                    pause=FLUSH_SECONDS,
                ),
            ),
            server_now_ms=service.connections.server_now_ms,
            ready=service.connections.until_vouched,
        )

    async def run(self) -> None:
        """Run all loops until cancelled; those that change sales wait for a vouched server."""
        self._service.connections.guard()
        try:
            await self._run()
        finally:
            await self._settler.aclose()
            await self._refunder.aclose()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._service.redis_monitor.run())
            group.create_task(
                forever("clock", self._measure_clock, CLOCK_SECONDS),
            )
            group.create_task(forever("beat", self._beat, self._heartbeat.every_seconds))
            self._begin(group, "heartbeat", self._heartbeat.beat, self._heartbeat.every_seconds)
            self._begin(group, "orphans", self._service.orphaned_payments.run_once, ORPHAN_SECONDS)
            self._begin(group, "rechecks", self._service.recheck.run_once, RECHECK_SECONDS)
            self._begin(group, "refunds", self._refunder.run_once, REFUND_SECONDS)
            self._begin(group, "sales", self._add_new_sales, SALES_SECONDS)
            self._begin(group, "looks", lambda: self._rounds.look(group), TICK_SECONDS)

    def _begin(
        self,
        group: asyncio.TaskGroup,
        name: str,
        once: Callable[[], Awaitable[int]],
        pause: float,
    ) -> None:
        ready = self._service.connections.until_vouched
        group.create_task(forever(name, once, pause, ready=ready))

    async def _beat(self) -> int:
        WORKER_BEAT.set_to_current_time()
        return 0

    async def _measure_clock(self) -> int:
        await self._service.readiness.measure_clocks()
        clocks = self._service.readiness.clocks
        WORKER_CLOCK_OFFSET.set(clocks.offset_ms / 1000)
        if clocks.may_expire != self._expires:
            self._expires = clocks.may_expire
            if self._expires:
                log.info("worker_clock_recovered")
            else:
                alarm(Alarm.WORKER_CLOCK, offset_ms=clocks.offset_ms, jumped=int(clocks.jumped))
        return 0

    async def _reap(self, sale_id: str) -> int:
        # A clock that jumped would expire holds before their deadline.
        if not self._service.readiness.clocks.may_expire:
            return 0
        return await self._reaper.run_once(sale_id)

    async def _add_new_sales(self) -> int:
        sale_ids = await self._service.sale_store.ids()
        new = [sale_id for sale_id in sale_ids if sale_id not in self._rounds]
        if new:
            await self._learn_cursors()
        for sale_id in new:
            self._rounds.add(sale_id, lively=self._listed)
        self._listed = True
        return 0

    async def _learn_cursors(self) -> None:
        try:
            async with asyncio.timeout(CURSORS_SECONDS_MAX):
                self._flusher.learn(await self._service.sql.events.cursors())
        except (SQLAlchemyError, OSError) as error:
            # Holds expire without SQL too; the flusher reads the cursor of each sale itself.
            log.warning("cursors_unread", reason=reason_of(error))

    def _has_unflushed(self, sale_id: str, work: PendingWork, _: int) -> bool:
        return self._flusher.has_work(sale_id, seq=work.seq, outbox=work.outbox)

    async def _flush(self, sale_id: str) -> int:
        try:
            return (await self._flusher.run_once(sale_id)).flushed
        finally:
            # Also after a failed round: that is when the backlog grows.
            await self._measure_backlog(sale_id)

    async def _measure_backlog(self, sale_id: str) -> None:
        backlog = await self._service.outbox.backlog(sale_id)
        OUTBOX_BACKLOG.labels(sale_id).set(backlog)
        OUTBOX_AGE.labels(sale_id).set(await self._oldest_seconds(sale_id) if backlog else 0.0)

    async def _oldest_seconds(self, sale_id: str) -> float:
        waiting = await self._service.outbox.after(sale_id, self._flusher.flushed_seq(sale_id), 1)
        if not waiting:
            return 0.0
        return max(0, self._service.connections.server_now_ms() - waiting[0].at_ms) / 1000


def _has_overdue_hold(_: str, work: PendingWork, server_now_ms: int) -> bool:
    return work.deadline_ms is not None and work.deadline_ms <= server_now_ms
