"""The Redis client: no automatic retries, and refused commands are distinct from unknown outcomes.

redis-py retries ten times by default, on time-outs too, so a script whose reply was lost would run
again. This client sends nothing twice; a caller whose script is idempotent retries it itself
(`RedisClient.call_again`). See docs/adr/0002-no-client-retries.md.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import Any, Final, cast

import hiredis
import msgspec
import structlog
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from reservation.adapters.redis.addresses import WAIT_SECONDS_MAX, Addresses, addresses_of
from reservation.adapters.redis.connection_pool import Pool
from reservation.adapters.redis.errors import (
    NotAcknowledged,
    NotPermitted,
    StoreUnavailable,
    StoreUncertain,
    TooFewReplicas,
    UnexpectedReply,
    as_reply,
    is_replica,
    life_of,
    online_replicas_in,
    run_id_of,
    unwrap,
)
from reservation.adapters.redis.marks import Marks
from reservation.adapters.redis.replica_acks import (
    ACK_MS_MAX,
    ACK_ROW,
    MEASURE_MS_MAX,
    PROBE_MS_MAX,
    ReplicaAcks,
)
from reservation.adapters.redis.script_calls import Command, ScriptCalls
from reservation.domain.clock import Clock

__all__ = ["ClockReading", "RedisClient", "bound_to"]

log = structlog.get_logger(__name__)

#: redis-py packs each argument in Python, which is slower.
_pack = cast("Callable[[tuple[str | int | bytes, ...]], bytes]", hiredis.pack_command)  # pyright: ignore[reportUnknownMemberType] - its stub requires a tuple of one element

#: A script that reaches the server later than this does nothing, so the outcome is final after
#: this time.
NOT_AFTER_MS: Final = int(WAIT_SECONDS_MAX * 1000)
#: Longer than NOT_AFTER_MS: a later reply carries no new information.
SOCKET_TIMEOUT_SECONDS: Final = 3.0
#: Lifetime of a probe's key.
PROBE_KEY_MS: Final = 60_000


#: The lives of servers that the calls of the current task may reach; None for any.
_bound_to: ContextVar[frozenset[str] | None] = ContextVar("bound_to", default=None)


@contextmanager
def bound_to(lives: Collection[str]) -> Generator[None]:
    """Within it, a call raises `StoreUnavailable` if it reaches another life of a server.

    A replica that is promoted between two writes of a sequence may lack the first one.
    """
    token = _bound_to.set(frozenset(lives))
    try:
        yield
    finally:
        _bound_to.reset(token)


class ClockReading(msgspec.Struct, frozen=True, kw_only=True):
    """Both clocks at one instant, to the accuracy of a round trip."""

    #: Our monotonic clock in seconds, before and after both wall clocks are read.
    sent: float
    received: float
    #: Our wall clock after the reply, and the server's when it replied.
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


class RedisClient(ScriptCalls):
    """Commands to one server, its guard, and the clock offset."""

    #: The server's own name among those of a cluster; empty for a single server.
    identity = ""

    def __init__(
        self,
        url: str,
        *,
        clock: Clock,
        ack_replicas: int = 0,
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
        #: Whether enough replicas acknowledge changes.
        self.acks = ReplicaAcks(ack_replicas, clock=clock)

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

    async def replica_priorities(self) -> tuple[int, ...] | None:
        """The replicas' priorities in an election by sentinels; None if these hide them.

        Empty without sentinels: elections of a cluster ignore priorities.
        """
        return await self._addresses.replica_priorities()

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

    @property
    def may_be_called(self) -> bool:
        """Whether calls reach the server: the guard is off, or a life is vouched for."""
        return not self._guard.active or self._guard.life is not None

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
        if life != self._guard.life:
            self.acks.begin_life(self._pool.server)
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

    async def lives(self) -> dict[str, str]:
        """The life of each server that answers; connections to earlier ones are dropped.

        Raises:
            StoreUnavailable, StoreUncertain: a server does not answer.
        """
        await self.know_servers()
        found: dict[str, str] = {}
        for node in self.nodes:
            if self.is_cluster and node.is_away:
                continue
            info = (await node.pipeline([("INFO", "server", "replication")]))[0]
            # A server may hide its life.
            life = "" if isinstance(info, NotPermitted) else life_of(unwrap(info))
            node.pool.follow(life)
            found[node.identity] = life
        return found

    async def read_clock(self) -> ClockReading:
        """Read the server's time and update the offset."""
        sent = self._clock.monotonic()
        info, time = await self.pipeline([("INFO", "server", "replication"), ("TIME",)])
        # In this order: the process may be paused between the two.
        our_ms = self._clock.now_ms()
        received = self._clock.monotonic()
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

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one write; the list has an exception for each error reply.

        Raises:
            StoreUnavailable: nothing was sent.
            StoreUncertain: the commands were sent and a reply was lost.
        """
        if not commands:
            return []
        return await self._exchange_with_server(commands)

    async def acked_pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Like `pipeline`, for commands of one slot whose last write replicas must acknowledge.

        Raises:
            NotAcknowledged: the commands ran, and too few replicas have them.
            StoreUnavailable, StoreUncertain: as `pipeline`.
        """
        if not self.acks.wanted:
            return await self.pipeline(commands)
        asked = self.acks.asked
        *replies, count = await self._exchange_with_server([*commands, ("WAIT", asked, ACK_MS_MAX)])
        # Commands that the server refused have changed nothing.
        if all(isinstance(reply, Exception) for reply in replies) or self.acks.suffices(
            count, asked
        ):
            return replies
        if isinstance(count, UnexpectedReply):
            # UNBLOCKED, or WAIT on a replica: the server was demoted.
            self._pool.renew(str(count))
        raise NotAcknowledged(replies)

    async def probe_replicas(self, key: str | None) -> None:
        """Send a write, wait for its acknowledgement, and open the server if it comes.

        Args:
            key: to write; None if the server has no slot, where changes are impossible.
        """
        ticket, count = self.acks.begin_probe(), None
        try:
            await self.list_replicas()
            count = await self._count_acks(key, self.acks.probed, PROBE_MS_MAX)
        finally:
            self.acks.end_probe(ticket, count)

    async def list_replicas(self) -> None:
        """Note how many replicas the server lists as online."""
        try:
            (info,) = await self._exchange_with_server([("INFO", "replication")])
        except (StoreUnavailable, StoreUncertain) as error:
            log.debug("replicas_not_listed", reason=str(error))
            return
        if isinstance(info, str):
            self.acks.note_listed(online_replicas_in(info))

    async def measure_replicas(self, key: str | None) -> None:
        """Let changes wait for each further replica that acknowledges a write in time."""
        self.acks.note_attached(await self._count_acks(key, self.acks.probed, MEASURE_MS_MAX))

    async def _count_acks(self, key: str | None, asked: int, wait_ms: int) -> Any:
        """The replicas that acknowledge a write; None if it failed."""
        write = [] if key is None else [("SET", key, "1", "PX", PROBE_KEY_MS)]
        try:
            *written, count = await self._exchange_with_server([*write, ("WAIT", asked, wait_ms)])
        except (StoreUnavailable, StoreUncertain) as error:
            log.debug("replicas_probe_failed", reason=str(error))
            return None
        return None if any(isinstance(reply, Exception) for reply in written) else count

    def key_at(self, node: "RedisClient", base: str) -> str | None:
        """A key on this server; None if it has no slot."""
        del node
        return base

    def acks_of(self, of: str) -> ReplicaAcks | None:
        """The acknowledgements of the server of a sale or a key; None if its slot has none."""
        node = self.node_of(of)
        return None if node is None else node.acks

    def require_acks(self, of: str) -> None:
        """Refuse a change of a sale or a key while too few replicas acknowledge changes.

        Raises:
            TooFewReplicas: the call must not be sent.
        """
        acks = self.acks_of(of)
        if acks is not None and not acks.is_open:
            raise TooFewReplicas(ACK_ROW)

    async def _exchange_with_server(self, commands: Sequence[Command]) -> list[Any]:
        wire = await self._pool.take()
        clean = False
        try:
            if self._guard.active and wire.life != self._guard.life and not self._exempt:
                clean = True
                self._refuse_stranger()
            lives = _bound_to.get()
            if lives is not None and wire.life not in lives:
                clean = True
                raise StoreUnavailable("the server changed since the first call")
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
