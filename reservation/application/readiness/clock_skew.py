"""Whether Redis' clock and ours agree, and whether either has jumped."""

from typing import Final

from reservation.adapters.redis.client import ClockReading

__all__ = ["Clocks"]

#: How far a clock may go wrong between two looks, per `DRIFT_SECONDS` between them: far more than
#: NTP slews, far less than a hold lasts.
DRIFT_MS_MAX: Final = 200
DRIFT_SECONDS: Final = 5.0
#: How long after a jump the clocks must go evenly: by then a second one would have come.
EVEN_SECONDS: Final = 15.0
#: Difference beyond which nothing is expired by the clocks at all.
EXPIRE_OFFSET_MS_MAX: Final = 2_000


class Clocks:
    """Compares each reading with the one before it, by the monotonic clock between them."""

    def __init__(self) -> None:
        self._last: ClockReading | None = None
        self._even_from = float("-inf")
        self._now = 0.0
        #: Redis' clock minus ours, without what the round trip leaves uncertain.
        self.offset_ms = 0

    @property
    def jumped(self) -> bool:
        """Whether a clock has jumped, and both have not gone evenly for long enough since."""
        return self._now < self._even_from

    @property
    def may_expire(self) -> bool:
        """Whether deadlines may be taken as passed by these clocks."""
        return not self.jumped and abs(self.offset_ms) <= EXPIRE_OFFSET_MS_MAX

    def observe(self, reading: ClockReading) -> None:
        """Take one reading."""
        last, self._last, self._now = self._last, reading, reading.received
        uncertain = int((reading.received - reading.sent) * 500)
        offset = reading.offset_ms
        self.offset_ms = max(0, abs(offset) - uncertain) * (1 if offset > 0 else -1)
        # Another server's clock is another clock.
        if last is not None and last.run_id == reading.run_id and not _evenly(last, reading):
            self._even_from = reading.received + EVEN_SECONDS


def _evenly(last: ClockReading, this: ClockReading) -> bool:
    slack = DRIFT_MS_MAX * max(1.0, (this.received - last.sent) / DRIFT_SECONDS)
    # The server read its clock somewhere between our sending and our receiving.
    least = (this.sent - last.received) * 1000 - slack
    most = (this.received - last.sent) * 1000 + slack
    server = least <= this.server_ms - last.server_ms <= most
    ours = abs((this.our_ms - last.our_ms) - (this.received - last.received) * 1000) <= slack
    return server and ours
