"""Sends commands without ever repeating one, and tells apart what was refused from what is unknown.

redis-py retries ten times by default, on time-outs too, so a script whose reply was lost would run
again. Here nothing is sent twice by the client; a caller whose script is idempotent repeats it
itself (`Connections.call_again`). See docs/adr/0002-no-client-retries.md.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import hiredis
import msgspec
import structlog
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import NoPermissionError, NoScriptError, RedisError, ResponseError
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from reservation import tracing
from reservation.domain.clock import Clock
from reservation.redis.replies import (
    StoreUnavailable,
    StoreUncertain,
    good,
    run_id_of,
    told,
)
from reservation.redis.scripts import Script
from reservation.redis.wire import Wire

__all__ = ["ClockReading", "Connections"]

log = structlog.get_logger(__name__)

#: redis-py's own packing goes through each argument in Python.
_pack = cast("Callable[[tuple[str | int | bytes, ...]], bytes]", hiredis.pack_command)  # pyright: ignore[reportUnknownMemberType] - its stub wants a tuple of one

#: A script that reaches the server later than this does nothing, so a caller that waited this long
#: knows. Far above a slow script (20 ms) and far below what a buyer waits.
NOT_AFTER_MS: Final = 2_000
#: Longer than NOT_AFTER_MS: a reply that comes later than this tells nothing new.
SOCKET_TIMEOUT_SECONDS: Final = 3.0
CONNECT_TIMEOUT_SECONDS: Final = 2.0
#: Above the calls that one process has under way: a smaller pool makes single callers starve.
CONNECTIONS_MAX: Final = 256
#: Repeats of an idempotent call: with the pauses between them they span a restart of the server.
ATTEMPTS_MAX: Final = 5
ATTEMPT_PAUSES_SECONDS: Final = (0.05, 0.2, 0.6, 1.5)


class ClockReading(msgspec.Struct, frozen=True, kw_only=True):
    """Both clocks at one instant, as far as a round trip can tell."""

    #: Our monotonic clock in seconds, around the round trip.
    sent: float
    received: float
    #: Our wall clock when the answer was there, and the server's when it answered.
    our_ms: int
    server_ms: int
    #: Which life of which server.
    run_id: str

    @property
    def offset_ms(self) -> int:
        """The server's clock minus ours, its answer taken as half-way between."""
        return self.server_ms - self.our_ms + int((self.received - self.sent) * 500)


