"""Writer of events and assigner of their ids, alone in its process.

`python -m tests.faults.processes.feed_process URL FIRST_SALE SALES EVENTS` writes the same events
at each start, and continues after those that SQL has.
"""

import asyncio
import sys

from reservation.adapters.sql.store import SqlStore
from tests.support.outbox import Tape

#: Events of one transaction.
BATCH = 20


async def write(sql: SqlStore, sale_id: str, events: int) -> None:
    await sql.sales.register(sale_id, "{}", 1)
    tape = Tape(sale_id)
    tape.put(a=1_000_000)
    while len(tape.events) < events:
        tape.prepare(f"{sale_id}-{len(tape.events)}", a=1)
    written, _ = await sql.events.cursor(sale_id)
    for start in range(written, events, BATCH):
        await sql.events.apply(sale_id, tape.events[start : start + BATCH])


async def main(url: str, first: int, sales: int, events: int) -> None:
    sql = await SqlStore.open(url)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    names = [f"s{number}" for number in range(first, first + sales)]
    writing = asyncio.gather(*(write(sql, sale_id, events) for sale_id in names))
    while not writing.done() or await sql.feed.assign():
        await sql.feed.assign()
        await asyncio.sleep(0)
    await writing
    await sql.aclose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:5])))
