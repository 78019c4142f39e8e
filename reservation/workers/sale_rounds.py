"""Rounds of the background work of each sale, started only where work is pending.

One look at all sales replaces a poll per sale and kind of work, so that an idle sale costs a few
commands in some seconds. The longer a sale has not changed, the longer the pause between two looks
at it; its nearest deadline ends the pause.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from reservation.adapters.redis.pending_work import PendingWork
from reservation.workers.loops import attempt, back_off_seconds

__all__ = ["RoundKind", "SaleRounds"]

#: Bounds of the pause between two looks at a sale. The upper one delays the flush of the first
#: event after a quiet time.
TICK_SECONDS: Final = 0.1
LOOK_SECONDS_MAX: Final = 4.0
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

    __slots__ = ("changed_at", "look_at", "rounds", "seen")

    def __init__(self, kinds: Iterable[RoundKind], changed_at: float) -> None:
        self.look_at = 0.0
        self.changed_at = changed_at
        self.seen: PendingWork | None = None
        self.rounds = {kind.name: _Rounds() for kind in kinds}


class SaleRounds:
    """Starts the rounds of each sale that has work.

    Args:
        read: reads the pending work of sales (`PendingWorkReader.read`).
        kinds: the kinds of work.
        server_now_ms: the server's time in ms.
        ready: awaited before each round.
    """

    def __init__(
        self,
        read: Callable[[Sequence[str]], Awaitable[Mapping[str, PendingWork]]],
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

    def __contains__(self, sale_id: str) -> bool:
        return sale_id in self._sales

    def add(self, sale_id: str, *, lively: bool) -> None:
        """Look at this sale from now on: a `lively` one as if it had just changed."""
        changed_at = _now() if lively else _now() - LOOK_SECONDS_MAX / LOOK_SHARE
        self._sales[sale_id] = _Sale(self._kinds, changed_at)

    async def look(self, group: asyncio.TaskGroup) -> int:
        """Start the rounds that are due, as tasks of this group; 0, for the loop's pause.

        Raises:
            StoreUnavailable: Redis was not asked.
            StoreUncertain: a reply was lost.
        """
        now = _now()
        some = [sale_id for sale_id, sale in self._sales.items() if sale.look_at <= now]
        for sale_id, work in (await self._read(some)).items():
            self._start_due(group, sale_id, work)
        return 0

    def _start_due(self, group: asyncio.TaskGroup, sale_id: str, work: PendingWork) -> None:
        sale, now, server_now_ms = self._sales[sale_id], _now(), self._server_now_ms()
        if sale.seen is not None and work != sale.seen:
            sale.changed_at = now
        sale.seen = work
        busy = False
        for kind in self._kinds:
            if kind.is_due(sale_id, work, server_now_ms):
                busy = True
                rounds = sale.rounds[kind.name]
                if rounds.running is None and now >= rounds.not_before:
                    rounds.running = group.create_task(self._run(kind, sale_id, rounds))
        quiet = 0.0 if busy else now - sale.changed_at
        sale.look_at = now + _look_pause(quiet, work, server_now_ms)

    async def _run(self, kind: RoundKind, sale_id: str, rounds: _Rounds) -> None:
        """Repeat the round while it finds work."""
        try:
            did: int | None = 1
            while did:
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
    # A hold that is taken right after this look is due no earlier than the next one.
    pause = min(LOOK_SECONDS_MAX, LOOK_SHARE * quiet, work.hold_seconds)
    for at_ms in (work.deadline_ms, work.lease_ms, work.deposit_ms):
        if at_ms is not None:
            pause = min(pause, (at_ms - server_now_ms) / 1000)
    return max(TICK_SECONDS, pause)


def _now() -> float:
    return asyncio.get_running_loop().time()
