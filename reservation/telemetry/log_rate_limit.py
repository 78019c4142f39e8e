"""Rate limit for the log lines of one kind of event."""

import time
from collections.abc import Callable

__all__ = ["LogRateLimit"]


class LogRateLimit:
    """Lines written in this second, and lines suppressed since the last one written."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._second = 0.0
        self._written = 0
        self._left_out = 0

    def should_suppress(self) -> int | None:
        """Lines suppressed before this one; None if this one is suppressed too."""
        now = self._clock()
        if now - self._second >= 1:
            self._second, self._written = now, 0
        self._written += 1
        if self._written > self._per_second:
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        return left_out
