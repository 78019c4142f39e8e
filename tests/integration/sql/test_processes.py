"""Several processes at one database, and a database that fails."""

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.sql.event_writer import ApplyKind
from reservation.adapters.sql.payment_intents import Intent, IntentOutcome
from reservation.adapters.sql.store import SqlStore
from tests.support.databases import PostgresServer, running_postgres
from tests.support.outbox import Tape

pytestmark = pytest.mark.system

#: Writes intents in waves, as an API worker does, and prints each outcome and the slowest.
WRITER = """
import asyncio, collections, json, sys, time
from reservation.adapters.sql.payment_intents import Intent
from reservation.adapters.sql.store import SqlStore

async def main(url, name, waves, width):
    sql = await SqlStore.open(url)
    print("ready", flush=True)
    sys.stdin.readline()
    ends, slowest = collections.Counter(), 0.0

    async def write(order_id):
        nonlocal slowest
        began = time.monotonic()
        outcome = await sql.intents.add(Intent(
            order_id=order_id, sale_id="s", fence=1, payment_key=f"key-{order_id}", amount=1,
            currency="KRW", idempotency_key="i", now_ms=1
        ))
        slowest = max(slowest, time.monotonic() - began)
        ends[outcome.name] += 1

    for wave in range(waves):
        await asyncio.gather(*(write(f"{name}-{wave}-{n}") for n in range(width)))
    await sql.aclose()
    print(json.dumps([ends, slowest]), flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""

#: Applies a file of events in small batches until it is through or killed.
APPLIER = """
import asyncio, sys
from pathlib import Path
import msgspec
from reservation.domain.events import Event
from reservation.adapters.sql.store import SqlStore

