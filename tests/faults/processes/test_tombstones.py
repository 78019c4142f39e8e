"""The process that flushes and adds tombstones is killed at any moment; no order is lost."""

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from reservation.domain.states import Status
from tests.support.in_process import Bench, bench

#: Kills of a push, and of `make soak`.
KILLS = [pytest.param(10, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.soak)]
#: An interpreter, its imports and a check of the schema, on two busy cores.
START_SECONDS = 30.0
#: Maximum life of a process before it is killed: long enough for some rounds.
LIFE_SECONDS_MAX = 0.3
DRAIN_SECONDS = 60.0
POLL_SECONDS = 0.02
BUYERS = 8
ITEMS = (Item(sku="a", name="A", price=1000, total=1_000_000, limit_per_buyer=10),)


@asynccontextmanager
async def replacing(environ: dict[str, str], sale_id: str) -> AsyncIterator[None]:
    """A running process; killed at the block's end."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.processes.tombstone_process",
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
        assert line, "the process did not start"
        yield
    finally:
        child.send_signal(signal.SIGKILL)
        output, _ = await child.communicate()
        assert b"alarm" not in output, output


class Shop:
    """Buyers who hold, leave, and come back to pay."""

    def __init__(self, bench: Bench, sale_id: str, chance: random.Random) -> None:
        self.bench, self.sale_id, self.chance = bench, sale_id, chance
        self.on = True
        self.orders: list[Reservation] = []

    async def buyer(self, number: int) -> None:
        mine: list[Reservation] = []
        while self.on:
            order = await self.bench.hold(self.sale_id, f"b{number}-{len(mine) // 10}")
            self.orders.append(order)
            mine.append(order)
            if self.chance.randrange(4):
                await self.bench.service.releases.release(order, reason=Reason(Cause.BUYER))
            if not self.chance.randrange(4):
                # Perhaps with a tombstone.
                await self.bench.claim(await self._unpaid(mine))
            await asyncio.sleep(POLL_SECONDS)

    async def _unpaid(self, orders: list[Reservation]) -> Reservation:
        while True:
            order = await self.bench.service.store.read(self.chance.choice(orders).order_id)
            assert order is not None
            if order.status in (Status.RELEASED, Status.HELD):
                return order

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for number in range(BUYERS):
                group.create_task(self.buyer(number))
            try:
                yield
            finally:
                self.on = False

    async def hashes(self) -> int:
        """How many released orders have no tombstone."""
        names = self.bench.service.keys.of(self.sale_id)
        statuses = await self.bench.service.connections.pipeline(
            [("HMGET", names.order(order.order_id), "status", "fence") for order in self.orders]
        )
        return sum(status == "RELEASED" and fence is None for status, fence in statuses)

    async def until_replaced(self) -> None:
        give_up_at = time.monotonic() + DRAIN_SECONDS
        while left := await self.hashes():
            assert time.monotonic() < give_up_at, f"{left} orders have no tombstone"
            await asyncio.sleep(0.1)


@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("kills", KILLS)
async def test_a_kill_between_sql_and_the_tombstone_loses_no_order(
    tmp_path: Path, valkey_url: str, database_url: str, kills: int
) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    sys.stdout.write(f"seed {seed}\n")
    address = "" if database_url.startswith("sqlite") else database_url
    async with bench(tmp_path, valkey_url, RESERVATION_DATABASE_URL=address) as made:
        sale_id = await made.sale(items=ITEMS)
        shop = Shop(made, sale_id, random.Random(seed))
        environ = {
            "RESERVATION_DATA_DIR": str(tmp_path),
            "RESERVATION_REDIS_URL": valkey_url,
            "RESERVATION_DATABASE_URL": address,
        }
        async with shop.open():
            for _ in range(kills):
                async with replacing(environ, sale_id):
                    await asyncio.sleep(shop.chance.uniform(0, LIFE_SECONDS_MAX))
        async with replacing(environ, sale_id):
            await shop.until_replaced()
        count = 0
        for order in shop.orders:
            found = await made.service.store.read(order.order_id)
            row = await made.service.sql.orders.get(order.order_id)
            assert found is not None
            assert row is not None
            assert (found.status, found.seq) == (row.status, row.seq)
            count += found.status is Status.RELEASED
        assert await made.audited(sale_id) == ()
        assert count
        sys.stdout.write(f"{kills} kills, {len(shop.orders)} orders, {count} tombstones\n")
