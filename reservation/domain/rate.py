"""Rates such as 20/s, and the generic cell rate algorithm that keeps them."""

from typing import Final

import msgspec

__all__ = ["Limiter", "Rate"]

#: Callers that one limiter remembers; a caller whose bucket is full again is forgotten first.
CALLERS_MAX: Final = 200_000


class Rate(msgspec.Struct, frozen=True):
    """So many in so many seconds; as many may come at once."""

    count: int
    per_seconds: int

    @property
    def interval_ms(self) -> float:
        """Milliseconds between two at the steady rate."""
        return self.per_seconds * 1000 / self.count


class Limiter:
    """Counts per caller inside one process. Times are monotonic seconds."""

    def __init__(self, rate: Rate) -> None:
        self._interval = rate.interval_ms / 1000
        self._ahead = (rate.count - 1) * self._interval
        self._arrivals: dict[str, float] = {}

    def wait(self, caller: str, now: float) -> float:
        """Counts one call; 0 where it may go on, else the seconds until one more may."""
        arrival = max(self._arrivals.get(caller, 0.0), now)
        wait = arrival - now - self._ahead
        if wait > 0:
            return wait
        if len(self._arrivals) >= CALLERS_MAX:
            self._forget(now)
        self._arrivals[caller] = arrival + self._interval
        return 0.0

    def _forget(self, now: float) -> None:
        self._arrivals = {
            caller: arrival for caller, arrival in self._arrivals.items() if arrival > now
        }
        # All of them busy: an attack with many names. Start over rather than grow.
        if len(self._arrivals) >= CALLERS_MAX:
            self._arrivals.clear()
