"""Flusher killed, doubled and cut off, with real stores: SQL has each event once, in order."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiosqlite
import msgspec
import pytest

from reservation.domain.events import GENESIS, chain_of
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from tests.support.databases import PostgresServer, running_postgres
from tests.support.in_process import Bench, bench

#: Kills per database: of a push, and of `make soak`.
KILLS = [pytest.param(20, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)]
AWAY = [pytest.param(5.0, marks=pytest.mark.slow), pytest.param(60.0, marks=pytest.mark.soak)]
#: An interpreter, its imports and a check of the schema, on two busy cores.
START_SECONDS = 30.0
#: Maximum life of a flusher before it is killed: long enough for some rounds.
LIFE_SECONDS_MAX = 0.15
#: The last flusher drains the rest in less.
DRAIN_SECONDS = 60.0
#: Buyers at once, and the pause of each between two orders: enough events for every moment of a
#: round, and few enough to be compared one by one.
WIDTH = 16
POLL_SECONDS = 0.02
#: Orders that are compared with SQL's; all of their events are.
ORDERS_COMPARED = 1_000
ITEMS = (Item(sku="a", name="A", price=1000, total=1_000_000, limit_per_buyer=10),)
DECLINED = Outcome(name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "X"))


class Shop:
    """A sale that continues, regardless of its flusher."""

    def __init__(self, bench: Bench, sale_id: str, seed: int) -> None:
        self.bench, self.sale_id, self.chance = bench, sale_id, random.Random(seed)
        self.buyers = itertools.count(1)
        self.on = True

    async def buyer(self) -> None:
        while self.on:
            order = await self.bench.hold(self.sale_id, f"b{next(self.buyers)}")
            await self._resume(order)
            await asyncio.sleep(POLL_SECONDS)

    async def _resume(self, order: Reservation) -> None:
        match self.chance.randrange(3):
            case 0:
                await self.bench.service.releases.release(order, reason=Reason(Cause.BUYER))
            case 1:
                claimed = await self.bench.claim(order)
                await self.bench.finish(order, claimed.fence, DECLINED)
            case _:
                await self.bench.claim(order)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Buyers come during the block."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WIDTH):
                group.create_task(self.buyer())
            try:
                yield
            finally:
                self.on = False


@contextlib.asynccontextmanager
async def flushing(environ: dict[str, str], sale_id: str) -> AsyncIterator[Any]:
    """A running flusher; killed at the block's end unless it was before."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.processes.flusher_process",
        sale_id,
        cwd=Path(__file__).parents[3],
        env={**os.environ, **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert child.stdout is not None
    try:
        line = await asyncio.wait_for(child.stdout.readline(), START_SECONDS)
        while line and line != b"ready\n":
            line = await asyncio.wait_for(child.stdout.readline(), START_SECONDS)
        assert line, "the flusher did not start"
        yield child
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGKILL)
        output, _ = await child.communicate()
        assert b"alarm" not in output, output


async def kill_flushers(environ: dict[str, str], shop: Shop, kills: int) -> None:
    for _ in range(kills):
        async with flushing(environ, shop.sale_id):
            await asyncio.sleep(shop.chance.uniform(0, LIFE_SECONDS_MAX))


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A server of the test's own, to be ended and started again."""
    with running_postgres() as server:
        yield server


async def assert_sql_is_the_history(shop: Shop) -> int:
    """SQL has every event that Redis ever wrote, once and in order, and each order's state."""
    service, sale_id = shop.bench.service, shop.sale_id
    names = service.keys.of(sale_id)
    seq, chain = await service.connections.command("HMGET", names.sale, "seq", "chain")
    await until_flushed(shop, int(seq))
    events = await service.sql.events.list_after(sale_id, 0, int(seq) + 1_000)
    assert [event.seq for event in events] == list(range(1, int(seq) + 1))
    # The last chain value is Redis' own: a history with it is the one that Redis wrote.
    link = GENESIS
    for event in events:
        link = chain_of(
            link,
            seq=event.seq,
            event=event.event,
            order_id=event.order_id,
            at_ms=event.at_ms,
            data=event.data,
        )
        assert event.chain == link, event
    assert link == chain
    ends = {event.order_id: msgspec.json.decode(event.data)["to"] for event in events[1:]}
    some = shop.chance.sample(sorted(ends.items()), min(len(ends), ORDERS_COMPARED))
    for order_id, status in some:
        row = await service.sql.orders.get(order_id)
        assert row is not None
        assert row.status == status
        assert await service.connections.command("HGET", names.order(order_id), "status") == status
    return len(events)


async def until_flushed(shop: Shop, seq: int) -> None:
    give_up_at = time.monotonic() + DRAIN_SECONDS
    while (await shop.bench.service.sql.events.cursor(shop.sale_id))[0] < seq:
        assert time.monotonic() < give_up_at, "the flusher does not catch up"
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def shop_on(
    tmp_path: Path, redis_url: str, database_url: str
) -> AsyncIterator[tuple[Shop, dict[str, str]]]:
    """A sale with its buyers, and the environment of its flushers."""
    seed = random.SystemRandom().randrange(1_000_000)
    sys.stdout.write(f"seed {seed}\n")
    # SQLite is the default.
    address = "" if database_url.startswith("sqlite") else database_url
    async with bench(tmp_path, redis_url, RESERVATION_DATABASE_URL=address) as made:
        sale_id = await made.sale(items=ITEMS)
        environ = {
            "RESERVATION_DATA_DIR": str(tmp_path),
            "RESERVATION_REDIS_URL": redis_url,
            "RESERVATION_DATABASE_URL": address,
        }
        yield Shop(made, sale_id, seed), environ


