"""Process that repairs a sale and is killed after the fence: `... repairing_process SALE`."""

import asyncio
import os
import signal
import sys

from reservation.bootstrap import opened
from reservation.config.settings import Settings


async def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def main(sale_id: str) -> None:
    async with opened(Settings.load(os.environ, None)) as service:
        await service.redis_monitor.check_redis()
        await service.repair.run(sale_id, operator="kim", drain=die)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
