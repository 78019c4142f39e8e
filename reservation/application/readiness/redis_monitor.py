"""Redis monitor: detects a lost sale or a stale server before a unit is sold from it.

The scripts detect a lost key and another epoch by themselves. They cannot detect a server that came
back with an older state of the right epoch: a truncated file, a restored backup. So prepares go
only to a server whose sales were compared with SQL since it started (`RedisClient.guard`), and the
comparison is repeated every few seconds.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.ack_probes import AckProbes
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.replica_acks import ACK_ROW
from reservation.adapters.redis.vouches import Vouches
from reservation.adapters.sql.errors import reason_of
from reservation.application.readiness.data_loss import DataLossDetector
from reservation.application.sales.catalog import Catalog
from reservation.domain.alarms import Alarm
from reservation.domain.errors import Unavailable
from reservation.telemetry.metrics import PREPARE_CLOSED, alarm

__all__ = ["RESTORE_PENDING", "RedisMonitor"]

log = structlog.get_logger(__name__)

#: The name under which prepare and payments are closed after a restore.
RESTORE_PENDING: Final = "restore-pending"

#: Between two rounds. With the round itself well under the 6 s in which readiness must change.
CHECK_SECONDS: Final = 3.0
#: Between two rounds while no server is vouched for and buyers wait.
WAKE_SECONDS_MIN: Final = 0.3
#: Between two rounds while SQL is down, for a quick recovery.
AWAY_SECONDS: Final = 1.0
#: Time-out of one SQL answer; each Redis call has its own. The round has none: with too
#: many sales it would never complete.
ANSWER_SECONDS_MAX: Final = 2.5
#: Interval of the checks which servers the address leads to.
ADDRESS_SECONDS: Final = 2.0
#: Between two probes of the replicas.
PROBE_SECONDS: Final = 0.1
#: Between two readings of the replicas that an open server lists.
MEASURE_SECONDS: Final = 0.25
#: Between two writes of this process's marks.
MARK_SECONDS: Final = 1.0
#: Time-out of following the server to another life of it: every payment in flight is compared.
FOLLOW_SECONDS_MAX: Final = 30.0
#: SQL is read before Redis, and a rebuild may finish in between: an apparent loss is compared again
#: after this delay.
AGAIN_SECONDS: Final = 0.05
#: The buyer's retryAfter while a precondition of prepare fails.
RETRY_AFTER_SECONDS: Final = 5


class RedisMonitor:
    """One process's monitor of Redis: its configuration and its data.

    Args:
        connections: the target of prepares, once its server is vouched for.
        data_loss: finds losses in Redis.
        catalog: closes and reopens sales.
        vouches: the comparisons of other processes, used while SQL is down.
        readiness: names the failed preconditions of a hold.
        preflight_sales: likewise per sale, except for the sales that it is given.
        missing_at: the failed preconditions of a sale's server in a cluster.
        ack_probes: open the servers whose replicas acknowledge changes.
    """

    def __init__(
        self,
        connections: RedisClient,
        data_loss: DataLossDetector,
        catalog: Catalog,
        vouches: Vouches,
        readiness: Callable[[], Awaitable[Sequence[str]]],
        preflight_sales: Callable[[Collection[str]], Awaitable[Mapping[str, Sequence[str]]]],
        missing_at: Callable[[str], Sequence[str]],
        ack_probes: AckProbes,
    ) -> None:
        self._connections = connections
        self._data_loss = data_loss
        self._catalog = catalog
        self._vouches = vouches
        self._readiness = readiness
        self._preflight_sales = preflight_sales
        self._missing_at = missing_at
        self._ack_probes = ack_probes
        #: The life of each server vouched for by this process, by the server's own name; and the
        #: epochs that SQL returned last.
        self._vouched: dict[str, str] = {}
        self._epochs: dict[str, str] = {}
        #: The server that did not answer the last round, by its name in readiness; else empty.
        self.away = ""
        #: Every reason that the metric has named so far.
        self._exported_reasons: set[str] = set()
        #: The failed preconditions, by name.
        self.missing: tuple[str, ...] = ()
        #: The failed preconditions of single sales, by name.
        self.missing_of: Mapping[str, Sequence[str]] = {}

    @property
    def gaps(self) -> Mapping[str, str]:
        """The sales that need a rebuild, each with its loss."""
        return self._catalog.closed

    @property
    def restore_pending(self) -> tuple[str, ...]:
        """The name of the condition while a restore is not opened."""
        return (RESTORE_PENDING,) if self._data_loss.restore_pending else ()

    def check(self, sale_id: str) -> None:
        """Refuse a prepare while a precondition of Redis or of this sale fails.

        Raises:
            Unavailable: naming the failed preconditions.
        """
        missing = (
            self._present((*self.missing, *self.restore_pending), sale_id)
            or self.missing_of.get(sale_id)
            or self._present(self._missing_at(sale_id), sale_id)
            or self._short_of_replicas(sale_id)
        )
        if missing:
            raise Unavailable(
                f"Prepare is closed: {', '.join(missing)}.",
                retryAfter=RETRY_AFTER_SECONDS,
                missing=list(missing),
            )

    def _short_of_replicas(self, sale_id: str) -> tuple[str, ...]:
        acks = self._connections.acks_of(sale_id)
        return () if acks is None or acks.is_open else (ACK_ROW,)

    def _present(self, rows: Sequence[str], sale_id: str) -> tuple[str, ...]:
        """The rows without that of the replicas if a probe has opened the sale's server since."""
        if ACK_ROW not in rows or self._short_of_replicas(sale_id):
            return tuple(rows)
        return tuple(row for row in rows if row != ACK_ROW)

    def wake(self) -> None:
        """Start a round at once: a script found a sale lost or in another epoch."""
        self._connections.doubted.set()

    async def run(self) -> None:
        """Compare, follow the address, and write marks, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_address())
            group.create_task(self._check_forever())
            group.create_task(self._keep_marks())
            group.create_task(self._probe_replicas())
            group.create_task(self._measure_replicas())

    async def _check_forever(self) -> None:
        while True:
            try:
                await self.check_redis()
            except Exception as error:  # loop top: without the monitor stale data would be sold
                alarm(Alarm.WORKER_BUG, loop="watch", reason=type(error).__name__)
                log.exception("redis_check_crashed")
            pause = AWAY_SECONDS if self.away else CHECK_SECONDS
            if not self._connections.vouched:
                pause = WAKE_SECONDS_MIN
            try:
                async with asyncio.timeout(pause):
                    await self._connections.doubted.wait()
            except TimeoutError:
                continue
            # Thousands of doubts at once share one round.
            await asyncio.sleep(AGAIN_SECONDS)

    async def _follow_address(self) -> None:
        while True:
            await asyncio.sleep(ADDRESS_SECONDS)
            try:
                await self._connections.follow_address()
            except Exception as error:  # loop top: its end would end its siblings too
                alarm(Alarm.WORKER_BUG, loop="address", reason=type(error).__name__)
                log.exception("address_loop_crashed")

    async def _probe_replicas(self) -> None:
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            try:
                await self._ack_probes.run()
            except Exception as error:  # loop top: without probes no server would open again
                alarm(Alarm.WORKER_BUG, loop="acks", reason=type(error).__name__)
                log.exception("acks_loop_crashed")

    async def _measure_replicas(self) -> None:
        while True:
            await asyncio.sleep(MEASURE_SECONDS)
            try:
                await self._ack_probes.measure()
            except Exception as error:  # loop top: changes would wait for too few replicas
                alarm(Alarm.WORKER_BUG, loop="replicas", reason=type(error).__name__)
                log.exception("replicas_loop_crashed")

    async def _keep_marks(self) -> None:
        while True:
            await asyncio.sleep(MARK_SECONDS)
            try:
                await self._data_loss.write(self._lives())
            except (SQLAlchemyError, OSError) as error:
                # The round logs once which server is down.
                log.debug("marks_write_failed", reason=reason_of(error))
            except Exception as error:  # loop top: its end would end its sibling too
                alarm(Alarm.WORKER_BUG, loop="marks", reason=type(error).__name__)
                log.exception("marks_loop_crashed")

    async def check_redis(self) -> None:
        """Run one round; without effect if Redis does not answer."""
        await self._check_redis()
        await self._ack_probes.run()

    async def _check_redis(self) -> None:
        everything = bool(self.away) or not self._connections.vouched
        self._connections.doubted.clear()
        self._data_loss.begin_round(everything=everything)
        try:
            self._update(tuple(await self._readiness()))
        except (StoreUnavailable, StoreUncertain) as error:
            self._report_unavailable("redis", error)
            return
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                await self._data_loss.write(self._lives())
            lives = await self._compare_all()
            self._update_sales(await self._preflight_sales(self._catalog.closed))
            followed: dict[str, str] = {}
            for node, life in lives.items():
                async with asyncio.timeout(FOLLOW_SECONDS_MAX):
                    if life == self._vouched.get(node) or await self._may_follow(node, life):
                        followed[node] = life
        except (StoreUnavailable, StoreUncertain) as error:
            self._report_unavailable("redis", error)
            return
        except (SQLAlchemyError, OSError) as error:
            await self._continue_without_sql(error)
            return
        if followed:
            self._catalog.use_epochs(None)
        for node in self._connections.nodes:
            if (life := followed.get(node.identity)) is not None:
                self._vouch_for(node, life)
                await self._keep_vouch(node, life)
        self._log_if_recovered()
        self._show_closed()

    async def _continue_without_sql(self, error: Exception) -> None:
        """Use the sales compared in this life of each server, here or by another process."""
        usable: dict[str, str] = {}
        closed, away = 0, None
        for node in self._connections.nodes:
            try:
                life, epochs = await self._vouches.read(node)
            except (StoreUnavailable, StoreUncertain) as refused:
                away = refused
                continue
            if epochs is not None:
                self._vouch_for(node, life)
                usable |= epochs
            elif life == self._vouched.get(node.identity):
                usable |= self._own_epochs(node)
            else:
                # No process has compared this life with SQL: its data may be stale.
                closed += 1
        if away is not None and not self._connections.is_cluster:
            self._report_unavailable("redis", away)
            return
        self._catalog.use_epochs(usable)
        if closed:
            self._report_unavailable("sql", error)
            return
        self._log_unavailable("sql", error)
        self._show_closed()

    def _own_epochs(self, node: RedisClient) -> dict[str, str]:
        """The epochs of the sales of this server."""
        if not self._connections.is_cluster:
            return self._epochs
        return {
            sale_id: epoch
            for sale_id, epoch in self._epochs.items()
            if (owner := self._connections.node_of(sale_id)) and owner.identity == node.identity
        }

    def _lives(self) -> str:
        """The lives to which this process writes, as SQL has them."""
        if not self._connections.is_cluster:
            return self._vouched.get("", "")
        return " ".join(f"{node}={life}" for node, life in sorted(self._vouched.items()))

    def _vouch_for(self, node: RedisClient, life: str) -> None:
        if not node.has_life() or life != self._vouched.get(node.identity):
            log.info("redis_server_vouched", life=life)
        self._vouched[node.identity] = life
        node.note_away(away=False)
        node.vouch_for(life)

    async def _keep_vouch(self, node: RedisClient, life: str) -> None:
        """Let a process that starts while SQL is down sell the sales compared just now."""
        whole = {
            sale_id: epoch
            for sale_id, epoch in self._own_epochs(node).items()
            if sale_id not in self._catalog.closed and not self.missing_of.get(sale_id)
        }
        try:
            await self._vouches.keep(node, life, whole)
        except (StoreUnavailable, StoreUncertain) as error:
            log.debug("vouch_write_failed", reason=reason_of(error))

    def _report_unavailable(self, which: str, error: Exception) -> None:
        """Nothing was compared, so a server not vouched for stays closed."""
        self._log_unavailable(which, error)
        self._show_closed(which)

    def _log_unavailable(self, which: str, error: Exception) -> None:
        if which != self.away:
            log.warning("comparison_unavailable", unavailable=which, reason=reason_of(error))
        self.away = which

    def _log_if_recovered(self) -> None:
        if self.away:
            log.info("comparison_available", previously_unavailable=self.away)
        self.away = ""

    def _show_closed(self, *more: str) -> None:
        """Export why new holds are refused, in this process."""
        reasons = {*self.missing, *self.restore_pending, *more}
        for rows in self.missing_of.values():
            reasons.update(rows)
        if self._connections.is_cluster:
            for sale_id in self._epochs:
                reasons.update(self._missing_at(sale_id))
        if self.gaps:
            reasons.add("sale-recovering")
        self._exported_reasons |= reasons
        for reason in self._exported_reasons:
            PREPARE_CLOSED.labels(reason).set(reason in reasons)

    async def _may_follow(self, node: str, life: str) -> bool:
        """Whether another life of the server may be written to.

            old life:  A, B write ----x
            new life:                    A compares, writes?   B has seen more than A

        So no process writes before the marks of all are in SQL and were compared with the
        surviving data.
        """
        self._vouched.pop(node, None)
        masters = {one.identity: one for one in self._connections.nodes}
        for gone in self._vouched.keys() - masters.keys():
            # Its successor has its sales.
            del self._vouched[gone]
        if node not in masters:
            return False
        masters[node].distrust()
        await self._data_loss.write(self._lives())
        others = await self._data_loss.writing_elsewhere(life, node)
        if others:
            log.info("awaiting_marks", processes=others[:5], count=len(others))
            return False
        await self._data_loss.find_unmet(node)
        if (await self._compare_all()).get(node) != life:
            return False
        self._vouched[node] = life
        await self._data_loss.write(self._lives())
        return True

    def _update(self, missing: tuple[str, ...]) -> None:
        if missing and missing != self.missing:
            alarm(Alarm.PREFLIGHT, missing=", ".join(missing))
        if self.missing and not missing:
            log.info("preflight_passed")
        self.missing = missing

    def _update_sales(self, missing_of: Mapping[str, Sequence[str]]) -> None:
        for sale_id, missing in missing_of.items():
            if missing != self.missing_of.get(sale_id):
                alarm(Alarm.PREFLIGHT_OF_SALE, sale_id=sale_id, missing=", ".join(missing))
        for sale_id in self.missing_of.keys() - missing_of.keys():
            log.info("sale_preflight_passed", sale_id=sale_id)
        self.missing_of = missing_of

    async def _compare_all(self) -> dict[str, str]:
        """Close lost sales and reopen sound ones; the life of each server, where it had one."""
        # Reports since the last round are read with the rest.
        lost, lives = await self._data_loss.gaps()
        if lost:
            await asyncio.sleep(AGAIN_SECONDS)
            lost, more = await self._data_loss.gaps(set(lost))
            for node, some in more.items():
                lives.setdefault(node, set()).update(some)
        self._epochs = self._data_loss.epochs
        await self._catalog.learn_retired()
        self._catalog.learn_all(self._epochs)
        for sale_id, gap in lost.items():
            if self._catalog.close(sale_id, gap):
                alarm(Alarm.SALE_RECOVERING, sale_id=sale_id, gap=gap)
        for sale_id in set(self._catalog.closed) - set(lost):
            if self._data_loss.is_reported(sale_id):
                continue
            log.info("sale_recovered", sale_id=sale_id)
            self._catalog.reopen(sale_id)
        return {node: some.pop() for node, some in lives.items() if len(some) == 1}
