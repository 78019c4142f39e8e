"""Collector on real servers: a sale of several partitions sells every unit once."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from reservation.adapters.redis.partitions.readings import PartitionReader
from reservation.adapters.redis.partitions.transfers import Transfers
from reservation.adapters.redis.prepare_queue import PrepareQueue
from reservation.application.reservations.collect import Collector, PartitionedSale
from reservation.application.reservations.open_transfers import OPEN_SECONDS, OpenTransfers
from reservation.domain.clock import SystemClock
from reservation.domain.errors import PartitionDry, SoldOut, Unavailable
from reservation.domain.rate_limit import BuyerLimits
from reservation.domain.reservation import Basket
from tests.support.in_process import Bench, bench
from tests.support.lua_sale import plain_wish
from tests.support.partition_sale import PartitionSale

#: Calls of one buyer until its answer is final. Two collectors may refuse each other in all rounds.
CALLS_MAX = 20


class Died(Exception):
    """The process of a collector ends here."""


class LaterClock(SystemClock):
    """The monotonic time of a worker, which a test moves on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class MortalTransfers(Transfers):
    """Ends the collector after some of its lends and borrows."""

    deaths = 0.0
    draw: Random

    async def lend(self, *args: Any, **how: Any) -> Any:
        reply = await super().lend(*args, **how)
        self._die()
        return reply

    async def borrow(self, *args: Any, **how: Any) -> Any:
        reply = await super().borrow(*args, **how)
        self._die()
        return reply

    def _die(self) -> None:
        if self.draw.random() < self.deaths:
            raise Died


class Shop:
    """A sale of several partitions with its collector, its worker and a flusher."""

    def __init__(self, here: Bench, partitions: int) -> None:
        service = here.service
        self.here = here
        self.sale = PartitionSale(here, partitions)
        limits = BuyerLimits()
        connections, keys, clock = service.connections, service.keys, service.clock
        self.transfers = MortalTransfers(connections, keys, clock=clock, limits=limits)
        self.transfers.draw = Random(partitions)
        self.calls_max = CALLS_MAX
        self.queue = PrepareQueue(
            connections, keys, expiry=service.store.expiry, clock=clock, limits=limits
        )
        self.collector = Collector(
            self.transfers,
            PartitionReader(connections, keys),
            service.store.expiry,
            service.sql,
            draw=Random(partitions),
        )
        self.clock = LaterClock()
        finishing = Transfers(connections, keys, clock=clock, limits=limits)
        self.worker = OpenTransfers(finishing, service.sql, clock=self.clock)
        self.answers: Counter[str] = Counter()
        self.buyers = (f"buyer-{number}" for number in itertools.count())

    @property
    def known(self) -> PartitionedSale:
        return PartitionedSale(self.sale.id, tuple(lane.epoch for lane in self.sale.lanes))

    async def flush_for_ever(self) -> None:
        while True:
            await self.sale.flush()
            await asyncio.sleep(0.005)

    async def buy(self, home: int, *lines: tuple[str, int]) -> None:
        """Buy one basket; a buyer whose process dies repeats its call."""
        lane, buyer = self.sale.lanes[home], next(self.buyers)
        order_id = lane.basket()["order"]
        basket = Basket(sale_id=lane.id, order_id=order_id, buyer_id=buyer, wish=plain_wish(*lines))
        for _ in range(self.calls_max):
            try:
                await self._call(home, basket)
            except Died:
                self.answers["died"] += 1
            except SoldOut:
                self.answers["sold out"] += 1
                return
            except Unavailable:
                self.answers["unavailable"] += 1
            else:
                self.answers["held"] += 1
                return
        self.answers["gave up"] += 1

    async def _call(self, home: int, basket: Basket) -> None:
        epoch = self.sale.lanes[home].epoch

        async def prepare(one: Basket) -> Any:
            return await self.queue.prepare(one, epoch=epoch)

        try:
            await prepare(basket)
        except PartitionDry as dry:
            await self.collector.collect(self.known, home, basket, dry, prepare)

    async def finish_transfers(self) -> None:
        """Let the worker finish every open transfer, after the calls of all collectors."""
        await self.sale.flush()
        await self.worker.run_once(self.known)
        self.clock.seconds += OPEN_SECONDS
        while await self.worker.run_once(self.known):
            self.clock.seconds += OPEN_SECONDS
            await self.worker.run_once(self.known)
            self.clock.seconds += OPEN_SECONDS


@pytest.fixture
async def here(tmp_path: Path, each_server_url: str, database_url: str) -> AsyncIterator[Bench]:
    """A service on each server and each database."""
    address = "" if database_url.startswith("sqlite") else database_url
    async with bench(tmp_path, each_server_url, RESERVATION_DATABASE_URL=address) as made:
        yield made


