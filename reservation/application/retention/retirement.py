"""Retirement: moves a sale that has ended from Redis to SQL.

    audit     Redis and SQL agree on every order and counter
    fence     Redis: if nothing is in progress and SQL has all events, no script changes the sale
    record    SQL: the sale is retired
    wait      until every process has seen it and reports no loss
    remove    Redis: every key of the sale

Release 0.1.0 would treat a retired sale as lost, so retirement begins at level 2.

One place of record is complete at any time: Redis until the record, SQL from then on. After a crash
between two steps the next round continues. A server that returns with an older state may have a
retired sale again. The sale is then fenced off and removed again, after the events that SQL lacks
have been written there.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.fences import RETIRING_EPOCH
from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.sale_store import SaleStore
from reservation.adapters.redis.sale_writer import RedisSaleHead, SaleWriter
from reservation.adapters.redis.script_results import RetireWord
from reservation.adapters.sql.event_writer import ApplyKind
from reservation.adapters.sql.sales import SaleHead
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.audit import Audit
from reservation.application.audit.expected_records import ENDED_KEPT_MS
from reservation.application.sales.catalog import Catalog
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.errors import SaleNotSettled, SaleRecovering, UpgradeInProgress
from reservation.domain.levels import LEVEL_OF_RETIREMENT
from reservation.telemetry.metrics import alarm

__all__ = ["Retirement"]

log = structlog.get_logger(__name__)

#: Pause between the record in SQL and the removal from Redis. Each process reads the record every
#: three seconds, and a process that cannot read it takes no holds by then.
REMOVE_AFTER_MS: Final = 10_000
#: Pause before the next attempt for a sale that could not be retired or removed.
RETRY_SECONDS: Final = 600.0
#: Pause after a removal: the sale may still be listed for a moment, or return with a failover.
REMOVED_SECONDS: Final = 30.0
#: Events per batch that are saved from Redis, as many as the flusher writes at once.
SURVIVORS_AT_ONCE: Final = 1_000


class _Postponed(msgspec.Struct, frozen=True):
    """A sale that cannot be retired yet."""

    reason: str
    #: Orders with a hold, a payment or a deposit in progress.
    orders: int = 0


class Retirement:
    """Retires sales.

    Args:
        connections: the server, for its clock.
        sales: the sales in Redis.
        writer: fences sales off and removes them.
        sql: the record.
        catalog: the sales known to be lost or retired; a lost one is not retired.
        audit: compares a sale before it is retired.
        outbox: the events of a sale that returned with an older state of Redis.
        clock: the time of the record and of the pauses.
    """

    def __init__(
        self,
        connections: RedisClient,
        sales: SaleStore,
        writer: SaleWriter,
        sql: SqlStore,
        catalog: Catalog,
        audit: Audit,
        outbox: RedisOutbox,
        *,
        clock: Clock,
    ) -> None:
        self._connections = connections
        self._sales = sales
        self._writer = writer
        self._sql = sql
        self._catalog = catalog
        self._audit = audit
        self._outbox = outbox
        self._clock = clock
        #: Sale -> monotonic time of the next attempt to retire it, and to remove it.
        self._retry_at: dict[str, float] = {}
        self._remove_at: dict[str, float] = {}

    async def run_once(self, sale_ids: Sequence[str] | None = None) -> int:
        """Retire the sales that are over and unchanged for a day; remove the retired ones.

        Args:
            sale_ids: the sales to check; by default all in Redis.

        Returns:
            The number of sales removed.

        Raises:
            StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError: a server does not answer.
        """
        if not await self._may_retire():
            return 0
        if sale_ids is None:
            sale_ids = await self._sales.ids()
        ended_before_ms = self._connections.server_now_ms() - ENDED_KEPT_MS
        fenced: list[str] = []
        for sale_id, (epoch, since_ms) in (await self._sales.ends(sale_ids)).items():
            if self._catalog.is_retired(sale_id):
                continue
            if epoch.startswith(RETIRING_EPOCH):
                # Its retirement was interrupted; an operator may have requested it.
                fenced.append(sale_id)
            elif since_ms <= ended_before_ms and sale_id not in self._catalog.closed:
                await self._retire_in_turn(sale_id)
        removed = await self._remove_retired(sale_ids)
        for sale_id in fenced:
            await self._retire(sale_id, ended_ms=ENDED_KEPT_MS)
        return removed + await self._remove_retired(fenced)

    async def _retire_in_turn(self, sale_id: str) -> None:
        """Retire the sale, unless it was tried within the last `RETRY_SECONDS`."""
        if not self._takes_turn(sale_id, self._retry_at):
            return
        with _back_when_away(sale_id, self._retry_at):
            if await self._retire(sale_id, ended_ms=ENDED_KEPT_MS) is None:
                del self._retry_at[sale_id]

    def _takes_turn(self, sale_id: str, turns: dict[str, float]) -> bool:
        """Whether the sale is due. The next attempt is set now, so an error delays no other."""
        now = self._clock.monotonic()
        if turns.get(sale_id, now) > now:
            return False
        turns[sale_id] = now + RETRY_SECONDS
        return True

    async def archive(self, sale_id: str, *, reason: str, operator: str) -> None:
        """Retire a closed or ended sale at once, as an operator requests.

        Args:
            sale_id: the sale.
            reason: the operator's, kept in the sale's history.
            operator: the operator's name, likewise.

        Raises:
            SaleNotFound: there is no such sale.
            UpgradeInProgress: processes of a release without retired sales may run.
            SaleRecovering: it waits for a rebuild.
            SaleNotSettled: it is open, an order or a refund of it is in progress, or Redis and SQL
                differ.
        """
        known = await self._catalog.fresh(sale_id)
        if known.is_retired:
            return
        if not await self._may_retire():
            raise UpgradeInProgress
        # First: once it is fenced off, a worker completes the retirement.
        await self._sql.sale_changes.put_archive(
            sale_id, operator=operator, reason=reason, now_ms=self._clock.now_ms()
        )
        postponed = await self._retire(sale_id, ended_ms=0)
        if postponed is not None:
            await self._sql.sale_changes.remove_archive(sale_id)
            raise SaleNotSettled(postponed.reason, orders=postponed.orders)
        log.info("sale_archived", sale_id=sale_id, reason=reason, operator=operator)

    async def _may_retire(self) -> bool:
        return await self._sql.installation.level() >= LEVEL_OF_RETIREMENT

    async def _retire(self, sale_id: str, *, ended_ms: int) -> _Postponed | None:
        """Fence off the sale and record its retirement; return the reason if it is postponed."""
        seq, chain = await self._sql.events.cursor(sale_id)
        epoch = await self._sql.sales.epoch(sale_id)
        if epoch is None:
            return _Postponed("SQL does not have the sale.")
        # A fenced-off sale must be retired: nothing in it can change in Redis any more.
        if await self._writer.epoch(sale_id) != RETIRING_EPOCH + epoch:
            obstacle = await self._obstacle(sale_id)
            if obstacle is not None:
                return obstacle
        head = RedisSaleHead(epoch=epoch, seq=seq, chain=chain)
        try:
            refusal = await self._writer.fence_retired(sale_id, head, ended_ms=ended_ms)
        except SaleRecovering:
            return _Postponed("The sale is being restored.")
        if refusal is not None:
            return _postponed(refusal.word, refusal.count)
        recorded = await self._sql.sales.retire(
            sale_id, SaleHead(epoch=epoch, seq=seq, chain=chain), self._clock.now_ms()
        )
        if not recorded:
            return _Postponed("A rebuild of the sale has begun.")
        await self._catalog.learn_retired()
        log.info("sale_retired", sale_id=sale_id, seq=seq)
        return None

    async def _obstacle(self, sale_id: str) -> _Postponed | None:
        """The reason to postpone the retirement that the script cannot see."""
        intents = await self._sql.intents.list_unmet(sale_id)
        if intents:
            return _Postponed("A payment of the sale is undecided.", len(intents))
        refunds = await self._sql.refunds.count_pending(sale_id)
        if refunds:
            return _Postponed("A refund of the sale is pending.", refunds)
        report = await self._audit.run(sale_id)
        if not report.ok:
            alarm(Alarm.SALE_NOT_RETIRED, sale_id=sale_id, problem=report.problems[0])
            return _Postponed("Redis and SQL differ; see the sale's audit.")
        return None

    async def _remove_retired(self, sale_ids: Sequence[str]) -> int:
        """Remove from Redis those sales that were retired at least `REMOVE_AFTER_MS` ago."""
        removed, now = 0, self._clock.monotonic()
        self._remove_at = {sale_id: at for sale_id, at in self._remove_at.items() if at > now}
        before_ms = self._clock.now_ms() - REMOVE_AFTER_MS
        for sale_id in sale_ids:
            if not self._catalog.is_retired(sale_id):
                continue
            row = await self._sql.sales.get(sale_id)
            if row is None or row.retired_at_ms is None or row.retired_at_ms > before_ms:
                continue
            if not self._takes_turn(sale_id, self._remove_at):
                continue
            with _back_when_away(sale_id, self._remove_at):
                await self._writer.fence_again(sale_id, epoch=row.epoch)
                await self._save_survivors(sale_id)
                await self._writer.remove_retired(
                    sale_id,
                    epoch=row.epoch,
                    orders=self._sql.orders.pages_with_buyers(sale_id),
                    skus=await self._sql.sales.list_items(sale_id),
                )
                self._remove_at[sale_id] = self._clock.monotonic() + REMOVED_SECONDS
            log.info("retired_sale_removed", sale_id=sale_id)
            removed += 1
        return removed

    async def _save_survivors(self, sale_id: str) -> None:
        """Write to SQL the events in Redis that follow the last one in SQL.

        There are none unless a server lost the fence and accepted changes before every process had
        seen the record. Events that do not follow, because SQL has others by now, are not written.
        """
        seq, _ = await self._sql.events.cursor(sale_id)
        while events := await self._outbox.after(sale_id, seq, SURVIVORS_AT_ONCE):
            outcome = await self._sql.events.apply(sale_id, events)
            log.warning("surviving_events_saved", sale_id=sale_id, count=outcome.written)
            if outcome.kind is not ApplyKind.APPLIED:
                alarm(
                    Alarm.FLUSH_CONFLICT,
                    sale_id=sale_id,
                    seq=outcome.seq,
                    reason=outcome.reason,
                )
                return
            seq = events[-1].seq


@contextmanager
def _back_when_away(sale_id: str, turns: dict[str, float]) -> Generator[None]:
    """Make the sale due again at once if the attempt failed because a server did not answer."""
    try:
        yield
    except (StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError):
        turns.pop(sale_id, None)
        raise


def _postponed(word: RetireWord, count: int) -> _Postponed:
    match word:
        case RetireWord.NOT_ENDED:
            return _Postponed("The sale is open.")
        case RetireWord.OPEN:
            return _Postponed("Orders of the sale are in progress.", count)
        case RetireWord.BEHIND:
            return _Postponed("SQL does not have every event of the sale yet.")
        case RetireWord.TOO_LATE | RetireWord.RECOVERING | RetireWord.DONE:
            raise AssertionError(word)
