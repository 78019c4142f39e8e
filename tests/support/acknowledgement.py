"""Service whose changes replicas must acknowledge, in the test's own process."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from reservation.adapters.redis.client import RedisClient
from tests.support.in_process import Bench, bench
from tests.support.replication import Pair

__all__ = ["acknowledged_bench", "reopened"]

#: A probe every tenth of a second, on a busy machine.
REOPENED_SECONDS = 20.0


@asynccontextmanager
async def acknowledged_bench(servers: Pair, folder: Path, **environ: str) -> AsyncIterator[Bench]:
    """A guarded service that was vouched for, with `RESERVATION_REDIS_ACK_REPLICAS` = 1."""
    environ.setdefault("RESERVATION_REDIS_ACK_REPLICAS", "1")
    async with bench(folder, servers.address.url, **environ) as here:
        here.service.connections.guard()
        await here.service.redis_monitor.check_redis()
        yield here


async def reopened(connections: RedisClient) -> None:
    """Wait until the server is open for changes again."""
    async with asyncio.timeout(REOPENED_SECONDS):
        while not connections.acks.is_open:
            await connections.probe_replicas("rsv:acks")
