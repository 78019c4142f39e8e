"""The event feed while two processes write and assign ids, and each is killed repeatedly."""

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from reservation.adapters.sql.store import SqlStore
from tests.support.pages import ROOT

#: Events per sale, and kills: of a push, and of `make soak`, which has 100,000 events.
SIZES = [
    pytest.param(100, 4, marks=pytest.mark.slow),
    pytest.param(12_500, 60, marks=pytest.mark.soak),
]
PROCESSES, SALES = 2, 4
LIFE_SECONDS_MAX = 0.3
PAGE = 50


async def start(url: str, number: int, events: int) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.processes.feed_process",
        url,
        str(number * SALES),
        str(SALES),
        str(events),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


@asynccontextmanager
async def writing(url: str, number: int, events: int) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await start(url, number, events)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def keep_writing(url: str, number: int, events: int, kills: int, seed: int) -> None:
    """Write all events of this process's sales; it is killed this many times meanwhile."""
    chance = random.Random(seed)
    for _ in range(kills):
        async with writing(url, number, events):
            await asyncio.sleep(chance.random() * LIFE_SECONDS_MAX)
    async with writing(url, number, events) as process:
        assert await process.wait() == 0


async def follow(sql: SqlStore, count: int) -> list[tuple[int, str, int]]:
    """Read as a consumer does, which never returns to a lower id."""
    after, found = 0, list[tuple[int, str, int]]()
    while len(found) < count:
        rows, after = await sql.feed.page(after=after, limit=PAGE)
        found += [(row.id, row.sale_id, row.seq) for row in rows]
        if not rows:
            await asyncio.sleep(0.01)
    return found


@pytest.mark.timeout(3_600)
@pytest.mark.parametrize(("events", "kills"), SIZES)
async def test_no_event_is_skipped_while_writers_are_killed(
    database_url: str, events: int, kills: int
) -> None:
    sql = await SqlStore.open(database_url)
    reading = asyncio.create_task(follow(sql, PROCESSES * SALES * events))
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(PROCESSES):
                group.create_task(keep_writing(database_url, number, events, kills, seed=number))
        async with asyncio.timeout(600):
            found = await reading
    finally:
        reading.cancel()
        await sql.aclose()
    assert [one for one, _, _ in found] == list(range(1, len(found) + 1))
    for number in range(PROCESSES * SALES):
        seqs = [seq for _, sale_id, seq in found if sale_id == f"s{number}"]
        assert seqs == list(range(1, events + 1))
