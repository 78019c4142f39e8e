"""Rounds of the background work of each sale, started only where work is pending.

One look at many sales replaces a poll per sale and kind of work. The longer a sale has not changed,
the longer the pause between two looks at it; its nearest deadline ends the pause. A look at an idle
sale reads only the number of its last event, because work cannot arise without an event.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from heapq import heappop, heappush
from typing import Final
from zlib import crc32

import msgspec

from reservation.adapters.redis.pending_work import PendingWork
from reservation.workers.loops import attempt, back_off_seconds

__all__ = ["RoundKind", "SaleRounds"]

#: Bounds of the pause between two looks at a sale. The upper one delays the flush of the first
#: event after an idle period.
TICK_SECONDS: Final = 0.1
LOOK_SECONDS_MAX: Final = 4.0
#: The upper bound for a sale that is over with nothing in progress: only a refund can follow.
OVER_LOOK_SECONDS_MAX: Final = 20.0
#: Interval at which a sale without events is read in full, to find damage by manual edits.
FULL_LOOK_SECONDS: Final = 120.0
#: Sales of one round trip: about a millisecond of the server's single thread. The rounds of these
#: start before the next ones are read.
SALES_AT_ONCE: Final = 200
#: The pause as a share of the time since the sale's last change.
LOOK_SHARE: Final = 0.05
#: Rounds of one kind at once. Three kinds fit in the connection pool for any number of sales, and
#: a kind that waits for the PG or for SQL cannot starve the others.
ROUNDS_AT_ONCE: Final = 64


class RoundKind(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of background work."""

    #: Its name in the log.
    name: str
    #: Runs one round for a sale; returns the amount of work done.
    once: Callable[[str], Awaitable[int]]
    #: Whether a sale needs a round, by its pending work and the server's time in ms.
    is_due: Callable[[str, PendingWork, int], bool]
    #: Pause in seconds after a round that found nothing to do.
    pause: float


class _Rounds:
    """The rounds of one kind for one sale; at most one runs at a time."""

    __slots__ = ("failures", "not_before", "running")

    def __init__(self) -> None:
        self.running: asyncio.Task[None] | None = None
        self.failures = 0
        #: By the event loop's clock, in seconds.
        self.not_before = 0.0


class _Sale:
    """The scheduler's state of one sale. Times are the event loop's, in seconds."""

    __slots__ = ("changed_at", "full_at", "is_idle", "look_at", "rounds", "seen")

    def __init__(self, rounds: Mapping[str, _Rounds], changed_at: float) -> None:
        self.look_at = 0.0
        self.changed_at = changed_at
        self.seen: PendingWork | None = None
        #: Whether the last look found no work.
        self.is_idle = False
        #: When to read it in full again.
        self.full_at = 0.0
        self.rounds = rounds

    def known_at(self, now: float) -> PendingWork | None:
        """Its work at the last look, if this is still valid without a new event."""
        return self.seen if self.is_idle and now < self.full_at else None


