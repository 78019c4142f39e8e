"""The list of workers in Redis, in which each worker finds the others.

It is one hash, because a scan for `rsv:proc:*` would read every key, on each node of a cluster. A
worker of release 0.1.0 is not in the list; it serves all sales until it ends.
"""

from collections.abc import Collection
from typing import Final

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import unwrap
from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_mapping

__all__ = ["WorkerEntry", "WorkerRegistry"]


class WorkerEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker as the others see it; JSON in Redis."""

    #: Differs from one beat to the next.
    beat: int
    #: The duties that it cannot perform at present.
    unable: tuple[str, ...] = ()


_ENTRY: Final = msgspec.json.Decoder(WorkerEntry)


class WorkerRegistry:
    """Writes this worker's entry and reads those of all workers.

    Args:
        connections: the server.
        keys: its keys.
        heartbeat: of this worker's process.
    """

    def __init__(self, connections: RedisClient, keys: Keys, heartbeat: Heartbeat) -> None:
        self._connections = connections
        self._keys = keys
        self._heartbeat = heartbeat

    async def beat(self, now_ms: int, unable: Collection[str]) -> dict[str, WorkerEntry]:
        """Renew this worker's entry and read all entries, without damaged ones.

        Args:
            now_ms: the time of this beat.
            unable: the duties that this worker cannot perform.

        Raises:
            StoreUnavailable, StoreUncertain: the server did not answer.
        """
        entry = WorkerEntry(beat=now_ms, unable=tuple(unable))
        text = msgspec.json.encode(entry).decode()
        return await self._read(
            *self._heartbeat.commands(now_ms, unable=" ".join(unable)),
            ("HSET", self._keys.workers, self._heartbeat.name, text),
        )

    async def read(self) -> dict[str, WorkerEntry]:
        """All entries; raises as `beat` does."""
        return await self._read()

    async def remove(self, names: Collection[str]) -> None:
        """Remove the entries of workers that have ended.

        A worker that still runs writes its entry again. Raises as `beat` does.
        """
        if names:
            await self._connections.command("HDEL", self._keys.workers, *names)

    async def leave(self) -> None:
        """Remove this worker's own entry, so that the others take over its sales at once."""
        await self.remove([self._heartbeat.name])

    async def _read(self, *before: tuple[str | int, ...]) -> dict[str, WorkerEntry]:
        replies = await self._connections.pipeline([*before, ("HGETALL", self._keys.workers)])
        *_, flat = [unwrap(reply) for reply in replies]
        entries = dict[str, WorkerEntry]()
        for name, text in as_mapping(flat).items():
            try:
                entries[name] = _ENTRY.decode(text)
            except (msgspec.DecodeError, UnicodeEncodeError):
                # A manual edit. If the worker runs, it renews its entry within a second.
                continue
        return entries
