"""Database access: connections, migrations and transactions of SQLite or PostgreSQL.

Both run the same statements. The differences are in `postgresql` and `sqlite`, and here: how a
write transaction begins, and how processes that start concurrently elect one to migrate.

Every write transaction is idempotent, so a caller that lost a reply retries it.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, NamedTuple, TypeVar

from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from reservation.adapters.sql import postgresql, schema_version, sqlite
from reservation.adapters.sql.errors import DatabaseUnfit
from reservation.domain.levels import HIGHEST_LEVEL

__all__ = ["SCHEMA_VERSION", "Database", "DatabaseUnfit"]

Result = TypeVar("Result")

#: The newest migration; a test compares it with the folder.
SCHEMA_VERSION: Final = "0015"
#: How long a start waits for another process's migration.
MIGRATE_SECONDS: Final = 60
#: Time-out of one statement of a migration.
STATEMENT_SECONDS: Final = 3600.0
#: Key of the migration's advisory lock in PostgreSQL: an arbitrary, unique number.
MIGRATE_LOCK: Final = 7_305_808_869_229_538_675


_NEW_LEVEL: Final = text("INSERT INTO installation (name, value) VALUES ('level', :level)")


class Engines(NamedTuple):
    """One engine for reads and one for writes; PostgreSQL has one for both."""

    reading: AsyncEngine
    writing: AsyncEngine
    #: Of SQLite.
    threads: sqlite.Threads | None


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
        """A connection for reads: with SQLite of one snapshot, else each of the latest rows."""
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
            async with self._migrating(engines) as writing, self._write(writing) as connection:
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

    async def run_read(self, work: Callable[[Connection], Result]) -> Result:
        """Run reads as a whole: one snapshot with SQLite, and fewer hand-overs than `read`."""
        engines = await self.connect()
        if engines.threads is not None:
            return await engines.threads.run(work, writes=False)
        async with engines.reading.connect() as connection:
            return await connection.run_sync(work)

    async def run_write(self, work: Callable[[Connection], Result]) -> Result:
        """Run one transaction as a whole: fewer hand-overs than `write`.

        Args:
            work: may run more than once, with SQLite in a thread.

        Raises:
            SQLAlchemyError, OSError: the outcome is unknown, as it is for a cancelled caller.
        """
        engines = await self.connect()
        threads = engines.threads
        if threads is None:
            async with engines.writing.begin() as connection:
                return await connection.run_sync(work)
        async with self._turn:
            return await _retried(lambda: threads.run(work, writes=True))

    @asynccontextmanager
    async def _write(self, engines: Engines) -> AsyncGenerator[AsyncConnection]:
        if not self.is_sqlite:
            async with engines.writing.begin() as connection:
                yield connection
            return
        async with self._turn, AsyncExitStack() as stack:
            yield await _retried(lambda: stack.enter_async_context(engines.writing.begin()))

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
            await sqlite.use_wal(engines.reading)
        async with engines.reading.connect() as connection:
            if await connection.run_sync(_applied) >= SCHEMA_VERSION:
                return
        async with self._migrating(engines) as writing, self._write(writing) as connection:
            await self._wait_for_turn(connection)
            await connection.run_sync(_upgrade)

    @asynccontextmanager
    async def _migrating(self, engines: Engines) -> AsyncGenerator[Engines]:
        """Engines whose statements may take as long as a scan of the largest table."""
        if self.is_sqlite:
            yield engines
            return
        server = await postgresql.inspect_server(self._url)
        engine = postgresql.make_engine(self._url, server, command_seconds=STATEMENT_SECONDS)
        try:
            yield Engines(engine, engine, None)
        finally:
            await engine.dispose()

    async def _wait_for_turn(self, connection: AsyncConnection) -> None:
        """Wait until no other process migrates; SQLite has one writer anyway."""
        if not self.is_sqlite:
            await connection.execute(text(f"SET LOCAL lock_timeout = '{MIGRATE_SECONDS}s'"))
            await connection.execute(
                text("SELECT pg_advisory_xact_lock(:name)"), {"name": MIGRATE_LOCK}
            )


async def _retried(begin: Callable[[], Awaitable[Result]]) -> Result:
    """Repeat while another connection has SQLite's write lock."""
    give_up_at = asyncio.get_running_loop().time() + sqlite.BUSY_SECONDS
    while True:
        try:
            return await begin()
        except OperationalError as error:
            if not sqlite.is_busy(error) or asyncio.get_running_loop().time() > give_up_at:
                raise
        # A cancellation point: a process that is shutting down must not be stuck inside SQLite.
        await asyncio.sleep(0)


async def _dispose(engines: Engines) -> None:
    if engines.threads is not None:
        await engines.threads.aclose()
    await engines.reading.dispose()
    await engines.writing.dispose()


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
        return Engines(engine, engine, None)
    kind = make_url(url)
    reading = sqlite.make_engine(kind, writes=False)
    return Engines(reading, sqlite.make_engine(kind, writes=True), sqlite.Threads(kind))
