"""Worker process: runs the background loops, one set per sale, so that no sale delays another."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.adapters.sql.errors import reason_of
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.alarms import Alarm
from reservation.domain.errors import ReservationError
from reservation.domain.rate_limit import Limiter, Rate
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
from reservation.workers.reaper import Reaper
from reservation.workers.refunder import Refunder
from reservation.workers.settler import Settler

__all__ = ["run"]

log = structlog.get_logger(__name__)

#: Poll interval for new sales.
SALES_SECONDS: Final = 0.5
#: Pauses after an idle round. The reaper is late by at most its pause.
REAP_SECONDS: Final = 0.5
SETTLE_SECONDS: Final = 0.5
FLUSH_SECONDS: Final = 0.1
REFUND_SECONDS: Final = 2.0
RECHECK_SECONDS: Final = 5.0
ORPHAN_SECONDS: Final = 2.0
CLOCK_SECONDS: Final = 5.0
#: Rounds of one kind at once. Three kinds fit in the connection pool for any number of sales, and
#: a kind that waits for the PG or for SQL cannot starve the others.
ROUNDS_AT_ONCE: Final = 64
#: Upper bound of the exponential back-off after failed rounds.
BACK_OFF_SECONDS_MAX: Final = 5.0
#: Transient failures: the network, a server that restarts, a lost lease.
TRANSIENT: Final = (ReservationError, StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError)
#: Rate limit of their log lines, per loop and kind of failure.
LINES: Final = Rate(count=3, per_seconds=60)

_lines = Limiter(LINES)


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
        self._sales: set[str] = set()
        self._expires = True
        self._places = {
            name: asyncio.Semaphore(ROUNDS_AT_ONCE) for name in ("reaper", "settler", "flusher")
        }

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
            self._begin(group, "sales", lambda: self._start_new_sales(group), SALES_SECONDS)

    def _begin(
        self,
        group: asyncio.TaskGroup,
        name: str,
        once: Callable[[], Awaitable[int]],
        pause: float,
        **facts: str,
    ) -> None:
        ready = self._service.connections.until_vouched
        group.create_task(forever(name, once, pause, ready=ready, **facts))

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

    async def _start_new_sales(self, group: asyncio.TaskGroup) -> int:
        for sale_id in await self._service.sale_store.ids():
            if sale_id in self._sales:
                continue
            self._sales.add(sale_id)
            for name, once, pause in (
                ("reaper", self._reap, REAP_SECONDS),
                ("settler", self._settler.tick, SETTLE_SECONDS),
                ("flusher", self._flush, FLUSH_SECONDS),
            ):
                round_of_sale = _for_sale(once, sale_id, self._places[name])
                self._begin(group, name, round_of_sale, pause, sale_id=sale_id)
        return 0

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


def _for_sale(
    once: Callable[[str], Awaitable[int]], sale_id: str, places: asyncio.Semaphore
) -> Callable[[], Awaitable[int]]:
    async def round_of_sale() -> int:
        async with places:
            return await once(sale_id)

    return round_of_sale


async def forever(
    name: str,
    once: Callable[[], Awaitable[int]],
    pause: float,
    *,
    ready: Callable[[], Awaitable[None]] | None = None,
    **facts: str,
) -> None:
    """Repeat a round: at once while there is work, else after a pause.

    Args:
        name: of the loop, for the log.
        once: runs one round; returns the amount of work done.
        pause: in seconds.
        ready: awaited before each round.
        facts: for the log.
    """
    failures = 0
    while True:
        if ready is not None:
            await ready()
        try:
            did = await once()
            failures = 0
        except TRANSIENT as error:
            failures += 1
            did = 0
            # While a server is down the rounds of all sales fail the same way.
            if not _lines.wait(f"{name} {type(error).__name__}", time.monotonic()):
                log.warning("round_failed", loop=name, reason=reason_of(error), **facts)
        except Exception as error:  # the loop's top: a bug in one round must not end the others
            failures += 1
            did = 0
            alarm(Alarm.WORKER_BUG, loop=name, reason=type(error).__name__, **facts)
            log.exception("round_crashed", loop=name, **facts)
        _raise_if_cancelled()
        if failures:
            await asyncio.sleep(min(BACK_OFF_SECONDS_MAX, pause * 2 ** min(failures, 6)))
        elif not did:
            await asyncio.sleep(pause)


def _raise_if_cancelled() -> None:
    """End a task whose cancellation was swallowed.

    Before 3.12 `asyncio.wait_for`, with which SQLAlchemy's pool waits for a connection, swallows it
    when the connection arrives at the same instant; the worker then never ended.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
