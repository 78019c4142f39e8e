"""A damaged sale neither stops the worker nor delays another sale."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.keys import SaleKeys
from reservation.domain.errors import Unavailable
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.workers.runner import Worker
from tests.support.in_process import Bench, bench

pytestmark = pytest.mark.system

#: A round of the sale, on a busy machine.
PATIENCE_SECONDS = 20.0

Command = tuple[str | int | bytes, ...]

#: Manual edits of a sale's keys, each with a name. The hold in it stays whole.
DAMAGES: dict[str, Callable[[SaleKeys], Command]] = {
    "a deadline at infinity": lambda keys: ("ZADD", keys.deadlines, "inf", "far"),
    "a deadline before all time": lambda keys: ("ZADD", keys.deadlines, "-inf", "ancient"),
    "a lease at infinity": lambda keys: ("ZADD", keys.confirming, "inf", "far"),
    "a lease before all time": lambda keys: ("ZADD", keys.confirming, "-inf", "ancient"),
    "an account due at infinity": lambda keys: ("ZADD", keys.deposits, "inf", "far"),
    "an account due before all time": lambda keys: ("ZADD", keys.deposits, "-inf", "ancient"),
    "a number of 5,000 digits": lambda keys: ("HSET", keys.sale, "seq", "9" * 5_000),
    "a number that is none": lambda keys: ("HSET", keys.sale, "seq", "one"),
    "no number": lambda keys: ("HDEL", keys.sale, "seq"),
    "a hold time that is none": lambda keys: ("HSET", keys.sale, "hold_seconds", "soon"),
    "a hold time of 5,000 digits": lambda keys: ("HSET", keys.sale, "hold_seconds", "9" * 5_000),
    "ids that no sale may have": lambda _: ("SADD", "rsv:sales", "", "a}b", b"\xff", "i" * 5_000),
    "leases of another type": lambda keys: ("SET", keys.confirming, "text"),
    "bytes that are not text": lambda keys: ("HSET", keys.sale, "seq", b"\xff\xfe"),
    "no settings": lambda keys: ("DEL", keys.sale),
    "no outbox": lambda keys: ("DEL", keys.outbox),
    "an outbox of another type": lambda keys: ("SET", keys.outbox, "text"),
    "an outbox entry without fields": lambda keys: ("XADD", keys.outbox, "*", "a", "b"),
    "deadlines of another type": lambda keys: ("SET", keys.deadlines, "text"),
}


@pytest.fixture
async def shop(tmp_path: Path, own_server: EmbeddedServer) -> AsyncIterator[Bench]:
    async with bench(tmp_path, own_server.url) as made:
        yield made


@asynccontextmanager
async def working(shop: Bench) -> AsyncGenerator[asyncio.Task[None]]:
    """A worker that runs; at the end it must still run."""
    task = asyncio.create_task(Worker(shop.service).run())
    try:
        yield task
        assert not task.done(), task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def held(shop: Bench, sale_id: str) -> Reservation:
    """A hold, once the worker's monitor has vouched for the server."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                return await shop.hold(sale_id)
            except Unavailable:
                await asyncio.sleep(0.05)


async def until_expired_and_flushed(shop: Bench, order: Reservation) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            found = await shop.service.sql.orders.get(order.order_id)
            if found is not None and found.status == Status.EXPIRED:
                return
            await asyncio.sleep(0.05)


async def injure(shop: Bench, sale_id: str, damage: str) -> None:
    command = DAMAGES[damage](shop.service.keys.of(sale_id))
    # Exempt from the guard: the server may not be vouched for yet.
    connections = shop.service.connections.unguarded()
    if command[0] == "SET":
        await connections.command("DEL", command[1])
    await connections.command(*command)


async def test_sales_damaged_while_the_worker_runs_leave_another_served(shop: Bench) -> None:
    damaged = {damage: await shop.sale(hold_seconds=1) for damage in DAMAGES}
    sound = await shop.sale(hold_seconds=1)
    async with working(shop):
        for order in [await held(shop, sale_id) for sale_id in damaged.values()]:
            await until_expired_and_flushed(shop, order)
        for damage, sale_id in damaged.items():
            await injure(shop, sale_id, damage)
        await until_expired_and_flushed(shop, await held(shop, sound))


async def test_sales_damaged_before_the_start_leave_another_served(shop: Bench) -> None:
    damaged = {damage: await shop.sale(hold_seconds=1) for damage in DAMAGES}
    sound = await shop.sale(hold_seconds=1)
    for damage, sale_id in damaged.items():
        await shop.flush(sale_id)
        await injure(shop, sale_id, damage)
    async with working(shop):
        await until_expired_and_flushed(shop, await held(shop, sound))


@pytest.mark.parametrize(
    "damage", [name for name in DAMAGES if name.endswith(("infinity", "time"))]
)
async def test_an_impossible_time_delays_no_sound_hold_of_its_sale(
    shop: Bench, damage: str
) -> None:
    sale_id = await shop.sale(hold_seconds=1)
    await injure(shop, sale_id, damage)
    async with working(shop):
        await until_expired_and_flushed(shop, await held(shop, sale_id))
