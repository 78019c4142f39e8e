"""Database access: connections, migrations and transactions of SQLite or PostgreSQL.

Both run the same statements. The differences are here: how a connection is made, how a write
transaction begins, and how processes that start concurrently elect one to migrate.

Every write transaction is idempotent, so a caller that lost a reply retries it.
"""

import asyncio
import os
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from reservation.adapters.sql import postgresql, schema_version
from reservation.adapters.sql.errors import DatabaseUnfit
from reservation.domain.levels import HIGHEST_LEVEL

__all__ = ["SCHEMA_VERSION", "Database", "DatabaseUnfit"]

#: The newest migration; a test compares it with the folder.
SCHEMA_VERSION: Final = "0011"
#: Page cache of one SQLite connection.
SQLITE_CACHE_KIB: Final = 64 * 1024
#: Size of the write-ahead log that triggers a checkpoint: 32 MB, so that a page that many batches
#: change is written to the file once.
SQLITE_CHECKPOINT_PAGES: Final = 8_192

#: How long a transaction waits for another process's. The longest one, a batch of the flusher on a
#: slow disk, takes well under a second; waiting is unfair, so the bound is many times that.
BUSY_SECONDS: Final = 15.0
#: SQLite's busy time-out for the write lock before we retry. SQLite's own back-off grows to a tenth
#: of a second, and a flusher under load frees the lock for a few milliseconds at a time: in one
#: long wait, a payment missed those gaps for seconds.
WRITE_RETRY_SECONDS: Final = 0.01
#: How long a start waits for another process's migration.
MIGRATE_SECONDS: Final = 60
#: Key of the migration's advisory lock in PostgreSQL: an arbitrary, unique number.
MIGRATE_LOCK: Final = 7_305_808_869_229_538_675


_NEW_LEVEL: Final = text("INSERT INTO installation (name, value) VALUES ('level', :level)")


class Engines(NamedTuple):
    """One engine for reads and one for writes; PostgreSQL has one for both."""

    reading: AsyncEngine
    writing: AsyncEngine


