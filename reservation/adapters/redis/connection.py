"""One connection to Redis: writes commands and resolves the futures of their replies.

redis-py opens a connection and does the handshake: addresses, TLS, users. Its path for each command
goes through a pool, a lock, time-outs and a stream, and costs a call of prepares as much as a hold.
So this class takes over the transport after the handshake: one write, and a reply that resolves the
future.
"""

import asyncio
from math import inf
from typing import Any, Final

import hiredis
from redis.exceptions import BusyLoadingError, MasterDownError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from reservation.adapters.redis.addresses import Endpoint

__all__ = ["RedisConnection"]

_CLOSED: Final = "the server closed the connection"
#: Error replies of a server that is not, or not yet, the master.
_NOT_THE_MASTER: Final = (ReadOnlyError, MasterDownError, BusyLoadingError)


class RedisConnection(asyncio.Protocol):
    """One exchange at a time.

    Args:
        connection: redis-py's, after the handshake, with no command in flight. A reference is kept
            because its stream closes the transport when it is collected.
        endpoint: the server it leads to.
    """

    def __init__(self, connection: Any, endpoint: Endpoint) -> None:
        self._connection = connection
        self.endpoint = endpoint
        #: The life of the server it leads to (`errors.life_of`).
        self.life: str = connection.life
        #: The error reply of a server that is not the master, until the pool has handled it.
        self.refused = ""
        #: Set by the pool: the generation it belongs to, and the tick since which it is idle.
        self.generation = 0
        self.idle_since = 0
        self._loop = asyncio.get_running_loop()
        self._reader: Any = hiredis.Reader(
            encoding="utf-8",
            # Damaged bytes must be named in an error, not break the reader.
            errors="backslashreplace",
            replyError=self._error_of,
        )
        self._waiting: asyncio.Future[list[Any]] | None = None
        self._wanted = 0
        self._replies: list[Any] = []
        #: The deadline of the exchange in flight, and the timer that checks it.
        self._late_at = 0.0
        self._checks_at = inf
        self._timer: asyncio.Handle | None = None
        self._usable = True
        # redis-py has no public access to the transport.
        self._transport: asyncio.Transport = connection._writer.transport  # noqa: SLF001
        self._stream: Any = self._transport.get_protocol()
        self._transport.set_protocol(self)

    @property
    def usable(self) -> bool:
        """Whether the next exchange may go over it."""
        # A closing transport accepts a write and drops it.
        return self._usable and self._waiting is None and not self._transport.is_closing()

    def exchange(self, packed: bytes, count: int, *, seconds: float) -> asyncio.Future[list[Any]]:
        """Write `count` commands; the future gets their replies, an error reply as an exception.

        Args:
            packed: the commands as the server reads them.
            count: the number of commands.
            seconds: the deadline for the replies.

        Raises:
            ConnectionError, TimeoutError: redis-py's, from the future; the written commands may
                have run.
        """
        if self._waiting is not None:
            raise RuntimeError("an exchange is in progress on this connection")
        self._wanted, self._replies = count, []
        self._late_at = self._loop.time() + seconds
        # One timer serves many exchanges: when it fires, it checks for a late one.
        if self._checks_at > self._late_at:
            self._schedule_check()
        self._waiting = waiting = self._loop.create_future()
        self._transport.write(packed)
        return waiting

    def close(self) -> None:
        """Close at once; unsent bytes are dropped."""
        self._give_up(RedisConnectionError(_CLOSED))
        self._transport.abort()
        # As redis-py's `disconnect` does, but without a task: a timer closes connections too.
        self._connection._parser.on_disconnect()  # noqa: SLF001
        self._connection._close()  # noqa: SLF001

    def data_received(self, data: bytes) -> None:
        waiting = self._waiting
        if waiting is None:
            # An unsolicited reply must not be taken for the reply to the next command.
            self._usable = False
            return
        try:
            self._reader.feed(data)
            while len(self._replies) < self._wanted:
                reply = self._reader.gets()
                if reply is False:
                    return
                self._replies.append(reply)
        except hiredis.ProtocolError as error:
            self._give_up(RedisConnectionError(f"not a reply: {error}"))
            return
        if self._reader.has_data():
            self._usable = False
        replies, self._replies, self._waiting = self._replies, [], None
        if not waiting.done():
            waiting.set_result(replies)

    def eof_received(self) -> None:
        # The transport closes itself; a caller in this turn of the loop must not write to it.
        self._usable = False

    def connection_lost(self, exc: Exception | None) -> None:
        self._give_up(RedisConnectionError(_CLOSED))
        self._stream.connection_lost(exc)

    def _error_of(self, text: str) -> Exception:
        """Parse an error reply as redis-py does."""
        error: Exception = self._connection._parser.parse_error(text)  # noqa: SLF001 - its table
        if isinstance(error, _NOT_THE_MASTER):
            self.refused = type(error).__name__
        return error

    def _schedule_check(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._checks_at = self._late_at
        self._timer = self._loop.call_at(self._late_at, self._check_late)

    def _check_late(self) -> None:
        self._timer, self._checks_at = None, inf
        if self._waiting is None:
            return
        if self._loop.time() >= self._late_at:
            self._give_up(RedisTimeoutError("the reply timed out"))
        else:
            self._schedule_check()

    def _give_up(self, error: Exception) -> None:
        self._usable = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
