"""Load shedding: rejects excess prepares at a bounded rate so that admitted requests keep the CPU.

A refusal costs about half a hold, and a refused client retries at once. So the higher the CPU
pressure, the smaller the share of it that refusals get; without pressure, all are sent at once.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["LoadShedder", "RejectedRequest"]

#: Refusals sent in one turn of the loop. A refused client retries, so this also bounds the reads of
#: a turn, and with them the latency of everything else: a call to Redis is sent and read once a
#: turn. Without this bound thousands of refusals made a turn of a tenth of a second, and nine holds
#: of ten were lost to them. Sent one by one each costs twice as much.
REFUSALS_PER_TURN: Final = 24
#: Pause between such turns while the CPU is saturated, and less under lower pressure: 24 take about
#: a millisecond. Without this pause refusals took a third of the time, and four holds in ten were
#: lost.
PAUSE_SECONDS: Final = 0.01
#: One refusal in this many goes to the oldest request, the others to the newest. If more arrive
#: than can be refused, most get their refusal in milliseconds, and none waits indefinitely. In
#: order of arrival, all would wait for the whole queue.
OLDEST_FIRST_EVERY: Final = 8


class RejectedRequest(Protocol):
    """A request that is refused under load."""

    disconnected: bool

    def write(self, status: int, message: bytes) -> None:
        """Answer now, once; does nothing if the client has disconnected."""
        ...


class LoadShedder:
    """Queue of requests to refuse."""

    def __init__(self, shortage: Callable[[], float]) -> None:
        """`shortage` returns the CPU shortage: 0 for none, 1 for no time left."""
        self._shortage = shortage
        self._waiting: deque[tuple[RejectedRequest, int, bytes, Callable[[], None]]] = deque()
        #: Whether the next turn is scheduled.
        self._scheduled = False

    def add(
        self, request: RejectedRequest, status: int, message: bytes, on_written: Callable[[], None]
    ) -> None:
        """Queue a refusal; the callback runs once it is sent or its client has disconnected."""
        self._waiting.append((request, status, message, on_written))
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._write_refusals)

    def _write_refusals(self) -> None:
        """Send one turn's refusals; an exception in one of them does not stop the others."""
        self._scheduled = False
        if not self._waiting:
            return
        try:
            written = 0
            while self._waiting and written < REFUSALS_PER_TURN:
                last = written % OLDEST_FIRST_EVERY
                taken = self._waiting.pop() if last else self._waiting.popleft()
                request, status, message, on_written = taken
                # A disconnected request does not use up a slot of the turn.
                written += not request.disconnected
                request.write(status, message)
                on_written()
        finally:
            self._schedule_next()

    def _schedule_next(self) -> None:
        # Planned even with an empty queue: the next refusal must wait for the pause.
        if shortage := self._shortage():
            self._scheduled = True
            asyncio.get_running_loop().call_later(shortage * PAUSE_SECONDS, self._write_refusals)
        elif self._waiting:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._write_refusals)
