"""Worker process: runs the background loops; a round per sale, so that no sale delays another."""

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Collection
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.adapters.redis.pending_work import PendingWork, PendingWorkReader
from reservation.adapters.redis.worker_registry import WorkerRegistry
from reservation.adapters.sql.errors import reason_of
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.alarms import Alarm
from reservation.telemetry import start_notice
from reservation.telemetry.metrics import (
    FLUSHED,
    OUTBOX_AGE,
    OUTBOX_BACKLOG,
    SALES,
    WORKER_BEAT,
    WORKER_CLOCK_OFFSET,
    WORKER_SALES,
    WORKERS,
    alarm,
    served,
)
from reservation.workers.flusher import Flusher
from reservation.workers.loops import forever
from reservation.workers.reaper import Reaper
from reservation.workers.refunder import Refunder
from reservation.workers.sale_rounds import TICK_SECONDS, RoundKind, SaleRounds
from reservation.workers.settler import Settler
from reservation.workers.sharing import Duty, Share
from reservation.workers.webhooks import Webhooks

__all__ = ["run"]

log = structlog.get_logger(__name__)

#: Poll interval for new sales: of their number, and of all their ids.
SALES_SECONDS: Final = 0.5
LIST_SECONDS: Final = 5.0
#: Interval of this worker's beats. A worker counts as gone if another worker reads the same beat
#: three times: its sales move within 4 beats and the next look.
BEAT_SECONDS: Final = 0.6
#: A worker that has read no sale for this long sends no beat, and others take over its sales.
SILENT_SECONDS_MAX: Final = 4.0
#: A shorter outage of SQL moves no work to another worker, which would wait for SQL, too.
SQL_AWAY_SECONDS: Final = 2.0
#: Time-out of removing this worker from the list when it ends.
LEAVE_SECONDS_MAX: Final = 1.0
#: Limit of the read of SQL's cursors, which delays the first rounds of new sales.
CURSORS_SECONDS_MAX: Final = 1.0
#: Pauses after an idle round.
REAP_SECONDS: Final = 0.5
SETTLE_SECONDS: Final = 0.5
FLUSH_SECONDS: Final = 0.1
#: After a smaller batch the flusher pauses: a round costs as much as dozens of events.
FLUSH_AGAIN_EVENTS: Final = 100
REFUND_SECONDS: Final = 2.0
REQUEST_SECONDS: Final = 1.0
RECHECK_SECONDS: Final = 5.0
ORPHAN_SECONDS: Final = 2.0
WORKER_BEAT_SECONDS: Final = 10.0
CLOCK_SECONDS: Final = 2.0
RETIRE_SECONDS: Final = 60.0
REBUILD_SECONDS: Final = 0.5
TOMBSTONE_SECONDS: Final = 2.0
TOMBSTONE_PAUSE_SECONDS: Final = 0.2
EVENT_IDS_SECONDS: Final = 0.2
SALE_NOTICES_SECONDS: Final = 1.0
WEBHOOK_SECONDS: Final = 1.0
#: Pause of a worker that assigns ids only because the responsible one may be of the release before.
EVENT_IDS_SPARE_SECONDS: Final = 2.0


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
    """The loops of one process.

    Args:
        service: the connected service.
        name: this worker's name; by default made of its host and process id.
    """

    def __init__(self, service: Service, name: str = "") -> None:
        self._service = service
        self._reaper = Reaper(service.catalog, service.store)
        self._settler = Settler(service.store, service.settlement, clock=service.clock)
        self._refunder = Refunder(service.sql, service.refunds, clock=service.clock)
        self._flusher = Flusher(service.outbox, service.sql, on_alarm=alarm, on_flushed=FLUSHED.inc)
        name = name or f"{socket.gethostname()}-{os.getpid()}"
        heartbeat = Heartbeat(service.connections, service.keys, name=name, role="worker")
        self._registry = WorkerRegistry(service.connections, service.keys, heartbeat)
        self._share = Share(name)
        #: All sales at the last listing; None before it.
        self._sale_ids: frozenset[str] | None = None
        self._listed_at = float("-inf")
        self._taking = asyncio.Lock()
        #: The time since which SQL does not answer the monitor; None while it answers.
        self._sql_away_since: float | None = None
        self._expires = True
        self._webhooks = Webhooks(
            service.sql,
            service.events.feed,
            service.events.sender,
            clock=service.clock,
            name=name,
            has=lambda endpoint_id: self._share.has(Duty.WRITE, f"webhook {endpoint_id}"),
        )
        self._rounds = SaleRounds(
            PendingWorkReader(service.connections, service.keys).read,
            (
                RoundKind(
                    name="reaper",
                    once=self._reap,
                    is_due=self._has_overdue_hold,
                    pause=REAP_SECONDS,
                ),
                RoundKind(
                    name="settler",
                    once=self._settle,
                    is_due=self._has_payment,
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
            await self._leave()
            await self._webhooks.aclose()
            await self._settler.aclose()
            await self._refunder.aclose()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._service.redis_monitor.run())
            group.create_task(
                forever("clock", self._measure_clock, CLOCK_SECONDS),
            )
            group.create_task(forever("beat", self._beat, WORKER_BEAT_SECONDS))
            self._begin(group, "share", self._keep_share, BEAT_SECONDS)
            self._begin(group, "orphans", self._resolve_orphans, ORPHAN_SECONDS)
            self._begin(group, "rechecks", self._service.recheck.run_once, RECHECK_SECONDS)
            self._begin(group, "refunds", self._refund, REFUND_SECONDS)
            self._begin(group, "requests", self._carry_out_requests, REQUEST_SECONDS)
            self._begin(group, "retirement", self._retire, RETIRE_SECONDS)
            self._begin(group, "rebuilds", self._rebuild, REBUILD_SECONDS)
            self._begin(group, "tombstones", self._add_tombstones, TOMBSTONE_SECONDS)
            self._begin(group, "event ids", self._assign_event_ids, EVENT_IDS_SECONDS)
            self._begin(group, "sale notices", self._add_sale_notices, SALE_NOTICES_SECONDS)
            group.create_task(forever("webhooks", self._webhooks.run_once, WEBHOOK_SECONDS))
            self._begin(group, "sales", self._list_sales, SALES_SECONDS)
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
        if not self._service.readiness.clocks_of(sale_id).may_expire:
            return 0
        return await self._reaper.run_once(sale_id)

    async def _resolve_orphans(self) -> int:
        if not self._share.has(Duty.WRITE, "orphaned payments"):
            return 0
        return await self._service.orphaned_payments.run_once()

    async def _refund(self) -> int:
        return await self._refunder.run_once(start=self._share.has(Duty.WRITE, "refunds"))

    async def _carry_out_requests(self) -> int:
        if not self._share.has(Duty.WRITE, "order requests"):
            return 0
        return await self._service.requests.run_once()

    async def _retire(self) -> int:
        mine = [sale_id for sale_id in self._rounds if self._share.has(Duty.WRITE, sale_id)]
        return await self._service.retirement.run_once(mine)

    async def _rebuild(self) -> int:
        """Rebuild the closed sales of this worker's share, unless an operator does it.

        The ends of rebuilds are recorded in either case. Redis may have lost the list of sales; the
        monitor closes them by SQL.
        """
        automatic = self._service.settings.rebuild == "auto"
        closed = tuple(self._service.catalog.closed) if automatic else ()
        mine = [sale_id for sale_id in closed if self._share.has(Duty.WRITE, sale_id)]
        rebuilt = await self._service.automatic_rebuild.run_once(mine)
        if rebuilt:
            # The sales sell again after the next comparison.
            self._service.redis_monitor.wake()
        return 0

    async def _add_tombstones(self) -> int:
        mine = [sale_id for sale_id in self._rounds if self._share.has(Duty.WRITE, sale_id)]
        made = await self._service.tombstones.run_once(mine, self._flusher.flushed_seq)
        if made:
            # No order waits for its tombstone; the pause leaves the servers to the buyers.
            await asyncio.sleep(TOMBSTONE_PAUSE_SECONDS)
        return made

    async def _assign_event_ids(self) -> int:
        """Make committed events visible in the feed; a lock in SQL excludes the other workers."""
        if not self._share.has(Duty.WRITE, "event feed"):
            await asyncio.sleep(EVENT_IDS_SPARE_SECONDS)
        return await self._service.sql.feed.assign()

    async def _add_sale_notices(self) -> int:
        if not self._share.has(Duty.WRITE, "event feed"):
            return 0
        return await self._service.sql.feed.add_notices(self._service.clock.now_ms())

    async def _keep_share(self) -> int:
        """Announce this worker to the others, and take the sales of its share."""
        if self._rounds.silent_seconds > SILENT_SECONDS_MAX:
            entries = await self._registry.read()
        else:
            now_ms = self._service.clock.now_ms()
            entries = await self._registry.beat(now_ms, self._unable())
        if self._share.observe(entries):
            await self._take_share()
            log.info(
                "worker_share_changed", workers=len(self._share.workers), sales=len(self._rounds)
            )
        WORKERS.set(len(self._share.workers))
        await self._registry.remove(self._share.gone)
        return 0

    def _unable(self) -> list[Duty]:
        """The duties that another worker, if there is one, must take over."""
        unable: list[Duty] = []
        if not self._service.readiness.clocks.may_expire:
            unable.append(Duty.EXPIRE)
        now = asyncio.get_running_loop().time()
        if self._service.redis_monitor.away != "sql":
            self._sql_away_since = None
        elif self._sql_away_since is None:
            self._sql_away_since = now
        elif now - self._sql_away_since > SQL_AWAY_SECONDS:
            unable.append(Duty.WRITE)
        return unable

    async def _leave(self) -> None:
        """Let the others take over at once instead of after the missing beats."""
        try:
            async with asyncio.timeout(LEAVE_SECONDS_MAX):
                await self._registry.leave()
        except (StoreUnavailable, StoreUncertain, TimeoutError) as error:
            log.debug("worker_leave_failed", reason=str(error))

    async def _settle(self, sale_id: str) -> int:
        taken = await self._settler.tick(sale_id)
        if sale_id not in self._rounds:
            self._settler.forget(sale_id)
        return taken

    async def _list_sales(self) -> int:
        """Take new sales, and drop those that are no longer listed."""
        now = asyncio.get_running_loop().time()
        known = self._sale_ids
        is_fresh = known is not None and now - self._listed_at < LIST_SECONDS
        if is_fresh and await self._service.sale_store.count() == len(known or ()):
            return 0
        sale_ids = frozenset(await self._service.sale_store.ids())
        self._listed_at = now
        if sale_ids != known:
            self._sale_ids = sale_ids
            SALES.set(len(sale_ids))
            await self._take_share(new=sale_ids - known if known is not None else ())
        return 0

    async def _take_share(self, new: Collection[str] = ()) -> None:
        """Serve the sales of this worker's share, and no others.

        Args:
            new: the sales that were created just now.
        """
        async with self._taking:
            mine = frozenset(self._share.of(self._sale_ids or ()))
            gained = [sale_id for sale_id in sorted(mine) if sale_id not in self._rounds]
            if gained:
                await self._learn_cursors(gained)
            for sale_id in gained:
                self._rounds.add(sale_id, lively=sale_id in new)
            for sale_id in self._rounds:
                if sale_id not in mine:
                    self._rounds.remove(sale_id)
                    self._settler.forget(sale_id)
                    # Its next worker reports it; this one would report its last value forever.
                    OUTBOX_BACKLOG.labels(sale_id).set(0)
                    OUTBOX_AGE.labels(sale_id).set(0)
            WORKER_SALES.set(len(self._rounds))

    async def _learn_cursors(self, sale_ids: Collection[str]) -> None:
        try:
            async with asyncio.timeout(CURSORS_SECONDS_MAX):
                self._flusher.learn(await self._service.sql.events.cursors(sale_ids))
        except (SQLAlchemyError, OSError) as error:
            # Holds expire without SQL too; the flusher reads the cursor of each sale itself.
            log.warning("cursors_unread", reason=reason_of(error))

    def _has_overdue_hold(self, sale_id: str, work: PendingWork, server_now_ms: int) -> bool:
        is_due = work.deadline_ms is not None and work.deadline_ms <= server_now_ms
        return is_due and self._share.has(Duty.EXPIRE, sale_id) and not self._is_retired(sale_id)

    def _has_payment(self, sale_id: str, work: PendingWork, server_now_ms: int) -> bool:
        has_work = self._settler.has_work(sale_id, work, server_now_ms)
        return has_work and self._share.has(Duty.WRITE, sale_id) and not self._is_retired(sale_id)

    def _has_unflushed(self, sale_id: str, work: PendingWork, _: int) -> bool:
        if not self._share.has(Duty.WRITE, sale_id) or self._is_retired(sale_id):
            return False
        return self._flusher.has_work(sale_id, seq=work.seq, outbox=work.outbox)

    def _is_retired(self, sale_id: str) -> bool:
        """Whether the sale is retired: in Redis it is only removed, even if it returned."""
        return self._service.catalog.is_retired(sale_id)

    async def _flush(self, sale_id: str) -> int:
        """Write one batch; returns 0 if the next one can wait for the pause between rounds."""
        try:
            flushed = (await self._flusher.run_once(sale_id)).flushed
            return flushed if flushed >= FLUSH_AGAIN_EVENTS else 0
        finally:
            # Also after a failed round: that is when the backlog grows.
            if sale_id in self._rounds:
                await self._measure_backlog(sale_id)

    async def _measure_backlog(self, sale_id: str) -> None:
        backlog = await self._service.outbox.backlog(sale_id)
        OUTBOX_BACKLOG.labels(sale_id).set(backlog)
        OUTBOX_AGE.labels(sale_id).set(await self._oldest_seconds(sale_id) if backlog else 0.0)

    async def _oldest_seconds(self, sale_id: str) -> float:
        waiting = await self._service.outbox.after(sale_id, self._flusher.flushed_seq(sale_id), 1)
        if not waiting:
            return 0.0
        return max(0, self._service.connections.server_now_ms(sale_id) - waiting[0].at_ms) / 1000