@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("kills", KILLS)
async def test_killed_flushers_apply_each_event_once(
    tmp_path: Path, valkey_url: str, database_url: str, kills: int
) -> None:
    async with shop_on(tmp_path, valkey_url, database_url) as (shop, environ):
        async with shop.open():
            await kill_flushers(environ, shop, kills)
        async with flushing(environ, shop.sale_id):
            count = await assert_sql_is_the_history(shop)
        sys.stdout.write(f"{kills} kills, {count} events, each once\n")
        assert count > 100


@pytest.mark.slow
async def test_two_accidental_flushers_apply_each_event_once(
    tmp_path: Path, valkey_url: str, database_url: str
) -> None:
    async with (
        shop_on(tmp_path, valkey_url, database_url) as (shop, environ),
        flushing(environ, shop.sale_id),
        flushing(environ, shop.sale_id),
    ):
        async with shop.open():
            await asyncio.sleep(2)
        assert await assert_sql_is_the_history(shop) > 100


@pytest.mark.slow
async def test_a_flusher_frozen_beside_its_successor_applies_each_event_once(
    tmp_path: Path, valkey_url: str, database_url: str
) -> None:
    """Two workers write one sale after one of them counted as gone."""
    async with (
        shop_on(tmp_path, valkey_url, database_url) as (shop, environ),
        flushing(environ, shop.sale_id) as frozen,
        flushing(environ, shop.sale_id),
    ):
        async with shop.open():
            for _ in range(5):
                await asyncio.sleep(shop.chance.uniform(0, LIFE_SECONDS_MAX))
                frozen.send_signal(signal.SIGSTOP)
                await asyncio.sleep(shop.chance.uniform(0, 1))
                frozen.send_signal(signal.SIGCONT)
        assert await assert_sql_is_the_history(shop) > 100


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", AWAY)
async def test_a_flusher_catches_up_after_a_postgresql_outage(
    tmp_path: Path, valkey_url: str, own_postgres: PostgresServer, seconds: float
) -> None:
    async with shop_on(tmp_path, valkey_url, own_postgres.url()) as (shop, environ):
        async with flushing(environ, shop.sale_id):
            async with shop.open():
                await asyncio.sleep(0.5)
                # Not in good order, and without notice to any client.
                await asyncio.to_thread(own_postgres.stop, signal.SIGQUIT)
                await asyncio.sleep(seconds)
                await asyncio.to_thread(own_postgres.start)
                await asyncio.sleep(0.5)
            count = await assert_sql_is_the_history(shop)
        sys.stdout.write(f"away for {seconds} s, {count} events, each once\n")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", AWAY)
async def test_a_flusher_catches_up_after_an_sqlite_lock(
    tmp_path: Path, valkey_url: str, sqlite_url: str, seconds: float
) -> None:
    file = tmp_path / "orders.sqlite3"
    async with shop_on(tmp_path, valkey_url, sqlite_url) as (shop, environ):
        async with flushing(environ, shop.sale_id):
            async with shop.open():
                async with aiosqlite.connect(file, isolation_level=None) as other:
                    await other.execute("BEGIN IMMEDIATE")
                    await asyncio.sleep(seconds)
                    await other.rollback()
                await asyncio.sleep(0.5)
            count = await assert_sql_is_the_history(shop)
        sys.stdout.write(f"locked for {seconds} s, {count} events, each once\n")


@pytest.mark.slow
async def test_a_second_replay_of_the_stream_changes_nothing(
    tmp_path: Path, valkey_url: str, database_url: str
) -> None:
    async with shop_on(tmp_path, valkey_url, database_url) as (shop, environ):
        async with shop.open():
            await asyncio.sleep(1)
        service = shop.bench.service
        outbox = service.keys.of(shop.sale_id).outbox
        copied = await service.connections.command("COPY", outbox, f"{outbox}:whole")
        assert copied == 1
        count = 0
        for _ in range(2):
            async with flushing(environ, shop.sale_id):
                count = await assert_sql_is_the_history(shop)
            # The whole stream again, and a group that has read nothing of it.
            await service.connections.command("COPY", f"{outbox}:whole", outbox, "REPLACE")
            await service.connections.command("XGROUP", "CREATE", outbox, "sql", "0")
        async with flushing(environ, shop.sale_id):
            assert await assert_sql_is_the_history(shop) == count
            pending = -1
            give_up_at = time.monotonic() + DRAIN_SECONDS
            while pending:
                assert time.monotonic() < give_up_at
                await asyncio.sleep(0.05)
                pending = (await service.connections.command("XPENDING", outbox, "sql"))[0]
