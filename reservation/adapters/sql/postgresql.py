"""Connections to PostgreSQL, direct or through a pooler, and the checks of the server."""

import time
from functools import partial
from typing import Any, Final, NamedTuple, cast

import asyncpg  # pyright: ignore[reportMissingTypeStubs]
import structlog
from sqlalchemy import Connection, Dialect, ExceptionContext, event
from sqlalchemy.exc import (
    DBAPIError,
    DisconnectionError,
    InvalidatePoolError,
    OperationalError,
)
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from reservation.adapters.sql.errors import DatabaseUnfit, is_outage

__all__ = [
    "POOL_MORE",
    "POOL_SECONDS",
    "POOL_SIZE",
    "Server",
    "inspect_server",
    "make_engine",
    "refuse_encoding",
]

log = structlog.get_logger(__name__)

#: Time-outs of a connection attempt and of one statement.
CONNECT_SECONDS: Final = 5.0
COMMAND_SECONDS: Final = 15.0
#: How long PostgreSQL keeps an idle transaction and its locks. Otherwise a host that lost power or
#: network would block a sale's flusher for two hours, until TCP keepalive detects it.
IDLE_SECONDS: Final = 20
#: How long a caller waits for a pooled connection.
POOL_SECONDS: Final = 5.0
#: Connections of one process: intents share one, the others serve reads and the workers' batches.
POOL_SIZE: Final = 5
POOL_MORE: Final = 5
#: A connection that was idle for longer is tested before its use.
UNTESTED_SECONDS: Final = 1.0
_IDLE_SINCE: Final = "idle_since"
#: No other encoding can store both emoji and the gateway's Korean.
ENCODING: Final = "UTF8"
#: All base errors of the driver. `InternalClientError` reports an invalid protocol state: after a
#: shutdown notice between two responses, the connection accepts no further statement.
_DRIVER_ERRORS: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class Server(NamedTuple):
    """Properties that the first connection detected."""

    #: A pooler such as PgBouncer is in between: each transaction may run on another server
    #: connection, so session state must not outlive a transaction.
    pooled: bool


class _Connection(asyncpg.Connection):
    """A connection whose set-up errors are raised as `ConnectionError`."""

    async def set_type_codec(self, *args: Any, **more: Any) -> None:
        # SQLAlchemy calls this while it connects, and does not wrap the driver's errors.
        try:
            await self._set_type_codec(*args, **more)
        except _DRIVER_ERRORS as error:
            raise ConnectionError(f"PostgreSQL does not answer: {error}") from error

    async def _set_type_codec(self, *args: Any, **more: Any) -> None:
        await super().set_type_codec(*args, **more)  # pyright: ignore[reportUnknownMemberType]


class _Pooled(_Connection):
    """A connection through a pooler: statements that belong together need a transaction."""

    async def _set_type_codec(self, *args: Any, **more: Any) -> None:
        # asyncpg prepares a statement here, then executes it.
        async with self.transaction():  # pyright: ignore[reportUnknownMemberType]
            await super()._set_type_codec(*args, **more)


def refuse_encoding(encoding: str) -> None:
    """Reject a database that cannot store every name and every answer of the payment gateway.

    Raises:
        DatabaseUnfit: its encoding is not UTF8.
    """
    if encoding != ENCODING:
        raise DatabaseUnfit(
            f"the database's encoding is {encoding}, it must be {ENCODING}", row="sql-encoding"
        )


async def inspect_server(url: str) -> Server:
    """Connect once, check the server and detect a pooler.

    Raises:
        DatabaseUnfit: the database must not be used.
        ConnectionError: it does not respond, or refuses the connection.
    """
    connection = await _connect(url, command_timeout=COMMAND_SECONDS, statement_cache_size=0)
    try:
        async with connection.transaction():
            encoding = await connection.fetchval("SHOW server_encoding")
            process = await connection.fetchval("SELECT pg_backend_pid()")
    except _DRIVER_ERRORS as error:
        raise ConnectionError(f"PostgreSQL does not answer: {error}") from error
    finally:
        await connection.close(timeout=CONNECT_SECONDS)
    refuse_encoding(encoding)
    # A pooler reports its own process id, so it differs from the backend's.
    return Server(pooled=process != connection.get_server_pid())