class Connections:
    """A pool of connections to one server, and the difference between its clock and ours."""

    def __init__(self, url: str, *, clock: Clock) -> None:
        #: Reads the URL and makes connections; it keeps none.
        self._maker = ConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType]
            url,
            protocol=2,
            decode_responses=True,
            # What a disk has spoilt must be named, not break whoever reads it.
            encoding_errors="backslashreplace",
            # Ours is around the whole greeting, and around each exchange.
            socket_timeout=None,
            socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            redis_connect_func=self._greet,
            **({} if url.startswith("unix:") else {"socket_keepalive": True}),
        )
        # Whatever the URL says: with RESP3 a server may say something unasked.
        self._maker.connection_kwargs["protocol"] = 2
        #: All that are open, and those of them that nobody uses now; the last used goes first.
        self._wires: set[Wire] = set()
        self._idle: list[Wire] = []
        #: How many are being opened.
        self._opening = 0
        self._closed = False
        self._clock = clock
        #: Server's clock minus ours, in ms.
        self.offset_ms = 0
        self._guarded = False
        self._vouched: str | None = None
        #: Set when a guarded call met a server that nobody has vouched for.
        self.doubted = asyncio.Event()

    async def aclose(self) -> None:
        """End every connection. What is under way is left open; what comes later is refused."""
        self._closed = True
        for wire in list(self._wires):
            await self._let_go(wire)
        self._idle.clear()

    def guard(self) -> None:
        """From now on guarded calls go only to a server that is vouched for."""
        self._guarded = True

    @property
    def vouched(self) -> bool:
        """Whether the server that was met last is vouched for."""
        return self._vouched is not None and not self.doubted.is_set()

    def vouch_for(self, run_id: str) -> None:
        """Let guarded calls go to this life of the server: what it has was compared with SQL."""
        self._vouched = run_id

    async def _greet(self, connection: Any) -> None:
        """Learn which server a new connection leads to; each life of one has its own run id."""
        await connection.on_connect()
        try:
            await connection.send_command("INFO", "server")
            connection.run_id = run_id_of(await connection.read_response())
        except NoPermissionError:
            connection.run_id = ""

    def _refuse_stranger(self, wire: Wire) -> None:
        if self._guarded and wire.run_id != self._vouched:
            self.doubted.set()
            raise StoreUnavailable("this server's sales were not compared with SQL yet")

    def server_now_ms(self) -> int:
        """The server's clock as far as we know it."""
        return self._clock.now_ms() + self.offset_ms

    def not_after_ms(self) -> int:
        """What a script that is sent now gets as its `not_after`."""
        return self.server_now_ms() + NOT_AFTER_MS

    @property
    def client_retries(self) -> int:
        """How often the client library would send a command again by itself: never."""
        return cast("Retry", self._maker.connection_kwargs["retry"]).get_retries()

    async def read_clock(self) -> ClockReading:
        """Ask the server for its time; keeps the offset."""
        sent = self._clock.monotonic()
        info, time = await self.pipeline([("INFO", "server"), ("TIME",)])
        received, our_ms = self._clock.monotonic(), self._clock.now_ms()
        seconds, micros = good(time)
        reading = ClockReading(
            sent=sent,
            received=received,
            our_ms=our_ms,
            server_ms=int(seconds) * 1000 + int(micros) // 1000,
            # A server may refuse INFO; its clock it tells.
            run_id=run_id_of(info) if isinstance(info, str) else "",
        )
        self.offset_ms = reading.offset_ms
        return reading

    async def measure_offset(self) -> int:
        """Keeps and returns the server's clock minus ours, in ms."""
        return (await self.read_clock()).offset_ms

    async def command(self, *parts: str | int | bytes, guarded: bool = False) -> Any:
        """Send one command and return its reply, as text.

        Args:
            parts: the command and its arguments.
            guarded: only to a server that is vouched for.

        Raises:
            StoreUnavailable: it was not sent, or the server refused it.
            StoreUncertain: it was sent and the reply was lost.
        """
        replies = await self.pipeline([parts], guarded=guarded)
        return good(replies[0])

    async def pipeline(
        self, commands: Sequence[Sequence[str | int | bytes]], *, guarded: bool = False
    ) -> list[Any]:
        """Send commands in one write; an error reply stands in the list as an exception.

        Raises:
            StoreUnavailable: nothing was sent.
            StoreUncertain: they were sent and a reply was lost.
        """
        if not commands:
            return []
        wire = await self._take()
        clean = False
        try:
            if guarded:
                self._refuse_stranger(wire)
            packed = b"".join([_pack(tuple(command)) for command in commands])
            answers = await wire.exchange(packed, len(commands), seconds=SOCKET_TIMEOUT_SECONDS)
            replies = [told(answer) for answer in answers]
            clean = True
            return replies
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            raise StoreUncertain(type(error).__name__) from error
        finally:
            # Waits for nothing, so no cancellation can come in between; a shield would hold up the
            # answer for three turns of the loop.
            await self._give_back(wire, clean=clean)

    async def _take(self) -> Wire:
        while self._idle:
            wire = self._idle.pop()
            if wire.usable:
                return wire
            await self._let_go(wire)
        if self._closed:
            raise StoreUnavailable("no connection: this service is ending")
        if len(self._wires) + self._opening >= CONNECTIONS_MAX:
            raise StoreUnavailable("no connection: too many calls are under way")
        self._opening += 1
        try:
            # The whole way to a connection: redis-py's own bound is for each of its steps.
            async with asyncio.timeout(SOCKET_TIMEOUT_SECONDS):
                wire = await self._open()
        except ResponseError as error:
            raise StoreUnavailable(str(error)) from error
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"no connection: {type(error).__name__}") from error
        finally:
            self._opening -= 1
        self._wires.add(wire)
        return wire

    async def _open(self) -> Wire:
        connection = self._maker.make_connection()
        try:
            await connection.connect()
            if await connection.can_read():
                raise RedisConnectionError("the server said more than was asked")
            wire = Wire(connection)
            if self._closed or not wire.usable:
                raise RedisConnectionError("it ended while it was greeted")
            return wire
        except BaseException:
            # Half-way: its greeting may still be answered.
            await connection.disconnect(nowait=True)
            raise

    async def _give_back(self, wire: Wire, *, clean: bool) -> None:
        if clean and wire.usable and not self._closed:
            self._idle.append(wire)
        else:
            # Its replies were not all read: the next caller would get them.
            await self._let_go(wire)

    async def _let_go(self, wire: Wire) -> None:
        self._wires.discard(wire)
        await wire.close()

    async def call(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[str | int],
        *,
        guarded: bool = False,
    ) -> Any:
        """Run a script once.

        Args:
            script: what to run.
            keys: its keys.
            args: its arguments.
            guarded: only on a server that is vouched for (`guard`).

        Raises:
            StoreUnavailable: it did not run.
            StoreUncertain: the reply was lost.
            BrokenInvariant: the script found its data impossible and changed nothing.
        """
        if tracing.tracer is None:
            return await self._call(script, keys, args, guarded=guarded)
        with tracing.tracer.step(f"redis {script.name}", script=script.name):
            return await self._call(script, keys, args, guarded=guarded)

    async def _call(
        self, script: Script, keys: Sequence[str], args: Sequence[str | int], *, guarded: bool
    ) -> Any:
        command = ("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            return await self.command(*command, guarded=guarded)
        except NoScriptError:
            # The server was restarted or flushed its scripts: nothing ran, so load and send again.
            await self.command("SCRIPT", "LOAD", script.source)
        try:
            return await self.command(*command, guarded=guarded)
        except RedisError as error:
            raise StoreUnavailable(str(error)) from error

    async def call_again(
        self, script: Script, keys: Sequence[str], args: Callable[[], Sequence[str | int]]
    ) -> Any:
        """Run a script that answers a repeat as it answered the first time, until it answers.

        Args:
            script: one whose repeats are harmless.
            keys: its keys.
            args: makes the arguments, anew for each try because of `not_after`.

        Raises:
            StoreUnavailable: no try ran.
            StoreUncertain: a try may have run.
        """
        uncertain: StoreUncertain | None = None
        for attempt in range(ATTEMPTS_MAX):
            try:
                return await self.call(script, keys, args())
            except StoreUncertain as error:
                uncertain = error
                failure: Exception = error
            except StoreUnavailable as error:
                failure = error
            if attempt < len(ATTEMPT_PAUSES_SECONDS):
                log.info("store_call_repeated", script=script.name, reason=str(failure))
                await asyncio.sleep(ATTEMPT_PAUSES_SECONDS[attempt])
            else:
                raise uncertain or failure
        raise AssertionError("unreachable")
