"""Probes of the replicas: open each server again as soon as enough of them acknowledge a write."""

import asyncio

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys

__all__ = ["AckProbes"]

#: Far more keys than a cluster has masters, so that one is in the slots of each.
KEYS_TRIED_MAX = 20_000


class AckProbes:
    """Sends the probes of one process.

    Args:
        connections: to the servers.
        keys: the name of the probes' key.
    """

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._key = keys.acks

    async def run(self) -> None:
        """Probe each closed server once, and measure the replicas that an open one gained."""
        nodes = [node for node in self._connections.nodes if node.may_be_called]
        await asyncio.gather(
            *(self._probe(node) for node in nodes),
            *(
                node.measure_replicas(self._key_at(node), listed)
                for node in nodes
                if (listed := node.acks.take_listed())
            ),
        )

    async def _probe(self, node: RedisClient) -> None:
        # Another round may have begun a probe since.
        if node.acks.needs_probe:
            await node.probe_replicas(self._key_at(node))

    def _key_at(self, node: RedisClient) -> str | None:
        """A key in the server's own slots; None if it has none."""
        if not self._connections.is_cluster:
            return self._key
        for number in range(KEYS_TRIED_MAX):
            key = f"{self._key}:{number}"
            owner = self._connections.node_of(key)
            if owner is not None and owner.identity == node.identity:
                return key
        return None
