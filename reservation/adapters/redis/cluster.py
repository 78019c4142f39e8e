"""Redis Cluster: routes each command to the master of its slot, and follows the slots.

The servers reply MOVED, ASK, TRYAGAIN, CLUSTERDOWN and LOADING before a command runs. The client
therefore sends the command again, within the time that a script accepts (`not_after`). Each master
has its own pool, guard and clock offset, so a master that is down closes only the sales in its
slots.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import msgspec
import structlog
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    RedisError,
    TryAgainError,
)

from reservation.adapters.redis.addresses import FixedAddress, endpoint_at
from reservation.adapters.redis.client import ClockReading, RedisClient
from reservation.adapters.redis.cluster_slots import (
    SLOTS,
    Command,
    SlotMap,
    Slots,
    shards_of,
    slot_of,
    slots_of,
)
from reservation.adapters.redis.errors import (
    AddressUnfit,
    NotAcknowledged,
    StoreUnavailable,
    StoreUncertain,
    as_reply,
    cause_of,
)
from reservation.config.redis_address import (
    AddressKind,
    HostPort,
    RedisAddress,
    parse_redis_url,
)
from reservation.domain.clock import Clock

__all__ = ["ClusterClient", "ClusterNode", "open_client"]

log = structlog.get_logger(__name__)

#: How long a command is repeated after redirections. Below `not_after`, so that the script of the
#: last attempt still runs.
REDIRECT_SECONDS_MAX: Final = 1.5
#: Pause before a command is sent again to a slot that is being moved.
AGAIN_SECONDS: Final = 0.02
#: Time-out of reading the slots from the masters.
SLOTS_SECONDS_MAX: Final = 1.5
#: How long further masters may answer after the first answer.
SLOTS_GRACE_SECONDS: Final = 0.2
#: Minimum interval of unscheduled reads of the slots: redirections come in bursts.
SLOTS_INTERVAL_SECONDS: Final = 0.1
#: Number of masters that are queried for the slots.
ASKED_MAX: Final = 5

_NOT_NOW: Final = (TryAgainError, ClusterDownError, BusyLoadingError, MasterDownError)
_REDIRECTIONS: Final = (MovedError, AskError, *_NOT_NOW)
_CLUSTER_OFF: Final = "cluster support disabled"


class ClusterNode(RedisClient):
    """One master of the cluster."""

    def __init__(
        self, identity: str, host: HostPort, address: RedisAddress, cluster: "ClusterClient"
    ) -> None:
        super().__init__(
            address.url,
            clock=cluster.clock,
            ack_replicas=cluster.acks.wanted,
            addresses=FixedAddress(endpoint_at(host, address)),
            cluster=cluster,
        )
        self.identity = identity
        self.host = host
        self.acks.server = self.name
        #: This client without the guard, for calls to a server that is not vouched for.
        self.exempt = self.unguarded()

    @property
    def name(self) -> str:
        """Its address, for readiness."""
        return f"{self.host[0]}:{self.host[1]}"

    def _reply_of(self, answer: Any) -> Any:
        return answer if isinstance(answer, _REDIRECTIONS) else as_reply(answer)


class _Unacknowledged(msgspec.Struct, frozen=True):
    """The reply to a command that too few replicas acknowledged."""

    reply: Any


class ClusterClient(RedisClient):
    """Sends each command to the master of its slot; see `RedisClient`."""

    def __init__(self, url: str, *, clock: Clock, ack_replicas: int = 0) -> None:
        # Its own pool connects to the servers of the address, to read the slots.
        super().__init__(url, clock=clock, ack_replicas=ack_replicas)
        self._address = parse_redis_url(url)
        self.clock = clock
        self._map = SlotMap[ClusterNode]()

    async def aclose(self) -> None:
        """Close every connection. Calls in flight end as uncertain; later ones are refused."""
        if self._map.reading is not None:
            self._map.reading.cancel()
            await asyncio.gather(self._map.reading, return_exceptions=True)
        await asyncio.gather(
            super().aclose(),
            *(node.aclose() for node in self._map.nodes.values()),
            *self._map.former,
            return_exceptions=True,
        )

    @property
    def nodes(self) -> Sequence[RedisClient]:
        """The masters."""
        nodes = self._map.nodes.values()
        return [node.exempt for node in nodes] if self._exempt else list(nodes)

    @property
    def is_cluster(self) -> bool:
        """Always."""
        return True

    @property
    def is_ok(self) -> bool:
        """Whether the cluster accepts commands, as its servers report."""
        return self._map.is_ok

    @property
    def uncovered_slots(self) -> int:
        """The slots without a master."""
        return self._map.owners.count(None)

    def node_of(self, of: str) -> RedisClient | None:
        """The master of a sale or a key; None if its slot has none."""
        node = self._map.owners[slot_of(of)]
        return node.exempt if node is not None and self._exempt else node

    def key_at(self, node: RedisClient, base: str) -> str | None:
        """The first numbered key of this base in the server's own slots; None if it has none."""
        return self._map.key_at(node.identity, base)

    async def verify(self) -> None:
        """Check that the address leads to a cluster whose servers accept our user.

        Raises:
            AddressUnfit: it does not; the setting is wrong.
            StoreUnavailable: no server answers.
        """
        await super().verify()
        await self._read_slots()

    async def follow_address(self) -> None:
        """Read the slots again."""
        try:
            await self._read_slots()
        except (StoreUnavailable, StoreUncertain) as error:
            log.debug("slots_unread", reason=str(error))

    def guard(self) -> None:
        """From now on, calls reach only servers that are vouched for."""
        super().guard()
        self._map.guarded = True
        for node in self._map.nodes.values():
            node.guard()

    @property
    def vouched(self) -> bool:
        """Whether every master is vouched for."""
        nodes = self._map.nodes.values()
        return (
            bool(nodes)
            and not self.doubted.is_set()
            and all(node.has_life() or node.is_away for node in nodes)
        )

    def note_role(self, info: str) -> bool:
        """Always false: a replica redirects each command, so no call runs on one."""
        del info
        return False

    def server_now_ms(self, of: str = "") -> int:
        """The clock of the master of a sale or a key, as estimated from its last offset."""
        node = self._map.owners[slot_of(of)] if of else next(iter(self._map.nodes.values()), None)
        return self.clock.now_ms() if node is None else node.server_now_ms()

    async def ping(self) -> None:
        """Check that at least one master answers; raises as `read_clock` does."""
        await self.read_clock()

    async def read_clock(self) -> ClockReading:
        """Read the time of every master; the reading of the first one that answers.

        Raises:
            StoreUnavailable, StoreUncertain: no master answers.
        """
        await self.know_servers()
        readings = await asyncio.gather(
            *(node.exempt.read_clock() for node in self._map.nodes.values()),
            return_exceptions=True,
        )
        for reading in readings:
            if isinstance(reading, ClockReading):
                return reading
        raise _failure_of(readings)

    async def scan(self, pattern: str, count: int) -> AsyncGenerator[list[str]]:
        """The keys of a pattern with a hash tag, a few at a time; some may come twice."""
        while True:
            await self.know_servers()
            owner = self._map.owners[slot_of(pattern)]
            cursor = "0"
            while True:
                cursor, keys = await self.command("SCAN", cursor, "MATCH", pattern, "COUNT", count)
                if keys:
                    yield keys
                if cursor == "0":
                    break
            # A cursor is not valid on another server, so the scan starts again.
            if self._map.owners[slot_of(pattern)] is owner:
                return

    async def pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Send each command to the master of its key; return the replies in order.

        A command without a key is sent with the next command that has one. If a master fails, the
        replies of its commands are the error; the commands of other masters succeed.

        Raises:
            StoreUnavailable: the slots are unknown.
        """
        return await self._routed(commands, acked=False)

    async def acked_pipeline(self, commands: Sequence[Command]) -> list[Any]:
        """Like `pipeline`, for commands of one slot whose last write replicas must acknowledge.

        Raises:
            NotAcknowledged: the commands ran, and too few replicas of the master have them.
            StoreUnavailable: the slots are unknown.
        """
        return await self._routed(commands, acked=True)

    async def _routed(self, commands: Sequence[Command], *, acked: bool) -> list[Any]:
        if not commands:
            return []
        if not self._map.known:
            await self._read_slots()
        slots = slots_of(commands)
        short = False
        replies: list[Any] = [None] * len(commands)
        #: Positions of commands, with the server that a redirection names.
        pending: list[tuple[int, ClusterNode | None]] = [
            (position, None) for position in range(len(commands))
        ]
        give_up_at = asyncio.get_running_loop().time() + REDIRECT_SECONDS_MAX
        while pending:
            groups: dict[tuple[ClusterNode | None, bool], list[int]] = {}
            for position, asked in pending:
                node = asked or self._map.owners[slots[position]]
                groups.setdefault((node, asked is not None), []).append(position)
            answers = await self._exchange(groups, commands, acked=acked)
            pending = []
            wait = False
            for position, found in answers:
                answer = found
                if isinstance(found, _Unacknowledged):
                    short, answer = True, found.reply
                if not isinstance(answer, _REDIRECTIONS):
                    replies[position] = answer
                    continue
                if asyncio.get_running_loop().time() > give_up_at:
                    replies[position] = StoreUnavailable(f"{type(answer).__name__}: {answer}")
                    continue
                target = self._target(answer, slots[position])
                # The new owner of the slot is unknown: the map is read before the next attempt.
                wait = wait or target is None
                pending.append((position, target if isinstance(answer, AskError) else None))
            if wait:
                await asyncio.sleep(AGAIN_SECONDS)
        if short:
            raise NotAcknowledged(replies)
        return replies

    async def _exchange(
        self,
        groups: dict[tuple[ClusterNode | None, bool], list[int]],
        commands: Sequence[Command],
        *,
        acked: bool,
    ) -> list[tuple[int, Any]]:
        """The answer of each command, by its position."""
        results = await asyncio.gather(
            *(
                self._send(node, positions, commands, asking=asking, acked=acked)
                for (node, asking), positions in groups.items()
            ),
            return_exceptions=True,
        )
        answers: list[tuple[int, Any]] = []
        for positions, result in zip(groups.values(), results, strict=True):
            if isinstance(result, StoreUnavailable | StoreUncertain):
                answers += [(position, result) for position in positions]
            elif isinstance(result, BaseException):
                raise result
            else:
                answers += zip(positions, result, strict=True)
        return answers

    async def _send(
        self,
        node: ClusterNode | None,
        positions: Sequence[int],
        commands: Sequence[Command],
        *,
        asking: bool,
        acked: bool,
    ) -> list[Any]:
        if node is None:
            self._read_slots_soon()
            raise StoreUnavailable("the slot has no master")
        wanted: list[Command] = []
        for position in positions:
            if asking:
                # It applies to the next command on the same connection.
                wanted.append(("ASKING",))
            wanted.append(commands[position])
        view = node.exempt if self._exempt else node
        step = slice(1, None, 2) if asking else slice(None)
        try:
            return (await (view.acked_pipeline if acked else view.pipeline)(wanted))[step]
        except NotAcknowledged as short:
            return [_Unacknowledged(reply) for reply in short.reply[step]]
        except (StoreUnavailable, StoreUncertain):
            self._read_slots_soon()
            raise

    def _target(self, answer: Exception, slot: int) -> ClusterNode | None:
        """The server that a redirection names, if it is a known master."""
        self._read_slots_soon()
        if not isinstance(answer, MovedError | AskError):
            return None
        host: HostPort = (str(answer.host), int(answer.port))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        for node in self._map.nodes.values():
            if node.host == host:
                if isinstance(answer, MovedError):
                    self._map.owners[slot] = node
                return node
        return None

    async def know_servers(self) -> None:
        """Read the slots, if they were not read yet."""
        if not self._map.known:
            await self._read_slots()

    def _read_slots_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() - self._map.read_at >= SLOTS_INTERVAL_SECONDS:
            self._begin_reading()

    def _begin_reading(self) -> asyncio.Task[None]:
        if self._map.reading is None or self._map.reading.done():
            self._map.read_at = asyncio.get_running_loop().time()
            self._map.reading = asyncio.create_task(self._read())
            self._map.reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._map.reading

    async def _read_slots(self) -> None:
        """Read the slots from the masters, or from the servers of the address.

        Raises:
            AddressUnfit: the server is not part of a cluster.
            StoreUnavailable: no server answers.
        """
        await asyncio.shield(self._begin_reading())

    async def _read(self) -> None:
        found = await self._ask_masters() or await self._ask(self._pool)
        self._learn(found)

    async def _ask_masters(self) -> Slots | None:
        """The answer with the latest configuration; a master that was cut off has an older one."""
        nodes = list(self._map.nodes.values())
        asked = random.sample(nodes, min(len(nodes), ASKED_MAX))
        pending = {asyncio.create_task(self._ask(node.pool)) for node in asked}
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + SLOTS_SECONDS_MAX
        answers: list[Slots] = []
        while pending and (wait := give_up_at - loop.time()) > 0:
            done, pending = await asyncio.wait(
                pending, timeout=wait, return_when=asyncio.FIRST_COMPLETED
            )
            answers += [task.result() for task in done if task.exception() is None]
            if answers:
                give_up_at = min(give_up_at, loop.time() + SLOTS_GRACE_SECONDS)
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        return max(answers, key=lambda one: (one.is_ok, one.epoch), default=None)

    async def _ask(self, pool: Any) -> Slots:
        wire = await pool.take()
        clean = False
        try:
            packed = b"*2\r\n$7\r\nCLUSTER\r\n$4\r\nINFO\r\n*2\r\n$7\r\nCLUSTER\r\n$6\r\nSHARDS\r\n"
            info, shards = await wire.exchange(packed, 2, seconds=SLOTS_SECONDS_MAX)
            clean = True
        except (RedisError, OSError) as error:
            raise StoreUnavailable(f"{wire.endpoint.name}: {cause_of(error)}") from error
        finally:
            pool.give_back(wire, clean=clean)
        for answer in (info, shards):
            if isinstance(answer, Exception):
                if _CLUSTER_OFF in str(answer):
                    raise AddressUnfit(f"{wire.endpoint.name} is a server without a cluster")
                raise StoreUnavailable(f"{wire.endpoint.name}: {answer}")
        facts = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
        return Slots(
            shards=tuple(
                shards_of(
                    shards,
                    answering=wire.endpoint.options["host"],
                    port="port" if self._address.tls is None else "tls-port",
                )
            ),
            epoch=int(facts.get("cluster_current_epoch", 0)),
            is_ok=facts.get("cluster_state") == "ok",
        )

    def _learn(self, found: Slots) -> None:
        nodes: dict[str, ClusterNode] = {}
        for shard in found.shards:
            node = self._map.nodes.get(shard.identity)
            if node is None or node.host != shard.host:
                log.info("cluster_master_found", node=shard.identity, address=shard.host)
                node = ClusterNode(shard.identity, shard.host, self._address, self)
                if self._map.guarded:
                    node.guard()
                    if self._map.known:
                        self.doubted.set()
            nodes[shard.identity] = node
        for identity, node in self._map.nodes.items():
            if nodes.get(identity) is not node:
                log.info("cluster_master_left", node=identity, address=node.host)
                task = asyncio.create_task(node.aclose())
                self._map.former.add(task)
                task.add_done_callback(self._map.former.discard)
        owners: list[ClusterNode | None] = [None] * SLOTS
        for shard in found.shards:
            for first, last in shard.ranges:
                owners[first : last + 1] = [nodes[shard.identity]] * (last - first + 1)
        self._map.nodes, self._map.owners = nodes, owners
        self._map.known, self._map.is_ok = True, found.is_ok


def _failure_of(results: Sequence[Any]) -> Exception:
    for result in results:
        if isinstance(result, Exception):
            return result
    return StoreUnavailable("the cluster has no master")


def open_client(url: str, *, clock: Clock, ack_replicas: int = 0) -> RedisClient:
    """The client of this address."""
    if parse_redis_url(url).kind is AddressKind.CLUSTER:
        return ClusterClient(url, clock=clock, ack_replicas=ack_replicas)
    return RedisClient(url, clock=clock, ack_replicas=ack_replicas)
