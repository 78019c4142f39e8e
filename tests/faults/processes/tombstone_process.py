"""Flusher and tombstones alone in their process: `python -m ...tombstone_process SALE`."""

import asyncio
import os
import sys

from reservation.adapters.redis.tombstones import TombstoneStore
from reservation.application.retention.tombstones import TombstoneRounds
from reservation.bootstrap import opened
from reservation.config.settings import Settings
from reservation.workers.flusher import Flusher
from reservation.workers.loops import forever

PAUSE_SECONDS = 0.005
#: An hour before the deadline, so that no order waits for its tombstone.
KEEP_MS = -3_600_000


def alarm(name: str, **facts: object) -> None:
    sys.stdout.write(f"alarm {name} {facts}\n")


async def main(sale_id: str) -> None:
    async with opened(Settings.load(os.environ, None)) as service:
        flusher = Flusher(service.outbox, service.sql, on_alarm=alarm, on_flushed=lambda _: None)
        rounds = TombstoneRounds(
            service.connections,
            TombstoneStore(service.connections, service.keys),
            service.sql,
            service.catalog,
            clock=service.clock,
            keep_ms=KEEP_MS,
        )

        async def flush() -> int:
            return (await flusher.run_once(sale_id)).flushed

        async def replace() -> int:
            return await rounds.run_once([sale_id], flusher.flushed_seq)

        sys.stdout.write("ready\n")
        sys.stdout.flush()
        async with asyncio.TaskGroup() as group:
            group.create_task(forever("flusher", flush, PAUSE_SECONDS))
            group.create_task(forever("tombstones", replace, PAUSE_SECONDS))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
