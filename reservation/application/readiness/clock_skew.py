"""Clock skew between Redis and this process, and jumps of either clock."""

from typing import Final

from reservation.adapters.redis.client import ClockReading

__all__ = ["Clocks"]

#: How far a clock may drift between two readings, per `DRIFT_SECONDS` between them: far more than
#: NTP slews, far less than a hold lasts.
DRIFT_MS_MAX: Final = 200
DRIFT_SECONDS: Final = 5.0
#: How long after a jump the clocks must run evenly: a second jump would have come by then.
EVEN_SECONDS: Final = 15.0
#: Skew beyond which no hold is expired by the clocks.
EXPIRE_OFFSET_MS_MAX: Final = 2_000


class Clocks:
    """Compares each reading with the previous one, by the monotonic clock between them."""

    def __init__(self) -> None:
        self._last: ClockReading | None = None
        self._even_from = float("-inf")
        self._now = 0.0
        #: Redis' clock minus ours, less the uncertainty of the round trip.
        self.offset_ms = 0

    @property
    def jumped(self) -> bool:
        """Whether a clock has jumped and both have not run evenly for long enough since."""
        return self._now < self._even_from

    @property
    def may_expire(self) -> bool:
        """Whether holds may be expired by these clocks."""
        return not self.jumped and abs(self.offset_ms) <= EXPIRE_OFFSET_MS_MAX

    def observe(self, reading: ClockReading) -> None:
        """Take one reading."""
        last, self._last, self._now = self._last, reading, reading.received
        uncertain = int((reading.received - reading.sent) * 500)
        offset = reading.offset_ms
        self.offset_ms = max(0, abs(offset) - uncertain) * (1 if offset > 0 else -1)
        # Another server's clock is another clock.
        if (
            last is not None
            and last.run_id == reading.run_id
            and not _advanced_evenly(last, reading)
        ):
            self._even_from = reading.received + EVEN_SECONDS


def _advanced_evenly(last: ClockReading, this: ClockReading) -> bool:
    slack = DRIFT_MS_MAX * max(1.0, (this.received - last.sent) / DRIFT_SECONDS)
    # Both clocks were read somewhere between `sent` and `received`.
    least = (this.sent - last.received) * 1000 - slack
    most = (this.received - last.sent) * 1000 + slack
    server = least <= this.server_ms - last.server_ms <= most
    ours = least <= this.our_ms - last.our_ms <= most
    return server and ours
