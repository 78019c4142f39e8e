"""Tells newcomers that it is "not now", a few at a time: those who were let in come first.

A refusal costs about half a hold, and whoever is told sends again at once. So the shorter
the processor's time, the smaller the share of it that refusals get; where there is enough, all are
told.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["LoadShedder", "RejectedRequest"]

#: Told in one turn of the loop. Whoever is told sends again, so this bounds what a turn reads as
#: well, and with that how long all else waits: a call to Redis is sent and read once a turn.
#: Without it thousands of refusals made a turn of a tenth of a second, and nine holds of ten were
#: lost to them. Told one by one each costs twice as much.
TOLD_A_TURN: Final = 24
#: From one such turn to the next while the processor is full, and less where its time is only
#: getting short: 24 take about a millisecond. Without this pause refusals took a third of the time,
#: and of the holds four in ten were lost.
PAUSE_SECONDS: Final = 0.01
#: One of so many is the one who has waited longest, the others have just come: where more come
#: than can be told, most are told in milliseconds, and nobody waits for ever. In the order of
#: arrival all would wait for as long as the line is.
ONE_OF_THE_FIRST_IN: Final = 8


class RejectedRequest(Protocol):
    """A request that is turned away."""

    disconnected: bool

    def write(self, status: int, message: bytes) -> None:
        """Answer now, once; nothing where nobody is there any more."""
        ...


class LoadShedder:
    """Those who are to be told."""

    def __init__(self, shortage: Callable[[], float]) -> None:
        """`shortage` says how short the processor's time is: from 0 to 1, which is none left."""
        self._shortage = shortage
        self._waiting: deque[tuple[RejectedRequest, int, bytes, Callable[[], None]]] = deque()
        #: Whether the next turn is planned.
        self._planned = False

    def add(
        self, asked: RejectedRequest, status: int, message: bytes, told: Callable[[], None]
    ) -> None:
        """Answer it in its turn; `told` is called once it is answered or known to have gone."""
        self._waiting.append((asked, status, message, told))
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        """One turn's; it goes on also where one of them breaks, for others wait."""
        self._planned = False
        if not self._waiting:
            return
        try:
            written = 0
            while self._waiting and written < TOLD_A_TURN:
                last = written % ONE_OF_THE_FIRST_IN
                taken = self._waiting.pop() if last else self._waiting.popleft()
                asked, status, message, told = taken
                # Who gave up waiting takes nobody's turn.
                written += not asked.disconnected
                asked.write(status, message)
                told()
        finally:
            self._plan()

    def _plan(self) -> None:
        # Busy, also with nobody left: the next who comes must not be told before the pause.
        if shortage := self._shortage():
            self._planned = True
            asyncio.get_running_loop().call_later(shortage * PAUSE_SECONDS, self._tell)
        elif self._waiting:
            self._planned = True
            asyncio.get_running_loop().call_soon(self._tell)
