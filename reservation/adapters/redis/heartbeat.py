"""Heartbeats: one hash per process, which expires soon after its process ends."""

import time
from typing import Final

from reservation import __version__
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys

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

    async def beat(self) -> int:
        """Rewrite the entry and its expiry."""
        now = str(time.time_ns() // 1_000_000)
        await self._connections.pipeline(
            [
                ("HSET", self._key, "role", self._role, "version", __version__, "beat", now),
                ("EXPIRE", self._key, LIFE_SECONDS),
            ]
        )
        return 0
