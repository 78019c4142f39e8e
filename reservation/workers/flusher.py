"""Flusher: writes the outbox behind to SQL, each event in effect exactly once and in order.

    read     the epoch, then the next entries of the group; they are pending from here on
    apply    in SQL, one transaction with the sale's cursor, if SQL has that epoch
    ack      only after the commit, so a crash in between means a second read
    trim     entries that SQL has, at intervals

A flusher that crashes between two steps leaves entries pending. Its successor, another process or
this one after an error, begins with those; SQL drops duplicates. Two flushers at once are safe: the
cursor's lock serializes them, and the one ahead finds a gap, which is the other's pending entries.
A rebuild replaces the outbox under another epoch: a batch that was read before is not written.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
import structlog

from reservation.adapters.sql.event_writer import ApplyKind, ApplyOutcome
from reservation.adapters.sql.store import SqlStore
from reservation.domain.alarms import Alarm
from reservation.domain.events import Event

__all__ = ["FlushCounts", "Flusher", "Outbox"]

log = structlog.get_logger(__name__)

#: Entries of one round: enough to share the cost of a commit (more than 1,000 gain nothing), few
#: enough to hold the lock for well under a tenth of a second.
BATCH: Final = 1_000
#: A trim is due after this many events, or after this long.
TRIM_EVENTS: Final = 1_000
TRIM_SECONDS: Final = 1.0
#: How often a flusher without new entries reads those that a crashed one left pending.
PENDING_CHECK_SECONDS: Final = 1.0
#: Rounds with a gap before the pending entries, until an alarm: another flusher may have committed
#: the missing events between our read of SQL and our read of Redis.
GAP_ROUNDS_MAX: Final = 3
#: The alarm of each outcome that stops a sale.
ALARMS: Final = {
    ApplyKind.GAP: Alarm.FLUSH_GAP,
    ApplyKind.CONFLICT: Alarm.FLUSH_CONFLICT,
    ApplyKind.BROKEN_CHAIN: Alarm.FLUSH_BROKEN_CHAIN,
    ApplyKind.POISON: Alarm.FLUSH_POISON,
    ApplyKind.UNKNOWN_SALE: Alarm.FLUSH_UNKNOWN_SALE,
}
#: Back-off of a stopped sale. A rebuild repairs it; until then each attempt raises the alarm again.
STOPPED_SECONDS: Final = 30.0


class Outbox(Protocol):
    """The flusher's view of Redis: one stream per sale, one group, one consumer."""

    async def epoch(self, sale_id: str) -> str | None:
        """The epoch in SQL of the entries; None accepts any."""
        ...

    async def ensure_group(self, sale_id: str, after_seq: int) -> None:
        """Create the group to read after this event; an existing group stays as it is."""
        ...

    async def read_new(self, sale_id: str, count: int) -> list[Event]:
        """Events that no consumer has read yet; they become pending."""
        ...

    async def read_pending(self, sale_id: str, count: int) -> list[Event]:
        """Events that were read and not acknowledged, oldest first."""
        ...

    async def ack(self, sale_id: str, seqs: Sequence[int]) -> None:
        """Acknowledge events that SQL has committed."""
        ...

    async def trim(self, sale_id: str, below_seq: int) -> None:
        """Drop entries below this event, which stays."""
        ...


class FlushCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The counts of one round."""

    #: Events that this round wrote.
    flushed: int = 0
    #: Events that were acknowledged: the written ones and the duplicates.
    acknowledged: int = 0
    #: The sale is stopped until an operator intervenes.
    stopped: bool = False


class _Sale(msgspec.Struct):
    """This flusher's state of one sale; it may be lost at any time."""

    #: The group exists.
    joined: bool = False
    #: Pending entries come before new ones.
    behind: bool = True
    pending_checked_at: float = 0.0
    gaps: int = 0
    flushed_seq: int = 0
    trimmed_seq: int = 0
    trimmed_at: float = 0.0
    stopped_at: float | None = None