class Database:
    """Connections to one database.

    It connects and migrates at its first use; if that fails, the use fails and the next one
    retries. So a process may start before its database does.

    Args:
        url: `sqlite:///PATH`, or `postgresql://...` in any form that libpq reads, with
            `?host=/DIRECTORY` for a unix socket.

    Raises:
        ValueError: the URL is of neither kind.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.is_sqlite = _is_sqlite(url)
        self._engines: Engines | None = None
        self._opening: asyncio.Task[Engines] | None = None
        # SQLite has one writer at a time. Writers of one process queue here in FIFO order, because
        # SQLite's busy handler sleeps and is not fair.
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> "Database":
        """Connect at once.

        Raises:
            ValueError: the URL is of neither kind.
            DatabaseUnfit: the database must not be used, or its tables cannot be made.
            SQLAlchemyError, OSError: the database does not respond.
        """
        database = cls(url)
        await database.connect()
        return database

    async def connect(self) -> Engines:
        """Connect and migrate, unless that is done; raises the errors of `open`.

        Any number of processes may do this at once: one migrates, the others wait for it.
        """
        if self._engines is not None:
            return self._engines
        if self._opening is None:
            self._opening = asyncio.create_task(self._connect())
            self._opening.add_done_callback(self._connected)
        # A cancelled caller must not cancel a migration in progress.
        return await asyncio.shield(self._opening)

    async def _connect(self) -> Engines:
        engines = await _make_engines(self._url)
        try:
            await self._migrate(engines)
        except BaseException:
            await _dispose(engines)
            raise
        return engines

    def _connected(self, task: asyncio.Task[Engines]) -> None:
        self._opening = None
        if not task.cancelled() and task.exception() is None:
            self._engines = task.result()

    async def aclose(self) -> None:
        """Close all connections."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        if self._engines is not None:
            await _dispose(self._engines)

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[AsyncConnection]:
        """A connection for reads; each statement sees the latest committed rows."""
        async with (await self.connect()).reading.connect() as connection:
            yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncGenerator[AsyncConnection]:
        """A connection whose reads all see one snapshot."""
        async with (await self.connect()).reading.connect() as connection:
            # SQLite's transactions are snapshots from their first read on.
            if not self.is_sqlite:
                await connection.execute(
                    text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
                )
            yield connection

    async def complete_restore(self, mark: Callable[[AsyncConnection], Awaitable[None]]) -> None:
        """Migrate restored tables, and set the mark of the restore in the same transaction.

        Raises:
            DatabaseUnfit: there are no tables.
            SQLAlchemyError, OSError: the database does not respond.
        """
        engines = await _make_engines(self._url)
        try:
            async with self._write(engines) as connection:
                if not await connection.run_sync(schema_version.stored):
                    raise DatabaseUnfit("the database has no tables of the service")
                await self._wait_for_turn(connection)
                await connection.run_sync(schema_version.complete_restore)
                await connection.run_sync(schema_version.upgrade)
                await mark(connection)
        finally:
            await _dispose(engines)

    async def inspect(self) -> tuple[list[schema_version.PendingMigration], int]:
        """The pending migrations and the level, without applying any.

        Raises:
            DatabaseUnfit: the database must not be used.
            SQLAlchemyError, OSError: the database does not respond.
        """
        async with self.unmigrated() as connection:
            pending = await connection.run_sync(schema_version.pending)
            return pending, await schema_version.level_of(connection)

    async def inspect_level(self) -> int:
        """The level, without applying migrations; raises the errors of `inspect`."""
        async with self.unmigrated() as connection:
            return await schema_version.level_of(connection)

    @asynccontextmanager
    async def unmigrated(self) -> AsyncGenerator[AsyncConnection]:
        """A connection for reads of a database that stays as it is."""
        engines = await _make_engines(self._url)
        try:
            async with engines.reading.connect() as connection:
                yield connection
        finally:
            await _dispose(engines)

    @asynccontextmanager
    async def write(self) -> AsyncGenerator[AsyncConnection]:
        """One transaction: committed when the block ends, rolled back when it raises."""
        engines = await self.connect()
        async with self._write(engines) as connection:
            yield connection

    @asynccontextmanager
    async def _write(self, engines: Engines) -> AsyncGenerator[AsyncConnection]:
        if not self.is_sqlite:
            async with engines.writing.begin() as connection:
                yield connection
            return
        async with self._turn, AsyncExitStack() as stack:
            yield await self._begun(engines, stack)

    @staticmethod
    async def _begun(engines: Engines, stack: AsyncExitStack) -> AsyncConnection:
        """SQLite's write lock, once no other process holds it."""
        give_up_at = asyncio.get_running_loop().time() + BUSY_SECONDS
        while True:
            try:
                return await stack.enter_async_context(engines.writing.begin())
            except OperationalError as error:
                if not _is_busy(error) or asyncio.get_running_loop().time() > give_up_at:
                    raise
            # A cancellation point: a process that is shutting down must not be stuck inside SQLite.
            await asyncio.sleep(0)

    async def schema_version(self) -> str:
        """The newest applied migration, or "" for none."""
        async with self.read() as connection:
            return await connection.run_sync(_applied)

    async def check(self) -> None:
        """Check, with a write, that commits are durable.

        Raises:
            SQLAlchemyError, OSError: they are not.
        """
        async with self.write() as connection:
            if not self.is_sqlite:
                encoding = await connection.execute(text("SHOW server_encoding"))
                postgresql.refuse_encoding(encoding.scalar_one())
                answer = await connection.execute(text("SHOW synchronous_commit"))
                if answer.scalar_one() == "off":
                    raise DatabaseUnfit(
                        "synchronous_commit is off: an intent could be lost after the "
                        "payment was captured"
                    )
            await connection.execute(
                text(
                    "INSERT INTO probes (name, at_ms) VALUES ('check', 1)"
                    " ON CONFLICT (name) DO UPDATE SET at_ms = probes.at_ms + 1"
                )
            )
        applied = await self.schema_version()
        # A newer schema is fine: each migration is compatible with the code before it.
        if applied < SCHEMA_VERSION:
            raise DatabaseUnfit(
                f"the schema is at {applied!r}, this version needs {SCHEMA_VERSION!r}"
            )

    async def _migrate(self, engines: Engines) -> None:
        if self.is_sqlite:
            await _use_wal(engines)
        async with engines.reading.connect() as connection:
            if await connection.run_sync(_applied) >= SCHEMA_VERSION:
                return
        async with self._write(engines) as connection:
            await self._wait_for_turn(connection)
            await connection.run_sync(_upgrade)

    async def _wait_for_turn(self, connection: AsyncConnection) -> None:
        """Wait until no other process migrates; SQLite has one writer anyway."""
        if not self.is_sqlite:
            await connection.execute(text(f"SET LOCAL lock_timeout = '{MIGRATE_SECONDS}s'"))
            await connection.execute(
                text("SELECT pg_advisory_xact_lock(:name)"), {"name": MIGRATE_LOCK}
            )


