"""Bounds how many log lines a second one kind of event may write."""

import time
from collections.abc import Callable

__all__ = ["LogRateLimit"]


class LogRateLimit:
    """How many lines this second has had, and how many were left out since the last."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._second = 0.0
        self._written = 0
        self._left_out = 0

    def leave_out(self) -> int | None:
        """How many were left out before this one; None where this one is too."""
        now = self._clock()
        if now - self._second >= 1:
            self._second, self._written = now, 0
        self._written += 1
        if self._written > self._per_second:
            self._left_out += 1
            return None
        left_out, self._left_out = self._left_out, 0
        return left_out
