"""The Redis client: no automatic retries, and refused commands are distinct from unknown outcomes.

redis-py retries ten times by default, on time-outs too, so a script whose reply was lost would run
again. This client sends nothing twice; a caller whose script is idempotent retries it itself
(`RedisClient.call_again`). See docs/adr/0002-no-client-retries.md.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from copy import copy
from typing import Any, Final, cast

import hiredis
import msgspec
import structlog
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from reservation.adapters.redis.addresses import WAIT_SECONDS_MAX, Addresses, addresses_of
from reservation.adapters.redis.connection_pool import Pool
from reservation.adapters.redis.errors import (
    StoreUnavailable,
    StoreUncertain,
    as_reply,
    is_replica,
    run_id_of,
    unwrap,
)
from reservation.adapters.redis.marks import Marks
from reservation.adapters.redis.scripts import Script
from reservation.domain.clock import Clock
from reservation.telemetry import tracing

__all__ = ["ClockReading", "RedisClient"]

log = structlog.get_logger(__name__)

#: redis-py packs each argument in Python, which is slower.
_pack = cast("Callable[[tuple[str | int | bytes, ...]], bytes]", hiredis.pack_command)  # pyright: ignore[reportUnknownMemberType] - its stub wants a tuple of one

#: A script that reaches the server later than this does nothing, so the outcome is final after
#: this time.
NOT_AFTER_MS: Final = int(WAIT_SECONDS_MAX * 1000)
#: Longer than NOT_AFTER_MS: a later reply carries no new information.
SOCKET_TIMEOUT_SECONDS: Final = 3.0
#: Tries of an idempotent call: with their back-off they span a restart of the server.
ATTEMPTS_MAX: Final = 5
ATTEMPT_PAUSES_SECONDS: Final = (0.05, 0.2, 0.6, 1.5)


class ClockReading(msgspec.Struct, frozen=True, kw_only=True):
    """Both clocks at one instant, to the accuracy of a round trip."""

    #: Our monotonic clock in seconds, around the round trip.
    sent: float
    received: float
    #: Our wall clock when the reply arrived, and the server's when it replied.
    our_ms: int
    server_ms: int
    #: The life of the server (`errors.life_of`).
    run_id: str

    @property
    def offset_ms(self) -> int:
        """The server's clock minus ours; its reply is dated to the middle of the round trip."""
        return self.server_ms - self.our_ms + int((self.received - self.sent) * 500)


class _Guard:
    """The life of the server that this process may use."""

    def __init__(self, events: "_Guard | None" = None) -> None:
        self.active = False
        self.life: str | None = None
        #: Set when a connection reaches another one; cleared after the comparison with SQL.
        self.doubted = events.doubted if events else asyncio.Event()
        self.known = events.known if events else asyncio.Event()
        #: Whether the last check did not reach the server.
        self.away = False

    def doubt(self) -> None:
        self.known.clear()
        self.doubted.set()


