"""Long polling for an order's next change: one shared read, bounded per buyer, on a real Redis."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.adapters.redis.errors import StoreUnavailable
from reservation.application.reservations import waits as waits_module
from reservation.application.reservations.waits import WAITS_PER_BUYER_MAX, Waits
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.support.in_process import Bench, bench

LONG_SECONDS = 30.0


class Reader:
    """Reads through the service's own store, counts, and pauses where a test requires it."""

    def __init__(self, place: Bench) -> None:
        self._place = place
        self.reads = 0
        self.under_way = 0
        self.most_at_once = 0
        self.may_proceed = asyncio.Event()
        self.may_proceed.set()
        self.has_begun = asyncio.Event()
        self.broken = False

    async def __call__(self, order_id: str) -> Reservation | None:
        self.reads += 1
        self.under_way += 1
        self.has_begun.set()
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            await self.may_proceed.wait()
            if self.broken:
                raise StoreUnavailable("away")
            return await self._place.service.store.read(order_id)
        finally:
            self.under_way -= 1


@pytest.fixture
async def place(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "var", valkey_url) as found:
        yield found


@pytest.fixture
def reader(place: Bench, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.setattr(waits_module, "POLL_SECONDS", 0.01)
    return Reader(place)


def waiting(waits: Waits, order: Reservation, count: int) -> list[asyncio.Task[Reservation]]:
    return [asyncio.create_task(waits.next_change(order, LONG_SECONDS)) for _ in range(count)]


async def test_one_poll_serves_all_waiters_of_an_order(place: Bench, reader: Reader) -> None:
    order = await place.hold(await place.sale())
    waits = Waits(reader, clock=place.service.clock, of_buyer_max=1_000)
    reader.may_proceed.clear()
    tasks = waiting(waits, order, 1_000)
    async with asyncio.timeout(LONG_SECONDS):
        await reader.has_begun.wait()
        await place.service.releases.release(order, reason=Reason(Cause.BUYER))
        reader.may_proceed.set()
        found = await asyncio.gather(*tasks)
    assert {each.status for each in found} == {Status.RELEASED}
    assert reader.most_at_once == 1
    assert reader.reads < 10


async def test_a_buyers_excess_wait_ends_the_oldest(place: Bench, reader: Reader) -> None:
    sale_id = await place.sale()
    orders = [await place.hold(sale_id) for _ in range(2)]
    other = await place.hold(sale_id, buyer="bob")
    waits = Waits(reader, clock=place.service.clock)
    theirs = waiting(waits, other, 1)
    tasks = [*waiting(waits, orders[0], 3), *waiting(waits, orders[1], WAITS_PER_BUYER_MAX)]
    async with asyncio.timeout(LONG_SECONDS):
        ended = await asyncio.gather(*tasks[:3])
        assert [each.seq for each in ended] == [orders[0].seq] * 3
        assert not any(task.done() for task in [*theirs, *tasks[3:]])
        await place.service.releases.release(orders[1], reason=Reason(Cause.BUYER))
        last = await asyncio.gather(*tasks[3:])
    assert {each.status for each in last} == {Status.RELEASED}
    waits.stop()
    assert (await theirs[0]).status is Status.HELD


async def test_an_ended_wait_leaves_no_poll_behind(place: Bench, reader: Reader) -> None:
    order = await place.hold(await place.sale())
    waits = Waits(reader, clock=place.service.clock)
    assert await waits.next_change(order, 0.05) is order
    (task,) = waiting(waits, order, 1)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(3):
        await asyncio.sleep(0)
    seen = reader.reads
    await asyncio.sleep(0.05)
    assert reader.reads == seen


async def test_a_failed_read_fails_each_wait(place: Bench, reader: Reader) -> None:
    order = await place.hold(await place.sale())
    waits = Waits(reader, clock=place.service.clock)
    reader.broken = True
    for task in waiting(waits, order, 2):
        with pytest.raises(StoreUnavailable):
            await task


async def test_no_wait_begins_during_shutdown(place: Bench, reader: Reader) -> None:
    order = await place.hold(await place.sale())
    waits = Waits(reader, clock=place.service.clock)
    (task,) = waiting(waits, order, 1)
    await asyncio.sleep(0)
    waits.stop()
    async with asyncio.timeout(LONG_SECONDS):
        assert (await task).seq == order.seq
        assert await waits.next_change(order, LONG_SECONDS) is order