class SaleRounds:
    """Starts the rounds of each of this worker's sales that has work.

    Args:
        read: reads the pending work of sales (`PendingWorkReader.read`).
        kinds: the kinds of work.
        server_now_ms: the server's time in ms.
        ready: awaited before each round.
    """

    def __init__(
        self,
        read: Callable[[Mapping[str, PendingWork | None]], Awaitable[Mapping[str, PendingWork]]],
        kinds: Collection[RoundKind],
        *,
        server_now_ms: Callable[[], int],
        ready: Callable[[], Awaitable[None]],
    ) -> None:
        self._read = read
        self._kinds = tuple(kinds)
        self._server_now_ms = server_now_ms
        self._ready = ready
        self._places = {kind.name: asyncio.Semaphore(ROUNDS_AT_ONCE) for kind in kinds}
        self._sales: dict[str, _Sale] = {}
        #: The rounds of each sale that was ever served here. One may still run when its sale
        #: returns from another worker.
        self._rounds: dict[str, dict[str, _Rounds]] = {}
        #: The next look at each sale; a replaced entry stays until its time.
        self._looks: list[tuple[float, str]] = []
        #: When the last look at all due sales ended.
        self._looked_at = float("-inf")

    def __contains__(self, sale_id: str) -> bool:
        return sale_id in self._sales

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._sales))

    def __len__(self) -> int:
        return len(self._sales)

    @property
    def silent_seconds(self) -> float:
        """Time since the last successful look."""
        return _now() - self._looked_at

    def add(self, sale_id: str, *, lively: bool) -> None:
        """Look at this sale from now on: a `lively` one as if it had just changed."""
        changed_at = _now() if lively else _now() - OVER_LOOK_SECONDS_MAX / LOOK_SHARE
        fresh = {kind.name: _Rounds() for kind in self._kinds}
        self._sales[sale_id] = _Sale(self._rounds.setdefault(sale_id, fresh), changed_at)
        heappush(self._looks, (0.0, sale_id))

    def remove(self, sale_id: str) -> None:
        """Start no more rounds of this sale; running rounds end normally."""
        self._sales.pop(sale_id, None)

    async def look(self, group: asyncio.TaskGroup) -> int:
        """Start the rounds that are due, as tasks of this group; 0, for the loop's pause.

        Raises:
            StoreUnavailable: no command was sent.
            StoreUncertain: a reply was lost.
        """
        due = self._take_due()
        try:
            for start in range(0, len(due), SALES_AT_ONCE):
                await self._look_at(group, due[start : start + SALES_AT_ONCE])
        finally:
            for sale_id in due:
                sale = self._sales.get(sale_id)
                if sale is not None:
                    heappush(self._looks, (sale.look_at, sale_id))
        self._looked_at = _now()
        return 0

    def _take_due(self) -> list[str]:
        """The sales that are due for a look, those that changed last first."""
        now, due = _now(), dict[str, None]()
        while self._looks and self._looks[0][0] <= now:
            look_at, sale_id = heappop(self._looks)
            sale = self._sales.get(sale_id)
            if sale is not None and sale.look_at == look_at:
                due[sale_id] = None
        return sorted(due, key=lambda sale_id: -self._sales[sale_id].changed_at)

    async def _look_at(self, group: asyncio.TaskGroup, sale_ids: Collection[str]) -> None:
        now = _now()
        known = {
            sale_id: sale.known_at(now)
            for sale_id in sale_ids
            if (sale := self._sales.get(sale_id)) is not None
        }
        for sale_id, work in (await self._read(known)).items():
            sale = self._sales.get(sale_id)
            # It may have moved to another worker meanwhile.
            if sale is not None:
                if known[sale_id] is not work:
                    sale.full_at = _now() + FULL_LOOK_SECONDS
                self._start_due(group, sale_id, sale, work)

    def _start_due(
        self, group: asyncio.TaskGroup, sale_id: str, sale: _Sale, work: PendingWork
    ) -> None:
        now, server_now_ms, is_first = _now(), self._server_now_ms(), sale.seen is None
        if sale.seen is not None and work != sale.seen:
            sale.changed_at = now
        sale.seen, sale.is_idle = work, True
        for kind in self._kinds:
            if kind.is_due(sale_id, work, server_now_ms):
                sale.is_idle = False
                rounds = sale.rounds[kind.name]
                if rounds.running is None and now >= rounds.not_before:
                    rounds.running = group.create_task(self._run(kind, sale_id, rounds))
        quiet = now - sale.changed_at if sale.is_idle else 0.0
        pause = _look_pause(quiet, work, server_now_ms)
        if is_first:
            # Spread the looks at sales that were added together.
            pause *= crc32(sale_id.encode()) / 2**32
        sale.look_at = now + max(TICK_SECONDS, pause)

    async def _run(self, kind: RoundKind, sale_id: str, rounds: _Rounds) -> None:
        """Repeat the round while it finds work in a sale of this worker."""
        try:
            did: int | None = 1
            while did and sale_id in self._sales:
                await self._ready()
                async with self._places[kind.name]:
                    did = await attempt(kind.name, lambda: kind.once(sale_id), sale_id=sale_id)
            rounds.failures = rounds.failures + 1 if did is None else 0
            pause = back_off_seconds(kind.pause, rounds.failures) if did is None else kind.pause
            rounds.not_before = _now() + pause
        finally:
            rounds.running = None


def _look_pause(quiet: float, work: PendingWork, server_now_ms: int) -> float:
    """Seconds until the next look at a sale that has not changed for `quiet` seconds."""
    times = [
        at_ms for at_ms in (work.deadline_ms, work.lease_ms, work.deposit_ms) if at_ms is not None
    ]
    if work.closes_at_ms <= server_now_ms and not times:
        return min(OVER_LOOK_SECONDS_MAX, LOOK_SHARE * quiet)
    # A hold that is taken right after this look is due no earlier than the next one.
    pause = min(LOOK_SECONDS_MAX, LOOK_SHARE * quiet, work.hold_seconds)
    return min([pause, *((at_ms - server_now_ms) / 1000 for at_ms in times)])


def _now() -> float:
    return asyncio.get_running_loop().time()