async def main(url, path, size):
    events = msgspec.json.decode(Path(path).read_bytes(), type=list[Event])
    sql = await SqlStore.open(url)
    begun, _ = await sql.events.cursor("s")
    print("ready", flush=True)
    for start in range(begun, len(events), size):
        outcome = await sql.events.apply("s", events[start:start + size])
        assert outcome.kind.name == "APPLIED", outcome
    await sql.aclose()
    print("through", flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""

#: An interpreter and its imports on two busy cores.
START_SECONDS = 30.0

NOT_WRITTEN = (SQLAlchemyError, OSError)


@asynccontextmanager
async def process(script: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process that has reported that it is ready."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert child.stdout is not None
    try:
        line = await asyncio.wait_for(child.stdout.readline(), START_SECONDS)
        assert line == b"ready\n"
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def timings_of(child: asyncio.subprocess.Process) -> tuple[dict[str, int], float]:
    output, _ = await asyncio.wait_for(child.communicate(b"go\n"), START_SECONDS)
    assert child.returncode == 0
    return msgspec.json.decode(output, type=tuple[dict[str, int], float])


def a_busy_sale(orders: int) -> Tape:
    tape = Tape()
    tape.put(a=100_000)
    for number in range(orders):
        tape.sell(f"s-{number}", a=1)
    return tape


@pytest.mark.slow
async def test_intents_of_four_processes_succeed_beside_a_flusher(
    database_url: str, sql: SqlStore
) -> None:
    tape = a_busy_sale(3_000)
    await sql.sales.register("s", "{}", 1)
    writing = [process(WRITER, database_url, f"writer-{number}", "25", "8") for number in range(4)]
    children = await asyncio.gather(*(each.__aenter__() for each in writing))
    try:
        answers = [asyncio.create_task(timings_of(child)) for child in children]
        while len(tape.events) > (await sql.events.cursor("s"))[0]:
            flushed = (await sql.events.cursor("s"))[0]
            outcome = await sql.events.apply("s", tape.events[flushed : flushed + 100])
            assert outcome.kind is ApplyKind.APPLIED
        for ends, slowest in await asyncio.gather(*answers):
            assert ends == {"WRITTEN": 200}
            # Far below the driver's time-out for a lock: no process was starved.
            assert slowest < 10
    finally:
        for each in writing:
            await each.__aexit__(None, None, None)
    assert len(await sql.intents.list_by_order("writer-3-24-7")) == 1


@pytest.mark.slow
async def test_a_killed_event_writer_applies_each_event_once(
    database_url: str, sql: SqlStore, tmp_path: Path
) -> None:
    tape = a_busy_sale(1_500)
    await sql.sales.register("s", "{}", 1)
    path = tmp_path / "events.json"
    path.write_bytes(msgspec.json.encode(tape.events))
    chance = random.Random(7)
    for _ in range(3):
        async with process(APPLIER, database_url, str(path), "20") as child:
            await asyncio.sleep(chance.uniform(0.0, 0.25))
            if child.returncode is None:
                child.send_signal(signal.SIGKILL)
            await child.wait()
        await assert_prefix(sql, tape)
    flushed, _ = await sql.events.cursor("s")
    outcome = await sql.events.apply("s", tape.events[flushed:])
    assert outcome.flushed_seq == len(tape.events)
    await assert_prefix(sql, tape)


async def assert_prefix(sql: SqlStore, tape: Tape) -> None:
    """SQL has a complete prefix of the tape: events, orders and counters of one moment."""
    fold = await sql.sales.counters("s")
    assert fold is not None
    prefix = tape.events[: fold.flushed_seq]
    assert await sql.events.list_after("s", 0, 100_000) == prefix
    if not prefix:
        assert fold.skus == {}
        return
    assert fold.chain == prefix[-1].chain
    names = [event.event for event in prefix]
    begun, sold = names.count("prepared"), names.count("confirmed")
    counters = fold.skus["a"]
    assert (counters.held, counters.sold) == (begun - sold, sold)
    assert counters.available == 100_000 - begun


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server of the test's own, to be ended and started again."""
    with running_postgres() as server:
        yield server


async def write(sql: SqlStore, order_id: str) -> IntentOutcome:
    return await sql.intents.add(
        Intent(
            order_id=order_id,
            sale_id="s",
            fence=1,
            payment_key=f"key-{order_id}",
            amount=1,
            currency="KRW",
            idempotency_key="i",
            now_ms=1,
        )
    )


async def test_a_restarted_postgres_fails_fast_and_is_used_again(
    own_postgres: PostgresServer,
) -> None:
    sql = await SqlStore.open(own_postgres.url())
    tape = a_busy_sale(10)
    await sql.sales.register("s", "{}", 1)
    assert await write(sql, "before") is IntentOutcome.WRITTEN
    await asyncio.to_thread(own_postgres.stop)
    for _ in range(3):
        with pytest.raises(NOT_WRITTEN):
            await write(sql, "away")
        with pytest.raises(NOT_WRITTEN):
            await sql.events.apply("s", tape.events)
        with pytest.raises(NOT_WRITTEN):
            await sql.database.check()
    await asyncio.to_thread(own_postgres.start)
    assert await write(sql, "away") is IntentOutcome.WRITTEN
    assert await write(sql, "before") is IntentOutcome.ALREADY_WRITTEN
    assert (await sql.events.apply("s", tape.events)).written == len(tape.events)
    await sql.database.check()
    await sql.aclose()


async def test_a_postgres_crash_under_load_keeps_committed_rows(
    own_postgres: PostgresServer,
) -> None:
    sql = await SqlStore.open(own_postgres.url())
    written: list[str] = []
    enough = asyncio.Event()

    async def keep_writing(name: str) -> None:
        for number in range(10_000):
            await write(sql, f"{name}-{number}")
            written.append(f"{name}-{number}")
            if len(written) >= 200:
                enough.set()

    writers = [asyncio.create_task(keep_writing(f"w-{number}")) for number in range(8)]
    await asyncio.wait_for(enough.wait(), START_SECONDS)
    await asyncio.to_thread(own_postgres.stop, signal.SIGQUIT)
    ends = await asyncio.gather(*writers, return_exceptions=True)
    assert all(isinstance(end, NOT_WRITTEN) for end in ends)
    await asyncio.to_thread(own_postgres.start)
    for order_id in written:
        assert await write(sql, order_id) is IntentOutcome.ALREADY_WRITTEN
    await sql.aclose()


async def test_a_full_disk_is_an_error_without_a_gap(sqlite_url: str) -> None:
    sql = await SqlStore.open(sqlite_url)
    tape = a_busy_sale(1_000)
    await sql.sales.register("s", "{}", 1)
    await sql.events.apply("s", tape.events[:100])
    async with sql.database.read() as connection:
        pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
    await limit_pages(sql, pages + 5)
    with pytest.raises(SQLAlchemyError):
        await sql.events.apply("s", tape.events[100:])
    await assert_prefix(sql, tape)
    await limit_pages(sql, 1_000_000)
    assert (await sql.events.apply("s", tape.events[100:])).flushed_seq == len(tape.events)
    await assert_prefix(sql, tape)
    await sql.aclose()


async def limit_pages(sql: SqlStore, pages: int) -> None:
    """Cap the file at this many pages, on the connection that writes events."""

    def limit(connection: Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    await sql.database.run_write(limit)
