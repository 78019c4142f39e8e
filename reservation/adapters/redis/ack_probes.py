"""Probes of the replicas: open each server again as soon as enough of them acknowledge a write."""

import asyncio

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys

__all__ = ["AckProbes"]


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
        """Probe each closed server once."""
        await asyncio.gather(*(self._probe(node) for node in self._servers()))

    async def measure(self) -> None:
        """Find the replicas that each open server has gained."""
        await asyncio.gather(*(self._measure(node) for node in self._servers()))

    def _servers(self) -> list[RedisClient]:
        return [node for node in self._connections.nodes if node.may_be_called]

    async def _probe(self, node: RedisClient) -> None:
        # Another round may have begun a probe since.
        if node.acks.needs_probe:
            await node.probe_replicas(self._connections.key_at(node, self._key))

    async def _measure(self, node: RedisClient) -> None:
        if not (node.acks.wanted and node.acks.is_open):
            return
        await node.list_replicas()
        if node.acks.needs_measuring:
            await node.measure_replicas(self._connections.key_at(node, self._key))