async def held(shop: Shop, sku: str) -> int:
    return sum([(await lane.stock(sku))[2] for lane in shop.sale.lanes])


async def left(shop: Shop, sku: str) -> int:
    return sum([(await lane.stock(sku))[1] for lane in shop.sale.lanes])


async def drain(shop: Shop, baskets: list[tuple[int, tuple[tuple[str, int], ...]]]) -> None:
    flusher = asyncio.create_task(shop.flush_for_ever())
    try:
        async with asyncio.TaskGroup() as group:
            for home, lines in baskets:
                group.create_task(shop.buy(home, *lines))
    finally:
        flusher.cancel()
        await asyncio.gather(flusher, return_exceptions=True)
        await shop.queue.aclose()


@pytest.mark.parametrize("partitions", [2, 4, 8])
async def test_every_unit_is_sold_once_and_then_the_sale_is_sold_out(
    here: Bench, partitions: int
) -> None:
    shop = Shop(here, partitions)
    units = [(3, 2) if place % 2 else (1, 0) for place in range(partitions)]
    totals = [sum(each) for each in zip(*units, strict=True)]
    await shop.sale.open(units)
    draw = Random(partitions)
    wishes = [*[(("a", 1),)] * (totals[0] + 6), *[(("b", 1),)] * (totals[1] + 6)]
    draw.shuffle(wishes)
    await drain(shop, [(draw.randrange(partitions), lines) for lines in wishes])
    assert (await held(shop, "a"), await held(shop, "b")) == tuple(totals)
    assert shop.answers["held"] == sum(totals)
    assert (shop.answers["sold out"], shop.answers["gave up"]) == (12, 0)
    await shop.sale.check(totals)
    assert here.alarms == []


@pytest.mark.parametrize("partitions", [2, 4])
async def test_no_unit_is_lost_with_the_processes_that_die_between_steps(
    here: Bench, partitions: int
) -> None:
    shop = Shop(here, partitions)
    await shop.sale.open([(2,)] * partitions)
    total = 2 * partitions
    shop.transfers.deaths, shop.calls_max = 0.5, 1
    # All buyers are of one partition: every unit of the others is lent to it.
    for _ in range(2 * total):
        await drain(shop, [(0, (("a", 1),))])
        await shop.sale.check([total])
        await shop.finish_transfers()
        assert await held(shop, "a") + await left(shop, "a") == total
    assert shop.answers["died"] > 1
    shop.transfers.deaths, shop.calls_max = 0.0, CALLS_MAX
    await drain(shop, [(1, (("a", 1),))] * (total + 2))
    assert await held(shop, "a") == total
    assert await left(shop, "a") == 0
    await shop.sale.check([total])


async def test_a_basket_of_several_items_is_collected_in_their_order(here: Bench) -> None:
    shop = Shop(here, 3)
    await shop.sale.open([(0, 0), (2, 1), (1, 3)])
    await drain(shop, [(0, (("a", 3), ("b", 4)))])
    assert shop.answers == {"held": 1}
    assert await shop.sale.lanes[0].stock("a") == (3, 0, 3, 0)
    assert await shop.sale.lanes[0].stock("b") == (4, 0, 4, 0)
    await drain(shop, [(1, (("b", 1),))])
    assert shop.answers == {"held": 1, "sold out": 1}
    await shop.sale.check([3, 4])


async def test_a_worker_leaves_the_transfer_of_a_running_call_alone(here: Bench) -> None:
    shop = Shop(here, 2)
    await shop.sale.open([(0,), (1,)])
    assert (await shop.sale.lanes[1].lend(0))[0] == "lent"
    await shop.sale.flush()
    assert await shop.worker.run_once(shop.known) == 0
    shop.clock.seconds += OPEN_SECONDS - 1
    assert await shop.worker.run_once(shop.known) == 0
    assert await shop.sale.in_transit("a") == 1
    shop.clock.seconds += 1
    assert await shop.worker.run_once(shop.known) == 1
    assert await shop.sale.in_transit("a") == 0
    assert await shop.sale.lanes[0].stock() == (1, 1, 0, 0)


async def test_units_in_transit_are_never_sold_out(here: Bench) -> None:
    shop = Shop(here, 2)
    await shop.sale.open([(0,), (1,)])
    assert (await shop.sale.lanes[1].lend(0))[0] == "lent"
    shop.calls_max = 2
    await shop.buy(1, ("a", 1))
    assert shop.answers == {"unavailable": 2, "gave up": 1}
    await shop.finish_transfers()
    await drain(shop, [(1, (("a", 1),))])
    assert shop.answers["held"] == 1
