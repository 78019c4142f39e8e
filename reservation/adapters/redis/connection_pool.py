"""A bounded pool of connections to one server, which follows the server's address.

An open connection still leads to a demoted server or a lost host after a failover. So every sign of
a failover starts a new generation: idle connections of the previous generation are closed, and the
address is resolved again for new ones.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import structlog
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError

from reservation.adapters.redis.addresses import WAIT_SECONDS_MAX, Addresses, Endpoint
from reservation.adapters.redis.connection import RedisConnection
from reservation.adapters.redis.errors import (
    AddressUnfit,
    StoreUnavailable,
    cause_of,
    is_replica,
    life_of,
)

__all__ = ["WAIT_SECONDS_MAX", "Pool"]

log = structlog.get_logger(__name__)

#: Connect time-out, including the whole handshake.
OPEN_SECONDS_MAX: Final = 3.0
#: Calls that one process has in flight; further calls wait for a connection.
CONNECTIONS_MAX: Final = 256
#: Connections opened concurrently: each costs the loop about a millisecond, and a few connections
#: serve a burst of short calls before hundreds could be opened.
OPENING_MAX: Final = 16
#: Calls that may wait for a connection: as many as prepares may wait in their queue.
WAITING_MAX: Final = 10_000
#: Idle time-out, so that a burst does not leave hundreds of connections open.
IDLE_SECONDS: Final = 60.0
#: Resolution of the idle time.
TICKS_OF_IDLE: Final = 4
#: Minimum interval of renewals: signs of a failover come in bursts, and an address that still leads
#: to a demoted server must not make every call open a connection.
RENEW_SECONDS: Final = 0.5


class Pool:
    """Connections of one process to one server.

    Args:
        addresses: the server's address, resolved for each connection.
        on_another_life: called when a connection reaches another server, or another life of it,
            than the previous connection.
    """

    def __init__(self, addresses: Addresses, *, on_another_life: Callable[[], None]) -> None:
        self._addresses = addresses
        self._on_another_life = on_another_life
        #: All open connections.
        self._wires: set[RedisConnection] = set()
        #: The free ones, last used on top; the bottom one is idle longest.
        self._idle: list[RedisConnection] = []
        #: Waiting callers in order of arrival.
        self._waiting: deque[asyncio.Future[RedisConnection]] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._closed = False
        #: Rises with each sign of a failover; only connections of the current generation are kept.
        self._generation = 0
        #: The server of the last attempt, for messages; whether the last connection is local.
        self._tried = ""
        self._server = ""
        self.is_local = False
        self._renewed_at = float("-inf")
        #: The life of the server that the last opened connection reached.
        self._life: str | None = None
        self._ticks = 0
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def client_retries(self) -> int:
        """Automatic retries of the client library: none."""
        return self._addresses.client_retries

    async def verify(self) -> None:
        """Open a connection and close it.

        Raises:
            AddressUnfit: the address is wrong, or the server refuses our user.
            StoreUnavailable: the server does not answer.
        """
        try:
            async with asyncio.timeout(OPEN_SECONDS_MAX):
                wire = await self._connect()
        except AuthenticationError as error:
            raise AddressUnfit(f"{self._tried}: {cause_of(error)}") from error
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"{self._tried}: {self._cause_of(error)}") from error
        wire.close()

    async def aclose(self) -> None:
        """Close every connection. Calls in flight end as uncertain; later ones are refused."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._refuse_waiting("the service is shutting down")
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        for wire in list(self._wires):
            self._drop(wire)
        self._idle.clear()

    async def take(self) -> RedisConnection:
        """A free connection; waits for one until a script sent now would reach its `not_after`.

        Raises:
            StoreUnavailable: none became free in time.
        """
        while self._idle:
            wire = self._idle.pop()
            if wire.usable:
                return wire
            self._drop(wire)
        return await self._wait()

    def give_back(self, wire: RedisConnection, *, clean: bool) -> None:
        """Return the connection to the pool.

        Args:
            wire: a connection from `take`.
            clean: whether all replies were read; the next caller would get unread ones.
        """
        if wire.refused:
            self.renew(wire.refused, met_on=wire)
            wire.refused = ""
        kept = clean and wire.usable and wire.generation == self._generation and not self._closed
        if not kept:
            self._drop(wire)
            self._open_more()
        elif not self._waiting or not self._hand_over(wire):
            wire.idle_since = self._ticks
            self._idle.append(wire)
            if self._sweeper is None:
                self._sweep_later()

    @property
    def server(self) -> str:
        """The address of the server that the last connection reached; empty before the first."""
        return self._server

    def renew(self, reason: str, *, met_on: RedisConnection | None = None) -> None:
        """Close idle connections and resolve the address again: the server may have changed.

        Args:
            reason: the sign, for the log.
            met_on: the connection that gave the sign; one of an earlier generation is ignored.
        """
        if self._closed or (met_on is not None and met_on.generation != self._generation):
            return
        now = asyncio.get_running_loop().time()
        if now - self._renewed_at < RENEW_SECONDS:
            return
        self._renewed_at = now
        log.info("connections_renewed", reason=reason, idle=len(self._idle))
        self._next_generation()

    async def follow_address(self) -> None:
        """Drop connections to a server to which the address no longer leads.

        A master that was cut off from the sentinels accepts calls until it detects its
        successor. If no sentinel answers, the connections are kept.
        """
        try:
            best, *_ = await self._addresses.endpoints()
        except (RedisError, OSError, StoreUnavailable) as error:
            log.debug("address_unresolved", reason=cause_of(error))
            return
        if any(wire.endpoint.name != best.name for wire in self._wires):
            self.renew("the address leads to another server")

    def follow(self, life: str) -> None:
        """Drop connections whose handshake was in another life of the server.

        A server's life may change under open connections: its replication id changes when its first
        replica attaches, an hour after its last one left, or with a demotion.
        """
        if self._closed or all(wire.life == life for wire in self._wires):
            return
        log.info(
            "connections_renewed",
            reason="another run of the server is vouched for",
            idle=len(self._idle),
        )
        self._life = life
        self._next_generation()

    def _next_generation(self) -> None:
        self._generation += 1
        idle, self._idle = self._idle, []
        for wire in idle:
            self._drop(wire)

    async def _wait(self) -> RedisConnection:
        if self._closed:
            raise StoreUnavailable("no connection: the service is shutting down")
        if len(self._waiting) >= WAITING_MAX:
            raise StoreUnavailable("no connection: too many waiting calls")
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[RedisConnection] = loop.create_future()
        self._waiting.append(waiter)
        timer = loop.call_later(WAIT_SECONDS_MAX, _end_waiting, waiter)
        self._open_more()
        try:
            return await waiter
        except asyncio.CancelledError:
            # The waiter may have got a connection in this turn of the loop.
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.give_back(waiter.result(), clean=True)
            raise
        finally:
            timer.cancel()
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _hand_over(self, wire: RedisConnection) -> bool:
        """Give the connection to the longest waiting caller; returns whether there was one."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(wire)
                return True
        return False

    def _refuse_waiting(self, reason: str) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(StoreUnavailable(f"no connection: {reason}"))

    def _open_more(self) -> None:
        """Open a connection for each waiting caller, within the bounds."""
        if self._closed or not self._waiting:
            return
        opening = len(self._opening)
        room = min(OPENING_MAX, CONNECTIONS_MAX - len(self._wires)) - opening
        for _ in range(min(room, len(self._waiting) - opening)):
            task = asyncio.create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    def _opened(self, task: asyncio.Task[None]) -> None:
        self._opening.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._open_more()
            return
        if not isinstance(error, StoreUnavailable):
            log.error("connection_open_failed", exc_info=error)
        if not self._opening and not self._wires:
            # No connection is left to serve the waiting callers.
            self._refuse_waiting(str(error))

    async def _open(self) -> None:
        generation = self._generation
        try:
            # redis-py's own time-out applies to each step.
            async with asyncio.timeout(OPEN_SECONDS_MAX):
                wire = await self._connect()
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"{self._tried}: {self._cause_of(error)}") from error
        self._wires.add(wire)
        self.is_local = wire.endpoint.is_local
        self._server = wire.endpoint.name
        if wire.life != self._life:
            was, self._life = self._life, wire.life
            if was is not None:
                log.info("redis_server_changed", life=wire.life)
                self._next_generation()
                generation = self._generation
                self._on_another_life()
        wire.generation = generation
        self.give_back(wire, clean=True)

    def _cause_of(self, error: RedisError | OSError) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {OPEN_SECONDS_MAX:g} s"
        return cause_of(error)

    async def _connect(self) -> RedisConnection:
        """A connection to the first usable server of the address."""
        self._tried = "the address of Redis"
        failure: RedisError | OSError = RedisConnectionError("it has no server")
        for endpoint in await self._addresses.endpoints():
            self._tried = endpoint.name
            try:
                return await self._connect_to(endpoint)
            except (RedisError, OSError) as error:
                failure = error
        raise failure

    async def _connect_to(self, endpoint: Endpoint) -> RedisConnection:
        connection = endpoint.make_connection(self._greet)
        try:
            await connection.connect()
            if await connection.can_read():
                raise RedisConnectionError("the server sent unsolicited data")
            wire = RedisConnection(connection, endpoint)
            if self._closed or not wire.usable:
                raise RedisConnectionError("it closed during the handshake")
            return wire
        except BaseException:
            # The handshake failed or was cancelled: a reply may still arrive.
            await connection.disconnect(nowait=True)
            raise

    async def _greet(self, connection: Any) -> None:
        """Read the life of the server that a new connection reached."""
        await connection.on_connect()
        try:
            await connection.send_command("INFO", "server", "replication")
            info = await connection.read_response()
        except NoPermissionError:
            connection.life = ""
            return
        if self._addresses.masters_only and is_replica(info):
            raise RedisConnectionError("the server is a replica")
        connection.life = life_of(info)

    def _drop(self, wire: RedisConnection) -> None:
        self._wires.discard(wire)
        wire.close()

    def _sweep_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(IDLE_SECONDS / TICKS_OF_IDLE, self._sweep)

    def _sweep(self) -> None:
        """Close connections that were idle for a whole minute."""
        self._ticks += 1
        long_idle = 0
        while (
            long_idle < len(self._idle)
            and self._ticks - self._idle[long_idle].idle_since > TICKS_OF_IDLE
        ):
            long_idle += 1
        for wire in self._idle[:long_idle]:
            self._drop(wire)
        del self._idle[:long_idle]
        self._sweeper = None
        if self._idle:
            self._sweep_later()


def _end_waiting(waiter: asyncio.Future[RedisConnection]) -> None:
    if not waiter.done():
        waiter.set_exception(StoreUnavailable("timed out waiting for a free connection"))
