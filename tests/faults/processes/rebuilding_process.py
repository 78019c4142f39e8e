"""Automatic rebuild in its process, which dies at a step: `... rebuilding_process SALE POINT`."""

import asyncio
import os
import signal
import sys

from reservation import failpoints
from reservation.bootstrap import opened
from reservation.config.settings import Settings


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(sale_id: str, point: str) -> None:
    async with opened(Settings.load(os.environ, None)) as service:
        await service.redis_monitor.check_redis()
        failpoints.arm(point, die)
        await service.automatic_rebuild.run_once([sale_id])


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
