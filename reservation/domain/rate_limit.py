"""Rate limits such as 20/s, enforced by the generic cell rate algorithm."""

from typing import Final

import msgspec

__all__ = ["BuyerLimits", "Limiter", "Rate"]

#: Callers in one generation of a limiter; it has two.
CALLERS_MAX: Final = 100_000


class Rate(msgspec.Struct, frozen=True):
    """A count per number of seconds; a burst may be as large as the count."""

    count: int
    per_seconds: int

    @property
    def interval_ms(self) -> float:
        """Milliseconds between two at the steady rate."""
        return self.per_seconds * 1000 / self.count


class BuyerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """One buyer's limits in one sale; prepare.lua enforces them."""

    #: Burst of holds.
    burst: Rate | None = None
    #: Holds over time; applies only together with a burst.
    sustained: Rate | None = None
    #: Orders that may end unpaid; 0 means no limit.
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

    Entries live in two generations, each as long as a whole bucket takes to refill: an entry older
    than both limits no caller, and a generation is dropped as a whole.
    """

    def __init__(self, rate: Rate) -> None:
        self._interval = rate.interval_ms / 1000
        self._ahead = (rate.count - 1) * self._interval
        self._arrivals: dict[str, float] = {}
        self._earlier: dict[str, float] = {}
        self._turns_at = 0.0

    def peek(self, caller: str, now: float) -> float:
        """0 if one more call is allowed, else the seconds until it is; counts nothing."""
        arrival = self._arrivals.get(caller)
        if arrival is None:
            arrival = self._earlier.get(caller, now)
        return max(0.0, arrival - now - self._ahead)

    def is_free(self, caller: str, now: float) -> bool:
        """Whether one more call is allowed; counts nothing."""
        return not self.peek(caller, now)

    def wait(self, caller: str, now: float) -> float:
        """Count one call; 0 if it is allowed, else the seconds until one more is."""
        # Too many callers at once are an attack with many names: rotate early rather than grow.
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
