"""Rates such as 20/s, and the generic cell rate algorithm that keeps them."""

from typing import Final

import msgspec

__all__ = ["BuyerLimits", "Limiter", "Rate"]

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


class BuyerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one buyer may take in one sale; prepare.lua counts it."""

    #: Holds at once.
    burst: Rate | None = None
    #: Holds over time; counts only where there is a burst as well.
    sustained: Rate | None = None
    #: Orders that may end unpaid; 0 is no limit.
    unpaid_orders: int = 0

    def args(self) -> tuple[float, int, int, int, int]:
        """The script's arguments; a limit that is off is 0.

        Returns:
            Interval and count of the burst, count and period of the sustained rate, unpaid orders.
        """
        interval_ms, burst = (self.burst.interval_ms, self.burst.count) if self.burst else (0, 0)
        count, period_ms = 0, 0
        if self.burst and self.sustained:
            count, period_ms = self.sustained.count, self.sustained.per_seconds * 1000
        return interval_ms, burst, count, period_ms, self.unpaid_orders


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

    def peek(self, caller: str, now: float) -> float:
        """Counts nothing; 0 where one more call may come, else the seconds until it may."""
        arrival = self._arrivals.get(caller)
        if arrival is None:
            arrival = self._earlier.get(caller, now)
        return max(0.0, arrival - now - self._ahead)

    def is_free(self, caller: str, now: float) -> bool:
        """Whether one more call may go on; counts nothing."""
        return not self.peek(caller, now)

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
