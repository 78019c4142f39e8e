"""SQLite: its engines, and transactions that run as a whole in a thread.

An AsyncConnection hands each step of a statement over to a thread and back, which costs more than
the statement. `Threads` hands over a transaction: payments, the flusher and the marks use it.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from reservation.adapters.sql import postgresql
from reservation.adapters.sql.errors import DatabaseUnfit

__all__ = ["BUSY_SECONDS", "Threads", "is_busy", "make_engine", "use_wal"]

Result = TypeVar("Result")

#: Page cache of one connection.
CACHE_KIB: Final = 64 * 1024
#: Size of the write-ahead log that triggers a checkpoint: 32 MB, so that a page that many batches
#: change is written to the file once.
CHECKPOINT_PAGES: Final = 8_192

#: How long a transaction waits for another process's. The longest one, a batch of the flusher on a
#: slow disk, takes well under a second; waiting is unfair, so the bound is many times that.
BUSY_SECONDS: Final = 15.0
#: SQLite's busy time-out for the write lock before we retry. SQLite's own back-off grows to a tenth
#: of a second, and a flusher under load frees the lock for a few milliseconds at a time: in one
#: long wait, a payment missed those gaps for seconds.
WRITE_RETRY_SECONDS: Final = 0.01
#: How long `aclose` waits for transactions in progress. A stuck disk may block one forever.
CLOSE_SECONDS_MAX: Final = 2.0


class Threads:
    """Runs transactions as a whole: writes in one thread, reads in another.

    Args:
        url: of the file.
    """

    def __init__(self, url: URL) -> None:
        self._engines = {False: _blocking(url, writes=False), True: _blocking(url, writes=True)}
        self._threads = {
            False: ThreadPoolExecutor(1, "sqlite-read"),
            True: ThreadPoolExecutor(1, "sqlite-write"),
        }
        #: Transactions in progress, also of callers that were cancelled.
        self._running: set[Future[Any]] = set()
        self._closed = False

    async def run(self, work: Callable[[Connection], Result], *, writes: bool) -> Result:
        """Run one transaction; if its caller is cancelled, it may still commit.

        Raises:
            OperationalError: with `is_busy`, another connection had the write lock and nothing was
                written.
            OSError: the database is closed.
        """
        engine = self._engines[writes]

        def transaction() -> Result:
            with engine.begin() as connection:
                return work(connection)

        return await self._hand_over(transaction, writes=writes)

    async def _hand_over(self, transaction: Callable[[], Result], *, writes: bool) -> Result:
        if self._closed:
            raise OSError("the database is closed")
        running = self._threads[writes].submit(transaction)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.wrap_future(running)

    async def aclose(self) -> None:
        """Wait a moment for the transactions in progress, and close the connections."""
        self._closed = True
        running = [asyncio.wrap_future(one) for one in list(self._running)]
        if running:
            await asyncio.wait(running, timeout=CLOSE_SECONDS_MAX)
        for threads in self._threads.values():
            threads.shutdown(wait=False, cancel_futures=True)
        for engine in self._engines.values():
            engine.dispose()


def make_engine(url: URL, *, writes: bool) -> AsyncEngine:
    """An engine for single statements."""
    _create(url)
    engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"), **_options(writes=writes))
    _listen(engine.sync_engine, writes=writes)
    return engine


def _blocking(url: URL, *, writes: bool) -> Engine:
    _create(url)
    engine = create_engine(url.set(drivername="sqlite+pysqlite"), **_options(writes=writes))
    _listen(engine, writes=writes)
    return engine


def _create(url: URL) -> None:
    # The file contains buyers and payment secrets; SQLite's journal files inherit its mode.
    os.close(os.open(url.database or "", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))


def _options(*, writes: bool) -> dict[str, Any]:
    return {
        "connect_args": {
            "timeout": WRITE_RETRY_SECONDS if writes else BUSY_SECONDS,
            "isolation_level": None,
        },
        # SQLite has one writer at a time.
        "pool_size": 1 if writes else postgresql.POOL_SIZE,
        "max_overflow": 0 if writes else postgresql.POOL_MORE,
        "pool_timeout": postgresql.POOL_SECONDS,
    }


def _listen(engine: Engine, *, writes: bool) -> None:
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin_write if writes else _begin_read)


def _prepare(dbapi_connection: Any, _record: object) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    # An intent must survive a power failure, and so must a batch before the outbox is trimmed: each
    # commit is synced. NORMAL would sync only at checkpoints.
    cursor.execute("PRAGMA synchronous = FULL")
    # Order ids are random, so inserts hit random index pages: with the default 2 MB, a large sale
    # would read and write the same pages repeatedly.
    cursor.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
    cursor.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
    cursor.close()


def _begin_read(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_write(connection: Connection) -> None:
    # Take the write lock at once: a transaction that reads first and writes later fails without
    # waiting where another one was faster.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


async def use_wal(engine: AsyncEngine) -> None:
    """Switch the file to a write-ahead log, permanently; no change if it has one."""
    deadline = asyncio.get_running_loop().time() + BUSY_SECONDS
    while True:
        try:
            async with engine.connect() as connection:
                raw = await connection.get_raw_connection()
                cursor = await raw.driver_connection.execute("PRAGMA journal_mode = WAL")  # pyright: ignore[reportOptionalMemberAccess]
                row = await cursor.fetchone()
                await cursor.close()
        except sqlite3.OperationalError:
            # This change ignores the busy time-out when another process makes it too.
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.05)
            continue
        if row[0] != "wal":
            raise DatabaseUnfit(
                f"SQLite cannot use a write-ahead log here (journal_mode is {row[0]})"
            )
        return


def is_busy(error: OperationalError) -> bool:
    """Whether another connection has the lock."""
    code = getattr(error.orig, "sqlite_errorcode", 0)
    # The lower byte is the primary error code.
    return code & 0xFF == sqlite3.SQLITE_BUSY
