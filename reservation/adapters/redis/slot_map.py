"""Slot map: the masters of a cluster, the owner of each slot, and a key on each master."""

import asyncio
import itertools
from typing import Generic, TypeVar

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.cluster_slots import SLOTS, slot_of

__all__ = ["SlotMap"]

Master = TypeVar("Master", bound=RedisClient)


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
