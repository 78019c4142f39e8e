"""The open connections of this process, and the limit on their number.

Each connection costs a file descriptor, and a process without free descriptors can neither accept
a buyer nor reach Redis. So the limit is below the system's own. At the limit, connections that wait
for a request are closed, those with the earliest deadline first: half-open connections of an
attacker are among them. A connection with a request in progress is never closed.
"""

import resource
import time
from collections.abc import Callable
from typing import Final, Protocol

import structlog

from api.http import open_files
from reservation.telemetry.log_rate_limit import LogRateLimit

__all__ = ["CONNECTIONS_MAX", "Connection", "Connections", "connections"]

log = structlog.get_logger(__name__)

#: Per process, whatever its file limit: each connection costs some 10 kB.
CONNECTIONS_MAX: Final = 20_000
#: Descriptors for everything else: 256 connections to Redis, SQL, files, the other processes.
DESCRIPTORS_KEPT: Final = 384
#: Bytes of pipelined requests, over all connections.
UNREAD_BYTES_MAX: Final = 64 * 1024 * 1024
#: The share of connections closed at a time: finding them takes a scan of all of them.
GIVE_WAY_SHARE: Final = 50
#: Readiness warns above this share of the limit, and for a while after the limit was reached.
WARNING_SHARE: Final = 0.8
WARNING_SECONDS: Final = 60.0


class Connection(Protocol):
    """One connection."""

    @property
    def waits_until(self) -> float | None:
        """Its deadline for the next request; None while one is being answered."""
        ...

    def give_way(self) -> None:
        """Close at once."""
        ...


class Connections:
    """The open connections and their unread bytes."""

    def __init__(
        self, limit: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open: set[Connection] = set()
        self._limit = limit
        self._clock = clock
        self._full_at: float | None = None
        self._lines = LogRateLimit(1, clock)
        #: Received, and not yet read because an earlier response is pending.
        self.unread_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def limit(self) -> int:
        """The maximum number of connections; read after start-up has raised the system's limit."""
        if self._limit is None:
            self._limit = limit_of(open_files.limit())
        return self._limit

    def admit(self, connection: Connection) -> bool:
        """Register a connection; False if the process is at its limit."""
        if len(self._open) >= self.limit and not self._make_room():
            return False
        self._open.add(connection)
        return True

    def discard(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self._open.discard(connection)

    def warnings(self) -> list[str]:
        """Warnings for readiness, by name."""
        full = self._full_at is not None and self._clock() - self._full_at < WARNING_SECONDS
        if full or len(self._open) > WARNING_SHARE * self.limit:
            return ["connections-full"]
        return []

    def _make_room(self) -> bool:
        self._full_at = self._clock()
        waiting = [
            (until, connection)
            for connection in self._open
            if (until := connection.waits_until) is not None
        ]
        waiting.sort(key=lambda pair: pair[0])
        giving_way = waiting[: max(1, self.limit // GIVE_WAY_SHARE)]
        for _, connection in giving_way:
            # Removed from the count now: its descriptor closes before the next accept.
            self._open.discard(connection)
            connection.give_way()
        suppressed = self._lines.should_suppress()
        if suppressed is not None:
            log.warning(
                "connections_full",
                limit=self.limit,
                closed=len(giving_way),
                refused=not giving_way,
                suppressed=suppressed,
            )
        return bool(giving_way)


def limit_of(descriptors: int) -> int:
    """The connection limit of a process with this many file descriptors."""
    if descriptors == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return min(CONNECTIONS_MAX, max(descriptors - DESCRIPTORS_KEPT, descriptors // 4))


#: The connections of this process.
connections: Final = Connections()
