"""Automatic rebuild: a worker rebuilds the sales that lost data, without an operator.

It runs the same rebuild as the command. It begins one only where the loss is certain: the server is
vouched for, SQL answers, and Redis and SQL do not contradict each other. Otherwise the sale stays
closed with an alarm, and is checked again later.

    another worker or an operator rebuilds      wait until its beat has stopped
    an operator repairs                         wait a while: it reopens the sale, or rebuilds it
    a server fails, or another rebuild begins   again after a pause that doubles
    the data contradict each other              alarm; checked again every minute, changing nothing

Sales that are open at this time come first. No sale waits for the PG: the orphan loop refunds the
payments that no order can have any more.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.errors import reason_of
from reservation.adapters.sql.rebuilds import ABANDONED, RebuildRow
from reservation.adapters.sql.sales import SaleRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.recovery.rebuild import NotLost, Rebuild
from reservation.application.recovery.survivors import Uncertain
from reservation.application.sales.catalog import Catalog
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.errors import BrokenInvariant, ReservationError
from reservation.domain.levels import LEVEL_OF_AUTOMATIC_REBUILD
from reservation.domain.sale_settings import SaleDefinition, change_of
from reservation.telemetry.metrics import alarm

__all__ = ["AUTOMATIC", "AutomaticRebuild"]

log = structlog.get_logger(__name__)

#: The operator's name in the event `rebuilt`.
AUTOMATIC: Final = "automatic"
#: Time without a beat after which a rebuild counts as dead: five beats, on this process's clock.
SILENT_SECONDS: Final = 5.0
#: Time after which a repair that has the sale counts as dead. Its drain takes a few seconds.
REPAIR_SECONDS: Final = 10.0
#: Pauses after a failure: the first, and the longest.
PAUSE_SECONDS_MIN: Final = 1.0
PAUSE_SECONDS_MAX: Final = 30.0
#: Pause after the data contradicted each other: only an operator, or another server, changes that.
UNCERTAIN_SECONDS: Final = 60.0

#: A server or another rebuild stopped it; the next attempt may succeed.
_TRANSIENT: Final = (StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError, ReservationError)
#: Text, numbers or states that cannot be read.
_UNREADABLE: Final = (BrokenInvariant, msgspec.MsgspecError, KeyError, ValueError)


class _Turn(msgspec.Struct):
    """The time of the next attempt to rebuild a sale (monotonic), and the pause before it."""

    at: float
    pause: float = PAUSE_SECONDS_MIN


class _Seen(msgspec.Struct, frozen=True):
    """A rebuild or a repair of another process, and the time since which its beat is the same.

    A repair has no beat.
    """

    epoch: str
    beat: int
    since: float


class AutomaticRebuild:
    """Rebuilds the sales that the monitor has closed.

    Args:
        rebuild: the rebuild, whose calls reach only a server that is vouched for.
        catalog: the closed sales.
        sql: the unfinished rebuilds, and the level of the installation.
        clock: the monotonic time of pauses.
    """

    def __init__(self, rebuild: Rebuild, catalog: Catalog, sql: SqlStore, *, clock: Clock) -> None:
        self._rebuild = rebuild
        self._catalog = catalog
        self._sql = sql
        self._clock = clock
        self._turns: dict[str, _Turn] = {}
        self._running: dict[str, _Seen] = {}
        self._repairs: dict[str, _Seen] = {}
        self._waits_for_level = False

    async def run_once(self, sale_ids: Collection[str]) -> int:
        """Rebuild those of these sales that are closed and due; return the number rebuilt.

        The end of a rebuild is recorded as well, if its process died before that.

        Raises:
            SQLAlchemyError, OSError: SQL does not answer.
        """
        unfinished = await self._sql.rebuilds.list_unfinished()
        await self._end_handed_over(unfinished)
        closed = [sale_id for sale_id in sale_ids if sale_id in self._catalog.closed]
        self._turns = {one: turn for one, turn in self._turns.items() if one in closed}
        self._repairs = {one: seen for one, seen in self._repairs.items() if one in closed}
        if not closed or not await self._may_rebuild():
            return 0
        now, due = self._clock.monotonic(), list[str]()
        for sale_id in closed:
            running = self._is_running(sale_id, unfinished.get(sale_id), now)
            if not running and self._turns.setdefault(sale_id, _Turn(now)).at <= now:
                due.append(sale_id)
        rebuilt = 0
        for sale_id in await self._open_first(due):
            rebuilt += await self._attempt(sale_id, self._turns[sale_id])
        return rebuilt

    async def _open_first(self, sale_ids: Sequence[str]) -> Sequence[str]:
        """These sales, those in which buyers can buy now before the others."""
        if len(sale_ids) < 2:
            return sale_ids
        now_ms = self._clock.now_ms()
        rows = await self._sql.sales.list_by_id(sale_ids)
        is_open = {row.sale_id: _is_open(row, now_ms) for row in rows}
        return sorted(sale_ids, key=lambda sale_id: not is_open.get(sale_id, False))

    async def _end_handed_over(self, unfinished: Mapping[str, RebuildRow]) -> None:
        now = self._clock.monotonic()
        for sale_id, row in unfinished.items():
            if sale_id in self._catalog.closed or self._is_running(sale_id, row, now):
                continue
            try:
                await self._rebuild.end_handed_over(row)
            except _TRANSIENT as error:
                log.warning("rebuild_end_not_recorded", sale_id=sale_id, reason=reason_of(error))

    async def _may_rebuild(self) -> bool:
        """Whether every flusher writes only under the epoch that it read.

        After a rebuild, one of release 0.1.0 may write a batch that it read before.
        """
        may = await self._sql.installation.level() >= LEVEL_OF_AUTOMATIC_REBUILD
        if may == self._waits_for_level:
            self._waits_for_level = not may
            if not may:
                log.warning("rebuild_awaits_level", level=LEVEL_OF_AUTOMATIC_REBUILD)
        return may

    def _is_running(self, sale_id: str, row: RebuildRow | None, now: float) -> bool:
        """Whether another process rebuilds the sale, as far as its beat shows."""
        if row is None or row.beat == ABANDONED:
            self._running.pop(sale_id, None)
            return False
        seen = self._running.get(sale_id)
        if seen is None or (seen.epoch, seen.beat) != (row.epoch, row.beat):
            seen = self._running[sale_id] = _Seen(row.epoch, row.beat, now)
        return now - seen.since < SILENT_SECONDS

    async def _is_in_repair(self, sale_id: str) -> bool:
        """Whether a repair has the sale, and has not had it for too long."""
        now = self._clock.monotonic()
        fence = await self._rebuild.repair_fence(sale_id)
        seen = self._repairs.get(sale_id)
        if seen is None or seen.epoch != fence:
            seen = self._repairs[sale_id] = _Seen(fence, 0, now)
        return bool(fence) and now - seen.since < REPAIR_SECONDS

    async def _attempt(self, sale_id: str, turn: _Turn) -> bool:
        """Rebuild one sale; whether it was rebuilt. The next attempt is set if it was not."""
        try:
            if await self._is_in_repair(sale_id):
                return False
            report = await self._rebuild.run(
                sale_id, operator=AUTOMATIC, certain=True, gives_back=False
            )
        except NotLost:
            # It was rebuilt since, or archived.
            return False
        except Uncertain as error:
            self._give_up(sale_id, turn, str(error))
        except _TRANSIENT as error:
            log.warning("rebuild_deferred", sale_id=sale_id, reason=reason_of(error))
            turn.at = self._clock.monotonic() + turn.pause
            turn.pause = min(PAUSE_SECONDS_MAX, 2 * turn.pause)
        except _UNREADABLE as error:
            self._give_up(sale_id, turn, f"unreadable data: {error!r}")
        else:
            self._turns.pop(sale_id, None)
            self._running.pop(sale_id, None)
            return report.rebuilt
        return False

    def _give_up(self, sale_id: str, turn: _Turn, reason: str) -> None:
        alarm(Alarm.REBUILD_UNCERTAIN, sale_id=sale_id, reason=reason)
        turn.at = self._clock.monotonic() + UNCERTAIN_SECONDS


def _is_open(row: SaleRow, now_ms: int) -> bool:
    try:
        terms = (
            change_of(row.settings)[0]
            if row.settings is not None
            else msgspec.json.decode(row.document, type=SaleDefinition)
        )
    except msgspec.MsgspecError:
        # Its own attempt raises the alarm.
        return False
    return terms.opens_at_ms <= now_ms < terms.closes_at_ms
