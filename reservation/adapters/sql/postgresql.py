"""How connections to PostgreSQL are made, through a pooler too, and what it must be."""

from typing import Any, Final, NamedTuple, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from reservation.adapters.sql.unfit import LedgerUnfit

__all__ = [
    "POOL_MORE",
    "POOL_SECONDS",
    "POOL_SIZE",
    "Server",
    "look",
    "make_engine",
    "refuse_encoding",
]

#: How long PostgreSQL may take to let us in, and to answer one statement.
CONNECT_SECONDS: Final = 5.0
COMMAND_SECONDS: Final = 15.0
#: How long PostgreSQL keeps the locks of a transaction that says nothing more: a machine that lost
#: its power or its network would else hold up a sale's flusher for two hours, which is how long TCP
#: takes to notice.
IDLE_SECONDS: Final = 20
#: How long a caller waits for one of the pooled connections.
POOL_SECONDS: Final = 5.0
#: Connections of one process: intents share one, the rest are reads and the workers' batches.
POOL_SIZE: Final = 5
POOL_MORE: Final = 5
#: A buyer's emoji or the gateway's Korean does not fit into any other.
ENCODING: Final = "UTF8"


class Server(NamedTuple):
    """What the first connection found."""

    #: A pooler such as PgBouncer is in between: each transaction may run on another connection of
    #: PostgreSQL, so nothing may outlive its transaction.
    pooled: bool


class _Pooled(asyncpg.Connection):
    """A connection through a pooler: what takes more than one step needs a transaction."""

    async def set_type_codec(self, *args: Any, **more: Any) -> None:
        # It prepares a query and then runs it.
        async with self.transaction():  # pyright: ignore[reportUnknownMemberType]
            await super().set_type_codec(*args, **more)  # pyright: ignore[reportUnknownMemberType]


def refuse_encoding(encoding: str) -> None:
    """Refuse a database that cannot hold each name and each answer of the payment gateway.

    Raises:
        LedgerUnfit: its encoding is not UTF8.
    """
    if encoding != ENCODING:
        raise LedgerUnfit(
            f"the database's encoding is {encoding}, it must be {ENCODING}", row="sql-encoding"
        )


async def look(url: str) -> Server:
    """Connect once, and see what is there.

    Raises:
        LedgerUnfit: the database must not be used.
        ConnectionError: it does not answer, or does not let us in.
    """
    connection = await _connect(url, statement_cache_size=0)
    try:
        async with connection.transaction():
            encoding = await connection.fetchval("SHOW server_encoding")
            process = await connection.fetchval("SELECT pg_backend_pid()")
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise ConnectionError(f"PostgreSQL does not answer: {error}") from error
    finally:
        await connection.close(timeout=CONNECT_SECONDS)
    refuse_encoding(encoding)
    # A pooler answers for many connections, so the process that it names is none of PostgreSQL's.
    return Server(pooled=process != connection.get_server_pid())


def make_engine(url: str, server: Server) -> AsyncEngine:
    """An engine for a server that was looked at."""
    pooled = server.pooled

    async def connect() -> Any:
        if pooled:
            return await _connect(url, statement_cache_size=0, connection_class=_Pooled)
        made = await _connect(url)
        try:
            await made.execute(f"SET {_idle()}")
        except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise ConnectionError(f"PostgreSQL does not answer: {error}") from error
        return made

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        # Statements without a name are gone with the next one: PostgreSQL's connections, which
        # others use as well, collect none.
        connect_args={"prepared_statement_cache_size": 0, "prepared_statement_name_func": _no_name}
        if pooled
        else {},
        pool_size=POOL_SIZE,
        max_overflow=POOL_MORE,
        pool_timeout=POOL_SECONDS,
        # After a restart of the server an old connection is found dead here, not by a buyer.
        pool_pre_ping=True,
    )
    if pooled:
        # What is set for a session would stay with whoever gets that connection next.
        event.listen(engine.sync_engine, "begin", _limit_idleness)
    return engine


async def _connect(url: str, **more: Any) -> Any:
    try:
        # The driver reads the URL itself, so everything that libpq knows may stand in it.
        return await cast("Any", asyncpg).connect(
            url,
            timeout=CONNECT_SECONDS,
            command_timeout=COMMAND_SECONDS,
            # A pooler lets only few settings pass.
            server_settings={"application_name": "reservation"},
            **more,
        )
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise ConnectionError(f"PostgreSQL does not let us in: {error}") from error
    except OSError as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(f"PostgreSQL does not answer: {reason}") from error


def _no_name() -> str:
    return ""


def _limit_idleness(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL {_idle()}")


def _idle() -> str:
    return f"idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
