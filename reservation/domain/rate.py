"""Rates such as 20/s, and the generic cell rate algorithm that keeps them."""

from typing import Final

import msgspec

__all__ = ["Limiter", "Rate"]

#: Callers that one generation of a limiter remembers; it has two.
CALLERS_MAX: Final = 100_000


class Rate(msgspec.Struct, frozen=True):
    """So many in so many seconds; as many may come at once."""

    count: int
    per_seconds: int

    @property
    def interval_ms(self) -> float:
        """Milliseconds between two at the steady rate."""
        return self.per_seconds * 1000 / self.count


class Limiter:
    """Counts per caller inside one process. Times are monotonic seconds.

    It remembers in two generations, each as long as a whole bucket takes to fill again: what is
    older than both binds nobody, and is let go as one.
    """

    def __init__(self, rate: Rate) -> None:
        self._interval = rate.interval_ms / 1000
        self._ahead = (rate.count - 1) * self._interval
        self._arrivals: dict[str, float] = {}
        self._earlier: dict[str, float] = {}
        self._turns_at = 0.0

    def wait(self, caller: str, now: float) -> float:
        """Counts one call; 0 where it may go on, else the seconds until one more may."""
        # Too many at once is an attack with many names: start over rather than grow.
        if now >= self._turns_at or len(self._arrivals) >= CALLERS_MAX:
            self._earlier, self._arrivals = self._arrivals, {}
            self._turns_at = now + self._ahead + self._interval
        arrival = self._arrivals.get(caller)
        if arrival is None:
            arrival = self._earlier.get(caller, now)
        if arrival > now:
            wait = arrival - now - self._ahead
            if wait > 0:
                return wait
        else:
            arrival = now
        self._arrivals[caller] = arrival + self._interval
        return 0.0