async def _dispose(engines: Engines) -> None:
    await engines.reading.dispose()
    await engines.writing.dispose()


async def _use_wal(engines: Engines) -> None:
    """Switch the file to a write-ahead log, permanently; no change if it has one."""
    deadline = asyncio.get_running_loop().time() + BUSY_SECONDS
    while True:
        try:
            async with engines.reading.connect() as connection:
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


def _applied(connection: Connection) -> str:
    with connection.begin():
        return schema_version.applied(connection)


def _upgrade(connection: Connection) -> None:
    if schema_version.is_restoring(connection):
        raise DatabaseUnfit("a restore is incomplete: repeat `reservation restore load`")
    is_new = not schema_version.applied(connection)
    schema_version.upgrade(connection)
    if is_new:
        # No older process can be running on a new installation.
        connection.execute(_NEW_LEVEL, {"level": HIGHEST_LEVEL})
        schema_version.bar(connection)


def _is_busy(error: OperationalError) -> bool:
    code = getattr(error.orig, "sqlite_errorcode", 0)
    # The lower byte is the primary error code.
    return code & 0xFF == sqlite3.SQLITE_BUSY


def _is_sqlite(url: str) -> bool:
    try:
        kind = make_url(url)
    except ArgumentError as error:
        raise ValueError("the database URL is malformed") from error
    match kind.drivername:
        case "sqlite":
            if not kind.database or kind.database == ":memory:":
                raise ValueError("SQLite requires a file: several processes use it")
            return True
        case "postgresql" | "postgres":
            return False
        case _:
            raise ValueError("the database URL must begin with sqlite:/// or postgresql://")


async def _make_engines(url: str) -> Engines:
    if not _is_sqlite(url):
        engine = postgresql.make_engine(url, await postgresql.inspect_server(url))
        return Engines(engine, engine)
    kind = make_url(url)
    return Engines(_make_sqlite(kind, writes=False), _make_sqlite(kind, writes=True))


def _make_sqlite(url: URL, *, writes: bool) -> AsyncEngine:
    # The file contains buyers and payment secrets; SQLite's journal files inherit its mode.
    os.close(os.open(url.database or "", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    engine = create_async_engine(
        url.set(drivername="sqlite+aiosqlite"),
        connect_args={
            "timeout": WRITE_RETRY_SECONDS if writes else BUSY_SECONDS,
            "isolation_level": None,
        },
        # SQLite has one writer at a time.
        pool_size=1 if writes else postgresql.POOL_SIZE,
        max_overflow=0 if writes else postgresql.POOL_MORE,
        pool_timeout=postgresql.POOL_SECONDS,
    )
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_write if writes else _begin_read)
    return engine


def _prepare_sqlite(dbapi_connection: Any, _record: object) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    # An intent must survive a power failure, and so must a batch before the outbox is trimmed: each
    # commit is synced. NORMAL would sync only at checkpoints.
    cursor.execute("PRAGMA synchronous = FULL")
    # Order ids are random, so inserts hit random index pages: with the default 2 MB, a large sale
    # would read and write the same pages repeatedly.
    cursor.execute(f"PRAGMA cache_size = {-SQLITE_CACHE_KIB}")
    cursor.execute(f"PRAGMA wal_autocheckpoint = {SQLITE_CHECKPOINT_PAGES}")
    cursor.close()


def _begin_read(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_write(connection: Connection) -> None:
    # Take the write lock at once: a transaction that reads first and writes later fails without
    # waiting where another one was faster.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
