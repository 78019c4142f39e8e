"""Back-off between two attempts at an order that is due and still undecided."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from reservation.domain.clock import Clock

__all__ = ["Pauses"]


class _Postponed(NamedTuple):
    """A due name that was tried: when to try it again, by a monotonic clock."""

    until: float
    pause: float


class Pauses:
    """Exponential back-off of names that were tried and are still due.

    Without it the worker would call the PG, Redis and SQL as fast as they answer.
    """

    def __init__(self, clock: Clock, least: float, most: float) -> None:
        self._clock = clock
        self._least = least
        self._most = most
        self._postponed: dict[str, _Postponed] = {}

    def __len__(self) -> int:
        return len(self._postponed)

    def take(self, due: Sequence[str], most: int, *, busy: Collection[str] = ()) -> list[str]:
        """The names to try now, put off at once; names no longer due are forgotten.

        A `busy` name is still being tried: it is not taken, and its pause continues.
        """
        known, now = self._postponed, self._clock.monotonic()
        taken: list[str] = []
        self._postponed = postponed = {}
        for name in due:
            before = known.get(name)
            if before is not None and (name in busy or now < before.until):
                postponed[name] = before
            elif len(taken) < most:
                taken.append(name)
                postponed[name] = self._next_backoff(before, now)
        return taken

    def _next_backoff(self, before: _Postponed | None, now: float) -> _Postponed:
        pause = min(self._most, 2 * before.pause) if before else self._least
        return _Postponed(now + pause, pause)
