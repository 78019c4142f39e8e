"""Clocks: a Protocol, so that tests control the time."""

import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol

__all__ = ["FIRST_MS", "LAST_MS", "Clock", "SystemClock", "as_datetime", "as_ms", "as_wire"]


#: Cached texts of instants: a batch shares one, for its script reads the clock once.
_INSTANTS_MAX = 256


#: The first and the last millisecond of a UTC datetime.
FIRST_MS = -62_135_596_800_000
LAST_MS = 253_402_300_799_000


class Clock(Protocol):
    """Wall clock for times that are shown or compared with Redis, monotonic for waits."""

    def now_ms(self) -> int:
        """Unix milliseconds."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean anything."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()


def as_datetime(ms: int) -> datetime:
    """Unix milliseconds as an aware datetime in UTC, clamped to the range of datetime."""
    return datetime.fromtimestamp(min(max(ms, FIRST_MS), LAST_MS) / 1000, tz=UTC)


def as_ms(at: datetime) -> int:
    """An aware datetime as Unix milliseconds."""
    return round(at.timestamp() * 1000)


@lru_cache(maxsize=_INSTANTS_MAX)
def as_wire(ms: int) -> str:
    """Unix milliseconds as RFC 3339 in UTC with milliseconds."""
    return as_datetime(ms).isoformat(timespec="milliseconds").replace("+00:00", "Z")