class RedisClient:
    """Commands to one server, its guard, and the clock offset."""

    #: The server's own name among those of a cluster; empty for a single server.
    identity = ""

    def __init__(
        self,
        url: str,
        *,
        clock: Clock,
        addresses: Addresses | None = None,
        cluster: "RedisClient | None" = None,
    ) -> None:
        self._clock = clock
        # The masters of a cluster share the events and the marks.
        self._guard = _Guard(cluster._guard if cluster else None)  # noqa: SLF001 - of its own class
        self._addresses: Addresses = addresses or addresses_of(url)
        self._pool = Pool(self._addresses, on_another_life=self._guard.doubt)
        self._exempt = False
        #: A shared object: `unguarded` views use the same one.
        self._offset_ms = [0]
        #: Set when a call reaches a server that is not vouched for.
        self.doubted = self._guard.doubted
        #: The high-water mark of each sale.
        self.marks = cluster.marks if cluster else Marks()

    async def aclose(self) -> None:
        """Close every connection. Calls in flight end as uncertain; later ones are refused."""
        await self._pool.aclose()

    async def verify(self) -> None:
        """Check that the address leads to a server that accepts our user.

        Raises:
            AddressUnfit: it does not; the setting is wrong.
            StoreUnavailable: the server does not answer.
        """
        await self._pool.verify()

    async def follow_address(self) -> None:
        """Drop connections to a server to which the address no longer leads."""
        await self._pool.follow_address()

    @property
    def is_unix_socket(self) -> bool:
        """Whether the server listens on a unix socket, whose directory controls the access."""
        return self._addresses.is_unix_socket

    @property
    def pool(self) -> Pool:
        """Its connections."""
        return self._pool

    async def ping(self) -> None:
        """Check that the server answers; raises as `command` does."""
        await self.command("PING")

    async def know_servers(self) -> None:
        """Discover the servers that have sales; has no effect for a single server.

        Raises:
            StoreUnavailable: no server of a cluster answers.
        """

    @property
    def nodes(self) -> "Sequence[RedisClient]":
        """The servers that have sales: this one."""
        return (self,)

    @property
    def name(self) -> str:
        """The server's address among those of a cluster; empty for a single server."""
        return ""

    @property
    def is_cluster(self) -> bool:
        """Whether the servers are masters of a cluster."""
        return False

    @property
    def is_ok(self) -> bool:
        """Whether the cluster accepts commands; always true for a single server."""
        return True

    @property
    def uncovered_slots(self) -> int:
        """The slots without a master: none."""
        return 0

    def node_of(self, of: str) -> "RedisClient | None":
        """The server of a sale or a key: this one."""
        del of
        return self

    @property
    def is_local(self) -> bool:
        """Whether the server of the last connection runs on this machine."""
        return self._pool.is_local

    def guard(self) -> None:
        """From now on, calls reach only a server that is vouched for."""
        self._guard.active = True

    def unguarded(self) -> "RedisClient":
        """The same connections, for the calls that a server needs before it is vouched for.

        They compare it with SQL, check its settings and clock, and rebuild or repair it.
        """
        view = copy(self)
        view._exempt = True  # noqa: SLF001 - of its own class
        return view

    @property
    def vouched(self) -> bool:
        """Whether the last server reached is vouched for."""
        return self._guard.life is not None and not self.doubted.is_set()

    @property
    def is_away(self) -> bool:
        """Whether the last check did not reach the server."""
        return self._guard.away

    def note_away(self, *, away: bool) -> None:
        """Record whether a check reached the server."""
        self._guard.away = away

    def has_life(self) -> bool:
        """Whether a life of the server is vouched for."""
        return self._guard.life is not None

    async def until_vouched(self) -> None:
        """Wait until calls can reach a server; returns at once where the guard is off."""
        if self._guard.active:
            await self._guard.known.wait()

    def distrust(self) -> None:
        """Block all calls until a server is vouched for again."""
        self._guard.life = None
        self._guard.known.clear()

    def vouch_for(self, life: str) -> None:
        """Allow calls to this life of the server: its sales were compared with SQL."""
        self._guard.life = life
        self._pool.follow(life)
        self._guard.known.set()

    def _refuse_stranger(self) -> None:
        self._guard.doubt()
        raise StoreUnavailable("this server's sales have not been compared with SQL yet")

    @property
    def offset_ms(self) -> int:
        """Server's clock minus ours, in ms."""
        return self._offset_ms[0]

    def server_now_ms(self, of: str = "") -> int:
        """The server's clock, as estimated from the last offset.

        Args:
            of: a sale or key of the server; only a cluster needs it.
        """
        del of
        return self._clock.now_ms() + self.offset_ms

    def not_after_ms(self, of: str) -> int:
        """The `not_after` of a script that is sent now, to the server of this sale or key."""
        return self.server_now_ms(of) + NOT_AFTER_MS

    @property
    def client_retries(self) -> int:
        """Automatic retries of the client library: none."""
        return self._pool.client_retries

    async def read_clock(self) -> ClockReading:
        """Read the server's time and update the offset."""
        sent = self._clock.monotonic()
        info, time = await self.pipeline([("INFO", "server", "replication"), ("TIME",)])
        received, our_ms = self._clock.monotonic(), self._clock.now_ms()
        seconds, micros = unwrap(time)
        reading = ClockReading(
            sent=sent,
            received=received,
            our_ms=our_ms,
            server_ms=int(seconds) * 1000 + int(micros) // 1000,
            # A server may refuse INFO but still answer TIME.
            run_id=run_id_of(info) if isinstance(info, str) else "",
        )
        self._offset_ms[0] = reading.offset_ms
        if isinstance(info, str):
            self.note_role(info)
        return reading

    def note_role(self, info: str) -> bool:
        """Drop connections to a replica; returns whether INFO replication shows one."""
        replica = is_replica(info)
        if replica:
            self._pool.renew("the server is a replica")
        return replica

    async def measure_offset(self) -> int:
        """Measure, store and return the server's clock minus ours, in ms."""
        return (await self.read_clock()).offset_ms

    async def scan(self, pattern: str, count: int) -> AsyncGenerator[list[str]]:
        """The keys of a pattern with a hash tag, a few at a time; some may come twice."""
        cursor = "0"
        while True:
            cursor, keys = await self.command("SCAN", cursor, "MATCH", pattern, "COUNT", count)
            if keys:
                yield keys
            if cursor == "0":
                return

    async def command(self, *parts: str | int | bytes) -> Any:
        """Send one command and return its reply, as text.

        Args:
            parts: the command and its arguments.

        Raises:
            StoreUnavailable: the command was not sent, or the server refused it.
            StoreUncertain: the command was sent and the reply was lost.
        """
        replies = await self.pipeline([parts])
        return unwrap(replies[0])

    async def pipeline(self, commands: Sequence[Sequence[str | int | bytes]]) -> list[Any]:
        """Send commands in one write; the list has an exception for each error reply.

        Raises:
            StoreUnavailable: nothing was sent.
            StoreUncertain: the commands were sent and a reply was lost.
        """
        if not commands:
            return []
        wire = await self._pool.take()
        clean = False
        try:
            if self._guard.active and wire.life != self._guard.life and not self._exempt:
                clean = True
                self._refuse_stranger()
            packed = b"".join([_pack(tuple(command)) for command in commands])
            answers = await wire.exchange(packed, len(commands), seconds=SOCKET_TIMEOUT_SECONDS)
            replies = [self._reply_of(answer) for answer in answers]
            clean = True
            return replies
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            # The other connections probably lead to the same lost host.
            self._pool.renew(type(error).__name__, met_on=wire)
            raise StoreUncertain(type(error).__name__) from error
        finally:
            # No await in between, so no cancellation point.
            self._pool.give_back(wire, clean=clean)

    def _reply_of(self, answer: Any) -> Any:
        return as_reply(answer)

    async def call(self, script: Script, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        """Run a script once.

        Args:
            script: the script to run.
            keys: its keys.
            args: its arguments.

        Raises:
            StoreUnavailable: the script did not run.
            StoreUncertain: the reply was lost.
            BrokenInvariant: the script found inconsistent data and changed nothing.
        """
        if tracing.tracer is None:
            return await self._call(script, keys, args)
        with tracing.tracer.step(f"redis {script.name}", script=script.name):
            return await self._call(script, keys, args)

    async def _call(self, script: Script, keys: Sequence[str], args: Sequence[str | int]) -> Any:
        command = ("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            return await self.command(*command)
        except NoScriptError:
            # The server restarted or flushed its scripts: nothing ran, so load the script and
            # resend.
            await self.command("SCRIPT", "LOAD", script.source)
        try:
            return await self.command(*command)
        except RedisError as error:
            raise StoreUnavailable(str(error)) from error

    async def call_again(
        self, script: Script, keys: Sequence[str], args: Callable[[], Sequence[str | int]]
    ) -> Any:
        """Run an idempotent script and retry it until the server replies.

        Args:
            script: an idempotent script.
            keys: its keys.
            args: builds the arguments for each try, because `not_after` changes.

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
                log.info("redis_call_retried", script=script.name, reason=str(failure))
                await asyncio.sleep(ATTEMPT_PAUSES_SECONDS[attempt])
            else:
                raise uncertain or failure
        raise AssertionError("unreachable")
