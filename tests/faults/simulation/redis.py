"""Redis behind a simulated network: the real server, called at the moment the message arrives.

The simulation replaces redis-py's connection and the wire that takes it over: all of the service's
code above these, its guard and its decoding of errors included, runs unchanged.
"""

import asyncio
import re
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, cast

import hiredis
from redis._parsers.base import BaseParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from reservation.adapters.redis.addresses import Endpoint
from tests.faults.payments.clock import KEY
from tests.faults.simulation.deterministic_os import EPOCH_MS
from tests.faults.simulation.loop import CURRENT, NEUTRAL, VirtualLoop
from tests.faults.simulation.network import Fate, Link
from tests.faults.simulation.processes import Process
from tests.faults.simulation.trace import Trace

__all__ = ["RedisSide", "SimulatedPool", "SimulatedWire"]

_RUN_ID = re.compile(r"run_id:\w+")
_REPLICATION_ID = re.compile(r"master_replid:\w+")
#: Written to the trace without the values that only this process of the machine has.
_OF_THE_MACHINE = (b":proc:",)


class RedisSide:
    """The server, and its network."""

    def __init__(self, path: Path, loop: VirtualLoop, trace: Trace, link: Link) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._reader = hiredis.Reader(
            encoding="utf-8",
            errors="backslashreplace",
            replyError=_error_of,
            protocolError=RedisConnectionError,
        )
        self.loop = loop
        self.trace = trace
        self.link = link
        #: The number of the server's current life.
        self.life = 1
        #: It answers nothing before; an earlier command waits for it.
        self.stalled_until = 0.0
        #: It accepts no connection before.
        self.away_until = 0.0

    def close(self) -> None:
        self._socket.close()

    def now(self, *commands: Sequence[str | bytes | int]) -> list[Any]:
        """Commands outside of any process."""
        packed = b"".join(hiredis.pack_command(tuple(one)) for one in commands)  # type: ignore[arg-type]
        return self._ask(packed, len(commands))

    def restart(self, away_seconds: float) -> None:
        """The server is killed and comes back with all its data, as its file has it."""
        self.trace.note("redis-restart", "redis", f"{away_seconds:.3f}")
        self.life += 1
        self.away_until = self.loop.now + away_seconds
        self.now(("SCRIPT", "FLUSH"))

    def execute(self, process: Process, packed: bytes, commands: list[list[bytes]]) -> list[Any]:
        """Run the commands that arrived, at this moment of virtual time."""
        if not any(mark in packed for mark in _OF_THE_MACHINE):
            self.trace.note("redis", process.name, f"{packed!r}")
        replies = self._ask(packed, len(commands))
        for at, command in enumerate(commands):
            if command[0] == b"TIME":
                now = EPOCH_MS * 1000 + int(self.loop.now * 1e6)
                replies[at] = [str(now // 1_000_000), str(now % 1_000_000)]
            elif command[0] == b"INFO" and isinstance(replies[at], str):
                replies[at] = _RUN_ID.sub(f"run_id:life{self.life}", replies[at])
                replies[at] = _REPLICATION_ID.sub("master_replid:history", replies[at])
            elif command[0] == b"SMEMBERS":
                replies[at] = sorted(replies[at])
            elif command[0] == b"SCAN":
                # Scan pages and their order depend on a number that the server draws at its start.
                replies[at] = ["0", sorted(self.now(("KEYS", command[3]))[0])]
        return replies

    def _ask(self, packed: bytes, count: int) -> list[Any]:
        now_ms = EPOCH_MS + int(self.loop.now * 1000)
        self._socket.sendall(hiredis.pack_command(("SET", KEY, str(now_ms))) + packed)  # type: ignore[arg-type]
        replies: list[Any] = []
        while len(replies) <= count:
            reply = self._reader.gets()
            while reply is False:
                received = self._socket.recv(1 << 20)
                if not received:
                    raise AssertionError("Valkey is gone")
                self._reader.feed(received)
                reply = self._reader.gets()
            replies.append(reply)
        return replies[1:]


class SimulatedPool:
    """Replaces redis-py's pool, which parses an address and names the class of its connections."""

    #: Set for the length of a run.
    side: RedisSide

    def __init__(self, **kwargs: Any) -> None:
        self.connection_kwargs = kwargs
        self.connection_class = self._connection

    @classmethod
    def from_url(cls, _: str, **kwargs: Any) -> "SimulatedPool":
        return cls(**kwargs)

    def _connection(self, **kwargs: Any) -> "_Connection":
        return _Connection(
            self.side, kwargs["socket_connect_timeout"], kwargs["redis_connect_func"]
        )


class SimulatedWire:
    """Replaces `Wire`: the same exchanges, over a connection without a transport."""

    def __init__(self, connection: "_Connection", endpoint: Endpoint) -> None:
        self._connection = connection
        self.endpoint = endpoint
        self.life = connection.life
        self.refused = ""
        self.generation = self.idle_since = 0

    @property
    def usable(self) -> bool:
        return self._connection.usable

    async def exchange(self, packed: bytes, count: int, *, seconds: float) -> list[Any]:
        """Send commands and return their replies, an error as an exception.

        Raises:
            ConnectionError, TimeoutError: of redis-py.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._connection.send_packed_command(packed)
                return [await self._connection.answer() for _ in range(count)]
        except TimeoutError as error:
            raise RedisTimeoutError("the reply timed out") from error

    def close(self) -> None:
        self._connection.abort()


class _Connection:
    """One connection: commands are answered in order, or not at all."""

    def __init__(
        self, side: RedisSide, timeout: float, greet: Callable[["_Connection"], Awaitable[None]]
    ) -> None:
        self._side = side
        self._timeout = timeout
        self._greet = greet
        self._loop = side.loop
        self._process: Process = CURRENT.get()
        self._life = side.life
        self._broken = False
        self._replies: deque[asyncio.Future[Any]] = deque()
        self.life = ""

    @property
    def usable(self) -> bool:
        return not self._broken and self._life == self._side.life

    async def connect(self) -> None:
        """Reach the server, and greet it.

        Raises:
            ConnectionError, TimeoutError: of redis-py.
        """
        self._check_alive()
        fate = self._side.link.fate(self._process.draw)
        if fate in (Fate.REQUEST_LOST, Fate.REPLY_LOST):
            await asyncio.sleep(self._timeout)
            raise RedisTimeoutError("Timeout connecting to server")
        await asyncio.sleep(self._seconds())
        self._check_alive()
        if fate is not Fate.WELL or self._loop.now < self._side.away_until:
            raise RedisConnectionError("Connection refused")
        self._life = self._side.life
        await self._greet(self)

    async def on_connect(self) -> None:
        """Nothing to agree on."""

    async def can_read(self) -> bool:
        return False

    async def send_command(self, *parts: str) -> None:
        await self.send_packed_command(hiredis.pack_command(parts))  # type: ignore[arg-type]

    async def send_packed_command(self, packed: bytes) -> None:
        """Put a message on its way.

        Raises:
            ConnectionError: of redis-py; the connection is broken.
        """
        self._check_alive()
        if not self.usable:
            self._broken = True
            raise RedisConnectionError("Connection closed by server.")
        commands = _commands_in(packed)
        replies = [self._loop.create_future() for _ in commands]
        self._replies.extend(replies)
        fate = self._side.link.fate(self._process.draw)
        if fate is not Fate.WELL:
            self._side.trace.note(f"redis-{fate.value}", self._process.name, "")
        if fate is Fate.REQUEST_LOST:
            return
        arrive = self._reset if fate is Fate.RESET else self._arrive
        self._loop.call_later(
            self._seconds(), arrive, packed, commands, replies, fate, context=NEUTRAL
        )

    async def read_response(self) -> Any:
        """The next reply.

        Raises:
            ConnectionError: of redis-py; whatever the server refuses with.
        """
        reply = await self.answer()
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def answer(self) -> Any:
        """The next reply, an error as an exception that is not raised."""
        return await self._replies.popleft()

    async def disconnect(self, *, nowait: bool = False) -> None:
        self.abort()

    def abort(self) -> None:
        self._broken = True

    def _check_alive(self) -> None:
        if not self._process.alive:
            raise RedisConnectionError("this process is dead")

    def _seconds(self) -> float:
        return self._side.link.seconds(self._process.draw)

    def _arrive(
        self,
        packed: bytes,
        commands: list[list[bytes]],
        replies: list[asyncio.Future[Any]],
        fate: Fate,
    ) -> None:
        side = self._side
        if self._life != side.life:
            self._reset(packed, commands, replies, fate)
            return
        if self._loop.now < side.stalled_until:
            self._loop.call_at(
                side.stalled_until, self._arrive, packed, commands, replies, fate, context=NEUTRAL
            )
            return
        answers = side.execute(self._process, packed, commands)
        if fate is Fate.REPLY_LOST:
            return
        if fate is Fate.RESET_AFTER:
            self._loop.call_later(
                self._seconds(), self._reset, packed, commands, replies, fate, context=NEUTRAL
            )
            return
        self._loop.call_later(self._seconds(), self._answer, replies, answers, context=NEUTRAL)

    def _answer(self, replies: list[asyncio.Future[Any]], answers: list[Any]) -> None:
        if self._life != self._side.life:
            self._reset(b"", [], replies, Fate.RESET)
            return
        for future, answer in zip(replies, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def _reset(
        self, _: bytes, __: list[list[bytes]], replies: list[asyncio.Future[Any]], ___: Fate
    ) -> None:
        self._broken = True
        for future in replies:
            if not future.done():
                # As a value: there may be no reader left.
                future.set_result(RedisConnectionError("Connection closed by server."))


def _error_of(text: str) -> Exception:
    """As redis-py reads an error reply."""
    return cast("Any", BaseParser).parse_error(text)


def _commands_in(packed: bytes) -> list[list[bytes]]:
    reader = hiredis.Reader()
    reader.feed(packed)
    commands: list[list[bytes]] = []
    while (command := reader.gets()) is not False:
        commands.append(command)
    return commands