class Flusher:
    """Flushes each sale separately: a stopped sale does not delay another.

    Args:
        outbox: the source of the entries.
        sql: their target.
        on_alarm: called with the alarm, the sale, the event and the reason when a sale stops.
        on_flushed: called with the number of events written.
        monotonic: a monotonic clock in seconds; the event loop's by default.
    """

    def __init__(
        self,
        outbox: Outbox,
        sql: SqlStore,
        *,
        on_alarm: Callable[..., Any],
        on_flushed: Callable[[int], Any],
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self._outbox = outbox
        self._sql = sql
        self._on_alarm = on_alarm
        self._on_flushed = on_flushed
        self._monotonic = monotonic
        self._sales: dict[str, _Sale] = {}

    async def run_once(self, sale_id: str) -> FlushCounts:
        """Write one batch of the sale to SQL.

        Raises:
            Exception: any error of Redis or SQL. Nothing is lost: the next round begins with the
                pending entries.
        """
        sale = self._sales.setdefault(sale_id, _Sale())
        if sale.stopped_at is not None and self._now() - sale.stopped_at < STOPPED_SECONDS:
            return FlushCounts(stopped=True)
        try:
            return await self._round(sale_id, sale)
        except BaseException:
            # The events read may not have been written, and the group may be gone.
            sale.joined, sale.behind = False, True
            raise

    def learn(self, cursors: Mapping[str, int]) -> None:
        """Take over SQL's last event of each of these sales, so that a flushed one needs no round.

        Args:
            cursors: sale id -> the number of its last written event.
        """
        for sale_id, seq in cursors.items():
            self._sales.setdefault(sale_id, _Sale(flushed_seq=seq))

    def has_work(self, sale_id: str, *, seq: int, outbox: int) -> bool:
        """Whether a sale needs a round.

        Args:
            sale_id: the sale.
            seq: the number of its last event.
            outbox: the number of entries in its outbox: one where all is flushed and trimmed.
        """
        sale = self._sales.get(sale_id)
        if sale is None or sale.stopped_at is not None:
            return True
        return seq != sale.flushed_seq or outbox != 1

    def flushed_seq(self, sale_id: str) -> int:
        """The last event in SQL, as last read by this flusher; 0 before its first round."""
        sale = self._sales.get(sale_id)
        return sale.flushed_seq if sale else 0

    async def _round(self, sale_id: str, sale: _Sale) -> FlushCounts:
        if not sale.joined:
            sale.flushed_seq, _ = await self._sql.events.cursor(sale_id)
            await self._outbox.ensure_group(sale_id, sale.flushed_seq)
            sale.joined = True
        # Before the entries: those of a later epoch are refused and read again.
        epoch = await self._outbox.epoch(sale_id)
        events = await self._read(sale_id, sale)
        if not events:
            if sale.stopped_at is not None:
                return FlushCounts(stopped=True)
            await self._trim(sale_id, sale)
            return FlushCounts()
        outcome = await self._sql.events.apply(sale_id, events, epoch=epoch)
        if outcome.kind is ApplyKind.OTHER_EPOCH:
            # The sale is lost or being rebuilt, and its group will be another one.
            sale.joined, sale.behind = False, True
            return FlushCounts()
        if outcome.kind is ApplyKind.GAP:
            if not sale.behind:
                # The missing events are pending: another flusher has read them and may be dead.
                sale.behind = True
                return await self._round(sale_id, sale)
            return self._gap(sale_id, sale, outcome)
        if outcome.kind in (ApplyKind.CONFLICT, ApplyKind.UNKNOWN_SALE):
            # None of these events is in SQL, even if their numbers are below the cursor.
            self._stop(sale_id, sale, outcome)
            return FlushCounts(stopped=True)
        done = [event.seq for event in events if event.seq <= outcome.flushed_seq]
        await self._outbox.ack(sale_id, done)
        sale.flushed_seq, sale.gaps = outcome.flushed_seq, 0
        self._on_flushed(outcome.written)
        if outcome.kind is not ApplyKind.APPLIED:
            self._stop(sale_id, sale, outcome)
            return FlushCounts(flushed=outcome.written, acknowledged=len(done), stopped=True)
        if sale.stopped_at is not None:
            sale.stopped_at = None
            log.info("flush_resumed", sale_id=sale_id, seq=outcome.flushed_seq)
        await self._trim(sale_id, sale)
        return FlushCounts(flushed=outcome.written, acknowledged=len(done))

    async def _read(self, sale_id: str, sale: _Sale) -> list[Event]:
        if not sale.behind:
            events = await self._outbox.read_new(sale_id, BATCH)
            if events or self._now() - sale.pending_checked_at < PENDING_CHECK_SECONDS:
                return events
        events = await self._outbox.read_pending(sale_id, BATCH)
        sale.pending_checked_at = self._now()
        if events:
            return events
        if not sale.behind:
            # Another flusher may have written them.
            sale.flushed_seq, _ = await self._sql.events.cursor(sale_id)
            return events
        sale.behind = False
        return await self._outbox.read_new(sale_id, BATCH)

    def _gap(self, sale_id: str, sale: _Sale, outcome: ApplyOutcome) -> FlushCounts:
        """Not even the pending entries follow SQL's last event: the missing one is lost."""
        sale.gaps += 1
        if sale.gaps < GAP_ROUNDS_MAX:
            return FlushCounts()
        sale.gaps = 0
        self._stop(sale_id, sale, outcome)
        return FlushCounts(stopped=True)

    def _stop(self, sale_id: str, sale: _Sale, outcome: ApplyOutcome) -> None:
        sale.stopped_at = self._now()
        sale.joined, sale.behind = False, True
        self._on_alarm(
            ALARMS[outcome.kind],
            sale_id=sale_id,
            seq=outcome.seq,
            reason=outcome.reason,
        )

    async def _trim(self, sale_id: str, sale: _Sale) -> None:
        untrimmed = sale.flushed_seq - sale.trimmed_seq
        overdue = self._now() - sale.trimmed_at >= TRIM_SECONDS
        if untrimmed <= 0 or (untrimmed < TRIM_EVENTS and not overdue):
            return
        await self._outbox.trim(sale_id, sale.flushed_seq)
        sale.trimmed_seq, sale.trimmed_at = sale.flushed_seq, self._now()

    def _now(self) -> float:
        return self._monotonic() if self._monotonic else asyncio.get_running_loop().time()
