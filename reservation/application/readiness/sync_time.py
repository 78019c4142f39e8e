"""Sync time of the append-only file: the median of small writes, one after the other.

With `appendfsync always` the server runs nothing during a sync, so the disk bounds the calls a
second. Each process measures it once in each life of a server, in the second check of its health:
the first one delays the start of the process.
"""

from statistics import median
from typing import Final

import structlog

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain, UnexpectedReply
from reservation.adapters.redis.prepare_queue import BASKETS_MAX
from reservation.domain.clock import Clock

__all__ = ["SyncTimes", "holds_per_second"]

log = structlog.get_logger(__name__)

#: Writes of one measurement, and its maximum duration.
WRITES: Final = 100
SECONDS_MAX: Final = 0.25
#: Time of the script for one basket of one line.
_BASKET_SECONDS: Final = 25e-6
#: Lifetime of the written key.
_KEY_MS: Final = 60_000


class SyncTimes:
    """The sync times of the servers, as this process measured them.

    Args:
        connections: to the servers.
        key: written by the measurement.
        clock: measures it.
    """

    def __init__(self, connections: RedisClient, key: str, *, clock: Clock) -> None:
        self._connections = connections
        self._key = key
        self._monotonic = clock.monotonic
        #: Milliseconds, by the server's address and life.
        self._found: dict[tuple[str, str], float] = {}
        self._checked: set[tuple[str, str]] = set()

    async def of(self, node: RedisClient, life: str) -> float | None:
        """Milliseconds of a synced write; None until it is measured, or if it cannot be."""
        name = (node.identity, life)
        if name not in self._checked:
            self._checked.add(name)
            return None
        if name in self._found:
            return self._found[name]
        found = await self._measure(node)
        if found is not None:
            self._found[name] = found
            log.info(
                "redis_sync_measured",
                sync_ms=round(found, 2),
                holds_per_second_max=round(holds_per_second(found)),
            )
        return found

    async def _measure(self, node: RedisClient) -> float | None:
        key = self._connections.key_at(node, self._key)
        if key is None:
            return None
        took: list[float] = []
        end_at = self._monotonic() + SECONDS_MAX
        try:
            while len(took) < WRITES and self._monotonic() < end_at:
                began = self._monotonic()
                await node.command("SET", key, "1", "PX", str(_KEY_MS))
                took.append((self._monotonic() - began) * 1000)
        except (StoreUnavailable, StoreUncertain, UnexpectedReply) as error:
            log.debug("redis_sync_not_measured", reason=str(error))
            return None
        # None of them, if the process was paused.
        return median(took) if took else None


def holds_per_second(sync_ms: float) -> float:
    """Holds of one item that the calls of a sale can take, one full batch for each sync."""
    return BASKETS_MAX / (BASKETS_MAX * _BASKET_SECONDS + sync_ms / 1000)