def make_engine(url: str, server: Server, *, command_seconds: float | None = None) -> AsyncEngine:
    """An engine for a server that `inspect_server` has checked.

    Args:
        url: of the server.
        server: its properties.
        command_seconds: the time-out of one statement; by default that of calls.
    """
    pooled = server.pooled

    async def connect() -> Any:
        more: dict[str, Any] = {"connection_class": _Connection}
        if pooled:
            more = {"connection_class": _Pooled, "statement_cache_size": 0}
        created = await _connect(url, command_timeout=command_seconds or COMMAND_SECONDS, **more)
        if pooled:
            return created
        try:
            await created.execute(f"SET {_idle()}")
        except BaseException as error:
            # The pool does not own the connection yet, and would not close it.
            created.terminate()
            if isinstance(error, _DRIVER_ERRORS):
                raise ConnectionError(f"PostgreSQL does not answer: {error}") from error
            raise
        return created

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        # Unnamed statements are replaced by the next one, so shared server connections accumulate
        # none.
        connect_args={"prepared_statement_cache_size": 0, "prepared_statement_name_func": _no_name}
        if pooled
        else {},
        pool_size=POOL_SIZE,
        max_overflow=POOL_MORE,
        pool_timeout=POOL_SECONDS,
    )
    event.listen(engine.sync_engine, "checkin", _note_idle)
    event.listen(engine.sync_engine, "checkout", partial(_refuse_closed, engine.dialect))
    event.listen(engine.sync_engine, "handle_error", _name_outage)
    if pooled:
        # A session setting would leak to the next client of that server connection.
        event.listen(engine.sync_engine, "begin", _limit_idleness)
    return engine


async def _connect(url: str, **more: Any) -> Any:
    try:
        # The driver parses the URL itself, so it accepts every libpq parameter.
        return await cast("Any", asyncpg).connect(
            url,
            timeout=CONNECT_SECONDS,
            # A pooler accepts only few start-up settings.
            server_settings={"application_name": "reservation"},
            **more,
        )
    except _DRIVER_ERRORS as error:
        raise ConnectionError(f"PostgreSQL refused the connection: {error}") from error
    except OSError as error:
        reason = str(error) or type(error).__name__
        raise ConnectionError(f"PostgreSQL does not answer: {reason}") from error


def _note_idle(_dbapi_connection: object, record: ConnectionPoolEntry) -> None:
    record.info[_IDLE_SINCE] = time.monotonic()


def _refuse_closed(
    dialect: Dialect, dbapi_connection: Any, record: ConnectionPoolEntry, _proxy: object
) -> None:
    """Replace a connection that was closed, for example by a restart of the server.

    The driver detects most of them. SQLAlchemy's ping takes three round trips, so only a connection
    that was idle is tested: a firewall or NAT may have dropped it.
    """
    if dbapi_connection.driver_connection.is_closed():
        raise DisconnectionError
    idle_since = record.info.get(_IDLE_SINCE)
    if idle_since is None or time.monotonic() - idle_since < UNTESTED_SECONDS:
        return
    try:
        dialect.do_ping(dbapi_connection)
    except (DBAPIError, OSError, dialect.loaded_dbapi.Error) as error:
        raise InvalidatePoolError from error


def _name_outage(context: ExceptionContext) -> OperationalError | None:
    """Convert errors of an unreachable server, which the dialect raises as a plain `DBAPIError`."""
    error = context.sqlalchemy_exception
    if _is_broken_connection(error):
        # The reason distinguishes an outage from a bug in the service.
        log.warning("sql_connection_broken", reason=str(context.original_exception))
        # The pool must discard the connection.
        context.is_disconnect = True
    # Other subclasses already name the cause.
    elif type(error) is not DBAPIError or not is_outage(error):
        return None
    return OperationalError(
        context.statement,
        None,
        context.original_exception,
        connection_invalidated=context.is_disconnect,
    )


def _is_broken_connection(error: Exception | None) -> bool:
    cause = getattr(getattr(error, "orig", None), "__cause__", None)
    return isinstance(cause, asyncpg.InternalClientError)


def _no_name() -> str:
    return ""


def _limit_idleness(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL {_idle()}")


def _idle() -> str:
    return f"idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
