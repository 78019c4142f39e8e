"""SQL in the loop's own thread: the real SQLite, each statement after a drawn delay.

The simulation replaces the queue between aiosqlite and its thread. A statement runs at one moment
of virtual time; a transaction spans many, so another process may hold its lock, and it waits. A
transaction that the service hands over as a whole runs at one moment.
"""

import sqlite3
from collections import deque
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from sqlalchemy.exc import OperationalError

from reservation.adapters.sql.sqlite import Threads, is_busy
from tests.faults.simulation.loop import CURRENT, NEUTRAL, VirtualLoop
from tests.faults.simulation.network import Fate, Link
from tests.faults.simulation.processes import Process
from tests.faults.simulation.trace import Trace

__all__ = ["InlineQueue", "InlineThreads", "NoThread", "SqlSide"]

Result = TypeVar("Result")

#: Calls that reach the disk, and so take time and may fail. All else is aiosqlite's own.
_SLOW = {"execute", "executemany", "commit"}
#: As `reservation.adapters.sql.engine` configures SQLite.
_BUSY_SECONDS = 15.0
_BUSY_PAUSE = 0.02


class SqlSide:
    """The database of a simulation, with injected faults."""

    def __init__(self, loop: VirtualLoop, trace: Trace, link: Link) -> None:
        self.loop = loop
        self.trace = trace
        self.link = link
        #: It answers with an error until then.
        self.away_until = 0.0

    def fate(self, process: Process) -> Fate:
        """The fate of the next call of this process."""
        fate = self.link.fate(process.draw)
        return Fate.RESET if self.loop.now < self.away_until else fate


class NoThread:
    """Replaces aiosqlite's thread."""

    def __init__(self, **_: Any) -> None:
        self.daemon = True

    def start(self) -> None:
        """There is nothing to start."""


class InlineQueue:
    """Replaces the queue before aiosqlite's thread: one connection's calls, in order."""

    #: Set for the length of a run.
    side: SqlSide

    def __init__(self) -> None:
        self._process: Process = CURRENT.get()
        self._waiting: deque[tuple[Any, Callable[[], Any]]] = deque()
        self._busy = False
        self._busy_since: float | None = None
        self._connection: sqlite3.Connection | None = None
        self._end = 0

    def put_nowait(self, item: tuple[Any, Callable[[], Any]]) -> None:
        """Take a call; it may be done before this returns."""
        self._waiting.append(item)
        if not self._busy:
            self._next()

    def _next(self) -> None:
        while self._waiting:
            _, function = self._waiting[0]
            if _name_of(function) in _SLOW and self._process.alive:
                self._busy = True
                seconds = self.side.link.seconds(self._process.draw)
                self.side.loop.call_later(seconds, self._slow, context=NEUTRAL)
                return
            self._do(Fate.WELL)
        self._busy = False

    def _slow(self) -> None:
        if not self._process.alive:
            self._next()
            return
        self._do(self.side.fate(self._process))
        if self._busy_since is None:
            self._next()

    def _do(self, fate: Fate) -> None:
        future, function = self._waiting[0]
        name = _name_of(function)
        outcome: Any = None
        error: Exception | None = None
        try:
            if not self._process.alive and name != "close_and_stop":
                raise sqlite3.OperationalError("this process is dead")
            if fate in (Fate.REQUEST_LOST, Fate.RESET):
                raise sqlite3.OperationalError("disk I/O error")
            outcome = function()
            # A server may lose the answer to a commit; a file that fails after its last write does
            # so too.
            if fate is not Fate.WELL and name == "commit":
                raise sqlite3.OperationalError("disk I/O error after the commit")
        except sqlite3.OperationalError as failure:
            if self._waits(failure):
                return
            error = failure
        except Exception as failure:  # noqa: BLE001 - whatever it is, it is the caller's
            error = failure
        if error is not None and name in _SLOW:
            self.side.trace.note("sql-error", self._process.name, str(error))
        self._busy_since = None
        self._waiting.popleft()
        if isinstance(outcome, sqlite3.Connection):
            self._opened(outcome)
        if name == "close_and_stop":
            self._process.forget(self._end)
        if future is None or future.done():
            return
        if error is None:
            future.set_result(outcome)
        else:
            future.set_exception(error)

    def _waits(self, failure: sqlite3.OperationalError) -> bool:
        """Whether to wait for another's transaction, as SQLite would."""
        if getattr(failure, "sqlite_errorcode", 0) != sqlite3.SQLITE_BUSY:
            return False
        loop = self.side.loop
        if self._busy_since is None:
            self._busy_since = loop.now
            self.side.trace.note("sql-busy", self._process.name, "")
        if loop.now - self._busy_since > _BUSY_SECONDS:
            return False
        loop.call_later(
            _BUSY_PAUSE * (0.5 + self._process.draw.random()), self._slow, context=NEUTRAL
        )
        return True

    def _opened(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA busy_timeout = 0")
        self._connection = connection
        self._end = self._process.at_end(self._die)

    def _die(self) -> None:
        """The process is killed: an uncommitted write never happened."""
        if self._connection is not None:
            self._connection.close()


class InlineThreads(Threads):
    """Replaces the threads that run whole transactions."""

    #: Set for the length of a run.
    side: ClassVar[SqlSide]

    async def _hand_over(self, transaction: Callable[[], Result], *, writes: bool) -> Result:
        loop, process = self.side.loop, CURRENT.get()
        done = loop.create_future()

        def arrive() -> None:
            # A transaction of a dead process never happens.
            if process.alive and not done.done():
                self._arrive(process, transaction, done, writes=writes)

        loop.call_later(self.side.link.seconds(process.draw), arrive, context=NEUTRAL)
        return await done

    def _arrive(self, process: Process, transaction: Any, done: Any, *, writes: bool) -> None:
        fate = self.side.fate(process)
        try:
            if fate in (Fate.REQUEST_LOST, Fate.RESET):
                raise _failed("disk I/O error")
            outcome = transaction()
            if fate is not Fate.WELL and writes:
                raise _failed("disk I/O error after the commit")
        except OperationalError as error:
            kind = "sql-busy" if is_busy(error) else "sql-error"
            self.side.trace.note(kind, process.name, str(error.orig))
            done.set_exception(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's
            done.set_exception(error)
        else:
            done.set_result(outcome)


def _failed(reason: str) -> OperationalError:
    return OperationalError(None, None, sqlite3.OperationalError(reason))


def _name_of(function: Callable[[], Any]) -> str:
    inner = getattr(function, "func", function)
    return getattr(inner, "__name__", "")
