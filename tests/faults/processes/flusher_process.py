"""Flusher alone in its process: `python -m tests.faults.processes.flusher_process SALE`."""

import asyncio
import os
import sys

from reservation.bootstrap import opened
from reservation.config.settings import Settings
from reservation.workers.flusher import Flusher
from reservation.workers.loops import forever

PAUSE_SECONDS = 0.005


def alarm(name: str, **facts: object) -> None:
    sys.stdout.write(f"alarm {name} {facts}\n")


async def main(sale_id: str) -> None:
    async with opened(Settings.load(os.environ, None)) as service:
        flusher = Flusher(service.outbox, service.sql, on_alarm=alarm, on_flushed=lambda _: None)

        async def once() -> int:
            return (await flusher.run_once(sale_id)).flushed

        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await forever("flusher", once, PAUSE_SECONDS)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
