"""The slots of a cluster: of a key, of a command, and of each master."""

import asyncio
import binascii
import itertools
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.config.redis_address import HostPort

__all__ = [
    "SLOTS",
    "Command",
    "Shard",
    "SlotMap",
    "Slots",
    "key_of",
    "shards_of",
    "slot_of",
    "slots_of",
]

SLOTS: Final = 16_384
#: Commands whose first key is not their first argument.
_KEY_POSITIONS: Final = {
    "EVAL": 3,
    "EVALSHA": 3,
    "XGROUP": 2,
    "XINFO": 2,
    "OBJECT": 2,
    "MEMORY": 2,
}
#: Commands without a key: they go to the server of the pipeline's next command.
_KEYLESS: Final = frozenset({"TIME", "INFO", "PING", "SCRIPT", "CONFIG", "ACL", "ECHO", "CLIENT"})

Command = Sequence[str | int | bytes]
Master = TypeVar("Master", bound=RedisClient)


class Shard(msgspec.Struct, frozen=True):
    """A master and its slots, as one server reports them."""

    identity: str
    host: HostPort
    ranges: tuple[tuple[int, int], ...]


class Slots(msgspec.Struct, frozen=True):
    """The slots, as reported by one server."""

    shards: tuple[Shard, ...]
    #: Increases with each change of the cluster's configuration.
    epoch: int
    is_ok: bool


def slot_of(key: str) -> int:
    """The slot of a key, by its hash tag where it has one."""
    _, opened, rest = key.partition("{")
    tag, closed, _ = rest.partition("}")
    return binascii.crc_hqx((tag if opened and closed and tag else key).encode(), 0) % SLOTS


def key_of(command: Command) -> str | None:
    """The first key of a command; None if it has none."""
    name = str(command[0]).upper()
    if name in _KEYLESS:
        return None
    if name == "XREADGROUP":
        return str(command[list(command).index("STREAMS") + 1])
    if name == "SCAN":
        return str(command[list(command).index("MATCH") + 1])
    if name in ("EVAL", "EVALSHA") and int(command[2]) == 0:
        return None
    return str(command[_KEY_POSITIONS.get(name, 1)])


def slots_of(commands: Sequence[Command]) -> list[int]:
    """The slot of each command; of one without a key, that of the next one with a key."""
    keys = [key_of(command) for command in commands]
    slot: int | None = None
    slots: list[int] = [0] * len(commands)
    for position in range(len(commands) - 1, -1, -1):
        key = keys[position]
        if key is not None:
            slot = slot_of(key)
        elif slot is None:
            slot = next((slot_of(one) for one in reversed(keys) if one is not None), None)
        if slot is None:
            if str(commands[position][0]).upper() != "PING":
                raise ValueError(f"{commands[position][0]} names no server of the cluster")
            slot = 0
        slots[position] = slot
    return slots


def _mapping(flat: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


def shards_of(reply: Sequence[Sequence[Any]], *, answering: str, port: str) -> list[Shard]:
    """The masters in the reply to CLUSTER SHARDS.

    Args:
        reply: the reply.
        answering: the host that answered, used if a server does not report its own address.
        port: the name of the port's field: `port`, or `tls-port` with TLS.
    """
    found: list[Shard] = []
    for flat in reply:
        shard = _mapping(flat)
        flags = [_mapping(one) for one in shard["nodes"]]
        masters = [node for node in flags if node["role"] == "master" and port in node]
        # After a failover the lost master is still listed beside its successor.
        masters.sort(key=lambda node: node.get("health") != "online")
        if not masters:
            continue
        master, bounds = masters[0], shard["slots"]
        host = master.get("endpoint") or master.get("ip") or answering
        found.append(
            Shard(
                master["id"],
                (answering if host == "?" else host, int(master[port])),
                tuple(zip(map(int, bounds[::2]), map(int, bounds[1::2]), strict=True)),
            )
        )
    return found


class SlotMap(Generic[Master]):
    """The masters and the owner of each slot; shared by all views of a client."""

    def __init__(self) -> None:
        self.nodes: dict[str, Master] = {}
        self.owners: list[Master | None] = [None] * SLOTS
        self.known = False
        self.is_ok = False
        self.reading: asyncio.Task[None] | None = None
        self.read_at = float("-inf")
        self.guarded = False
        #: Masters that left the map; their connections are closed with the client.
        self.former: set[asyncio.Task[None]] = set()
        #: By the master and the key's base.
        self._keys: dict[tuple[str, str], str] = {}

    def key_at(self, identity: str, base: str) -> str | None:
        """The first numbered key of this base in a master's slots; None if it has none."""
        master = self.nodes.get(identity)
        if master is None or master not in self.owners:
            return None
        known = self._keys.get((identity, base))
        if known is not None and self.owners[slot_of(known)] is master:
            return known
        numbered = (f"{base}:{number}" for number in itertools.count())
        found = next(key for key in numbered if self.owners[slot_of(key)] is master)
        self._keys[identity, base] = found
        return found
