"""Heartbeats: one hash per process, which expires soon after its process ends."""

import time
from typing import Final

from reservation import __version__
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys
from reservation.domain.levels import HIGHEST_LEVEL

__all__ = ["Heartbeat"]

EVERY_SECONDS: Final = 10.0
#: Three missed beats.
LIFE_SECONDS: Final = 30


class Heartbeat:
    """One process's entry, `rsv:proc:HOST-PID`."""

    every_seconds = EVERY_SECONDS

    def __init__(self, connections: RedisClient, keys: Keys, *, name: str, role: str) -> None:
        self._connections = connections
        self._key = keys.process(name)
        self._role = role
        self.name = name

    async def beat(self) -> int:
        """Rewrite the entry and its expiry."""
        await self._connections.pipeline(self.commands(time.time_ns() // 1_000_000))
        return 0

    def commands(self, now_ms: int, **more: str) -> list[tuple[str | int, ...]]:
        """The commands of one beat.

        Args:
            now_ms: the time of the beat.
            more: additional fields of the entry.
        """
        fields = {
            "role": self._role,
            "version": __version__,
            "level": str(HIGHEST_LEVEL),
            "beat": str(now_ms),
        } | more
        pairs = [text for pair in fields.items() for text in pair]
        return [("HSET", self._key, *pairs), ("EXPIRE", self._key, LIFE_SECONDS)]
