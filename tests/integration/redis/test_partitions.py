"""The adapters of partitions on a real server: typed replies of transfers and readings."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys, lane_of
from reservation.adapters.redis.partitions.readings import PartitionReader
from reservation.adapters.redis.partitions.transfers import (
    AlreadyReceived,
    Dry,
    Due,
    Lent,
    Overtaken,
    Received,
    Transfer,
    Transfers,
)
from reservation.adapters.redis.prepare_queue import PrepareQueue
from reservation.adapters.redis.prepare_script import HoldCreated, Replayed
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_writer import SaleWriter
from reservation.domain.certificate import Certificate, Doubt, Lot, Reading, judge
from reservation.domain.errors import (
    BuyerLimitExceeded,
    PartitionDry,
    SalePaused,
    SaleRecovering,
    SkuNotFound,
    Unavailable,
)
from reservation.domain.payment import Claimed, Present
from reservation.domain.rate_limit import BuyerLimits
from reservation.domain.reservation import Basket, Reservation
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import EPOCH, NOW, plain_wish

OTHER_EPOCH = "epoch-2"


class Pair:
    """A sale of two partitions, with three units of `a` in the second one."""

    def __init__(self, connections: RedisClient, sale_id: str) -> None:
        self.sale_id = sale_id
        self.home = LuaPartition(connections, sale_id, 0)
        self.peer = LuaPartition(connections, sale_id, 1)
        self.transfers = Transfers(connections, Keys(), clock=NOW, limits=BuyerLimits())
        self.reader = PartitionReader(connections, Keys())

    async def open(self) -> None:
        await self.home.put(items=[("a", "A", 1000, 0, 2), ("b", "B", 500, 1, 5)])
        await self.peer.put(items=[("a", "A", 1000, 3, 2), ("b", "B", 500, 0, 5)])

    async def lend(
        self, units: int = 1, *, after: int = 0, operation: str = "one"
    ) -> Lent | Overtaken | Due | Dry:
        return await self.transfers.lend(
            self.sale_id,
            1,
            0,
            epoch=EPOCH,
            sku="a",
            units=units,
            after=after,
            operation=operation,
        )

    async def borrow(
        self, number: int = 1, up_to: int = 1, waiting: Basket | None = None, sku: str = "a"
    ) -> Received | AlreadyReceived:
        transfer = Transfer(
            sale_id=self.sale_id, donor=1, receiver=0, sku=sku, number=number, up_to=up_to
        )
        return await self.transfers.borrow(transfer, epoch=EPOCH, waiting=waiting)

    def basket(self, *lines: tuple[str, int], buyer: str = "ann") -> Basket:
        made = self.home.basket(buyer)
        return Basket(
            sale_id=self.sale_id,
            order_id=made["order"],
            buyer_id=buyer,
            wish=plain_wish(*lines),
        )

    async def read(self, *skus: str) -> list[Reading]:
        return [
            await self.reader.read(self.sale_id, place, epoch=EPOCH, partitions=2, skus=skus)
            for place in range(2)
        ]

    async def verdict(self, **wants: int) -> Certificate | Doubt:
        first = await self.read(*wants)
        return judge(first, await self.read(*wants), wants)


@pytest.fixture
async def pair(valkey_url: str) -> AsyncIterator[Pair]:
    connections = RedisClient(valkey_url, clock=NOW)
    await connections.measure_offset()
    made = Pair(connections, LuaPartition(connections).id.partition(".")[0])
    await made.open()
    yield made
    await made.home.check()
    await made.peer.check()
    await connections.aclose()


async def test_a_transfer_moves_units_to_the_order_that_waits(pair: Pair) -> None:
    assert await pair.lend(2) == Lent(1, 2, 2)
    assert await pair.lend(2) == Lent(1, 2, 2)
    waiting = pair.basket(("a", 2), ("b", 1))
    received = await pair.borrow(up_to=2, waiting=waiting)
    assert isinstance(received, Received)
    assert received.units == 2
    assert isinstance(received.decision, HoldCreated)
    held = received.decision.reservation()
    assert (held.order_id, held.buyer_id, held.status) == (waiting.order_id, "ann", "HELD")
    assert [(line.sku, line.quantity, line.price) for line in held.lines] == [
        ("a", 2, 1000),
        ("b", 1, 500),
    ]
    assert await pair.borrow(up_to=2, waiting=waiting) == AlreadyReceived()
    assert await pair.home.stock() == (2, 0, 2, 0)
    assert await pair.peer.stock() == (1, 1, 0, 0)


async def test_a_lend_names_its_reasons(pair: Pair) -> None:
    await pair.lend(2)
    assert await pair.lend(1, operation="two") == Overtaken(1)
    last = await pair.peer.hold("bob")
    assert await pair.lend(after=1, operation="two") == Dry()
    await pair.peer.run_out(last)
    assert await pair.lend(after=1, operation="two") == Due((last["order"],))


async def test_a_borrow_names_the_refusal_of_the_order(pair: Pair) -> None:
    assert await pair.borrow(1, 1) == Received(1, None)
    short = await pair.borrow(2, 2, pair.basket(("a", 1), ("b", 2)))
    assert short == Received(1, Dry({"a": 2, "b": 1}))
    greedy = await pair.borrow(3, 3, pair.basket(("a", 3)))
    assert isinstance(greedy, Received)
    assert isinstance(greedy.decision, BuyerLimitExceeded)
    held = pair.basket(("b", 1), buyer="bob")
    assert await pair.borrow(4, 4, held)
    assert await pair.borrow(5, 5, held) == Received(1, Replayed())
    await pair.home.run_out({"order": held.order_id})
    waiting = pair.basket(("b", 1))
    assert await pair.borrow(6, 6, waiting) == Received(1, Due((held.order_id,)))
    await pair.home.switch("paused")
    paused = await pair.borrow(7, 7, waiting)
    assert isinstance(paused, Received)
    assert isinstance(paused.decision, SalePaused)


async def test_an_item_that_the_receiver_lacks_is_refused(pair: Pair) -> None:
    with pytest.raises(SkuNotFound):
        await pair.borrow(sku="z")


async def test_readings_of_both_partitions_decide_whether_the_sale_is_short(pair: Pair) -> None:
    assert await pair.verdict(a=3) is Doubt.NOT_SHORT
    assert await pair.verdict(a=4) == Certificate("a", 4)
    assert await pair.verdict(a=1, b=2) == Certificate("b", 2)
    await pair.lend(1)
    assert await pair.verdict(a=4) is Doubt.NOT_SHORT, "a unit is in transit"
    await pair.borrow(1, 1)
    assert await pair.verdict(a=4) == Certificate("a", 4)
    await pair.peer.run_out(await pair.peer.hold())
    assert await pair.verdict(a=4) is Doubt.DUE


async def test_a_reading_has_the_lots_of_each_peer(pair: Pair) -> None:
    await pair.lend(2)
    await pair.borrow(1, 2)
    read = await pair.read("a", "b")
    assert (read[1].lent, read[1].received) == ({(0, "a"): Lot(1, 2)}, {})
    assert (read[0].lent, read[0].received) == ({}, {(1, "a"): Lot(1, 2)})
    assert (read[0].refills, read[1].refills) == (1, 0)
    assert read[0].available == {"a": 2, "b": 1}


async def test_a_partition_under_another_epoch_is_neither_read_nor_changed(pair: Pair) -> None:
    with pytest.raises(SaleRecovering):
        await pair.reader.read(pair.sale_id, 0, epoch=OTHER_EPOCH, partitions=2, skus=["a"])
    transfer = Transfer(sale_id=pair.sale_id, donor=1, receiver=0, sku="a", number=1, up_to=1)
    async with pair.home.unchanged():
        with pytest.raises(SaleRecovering):
            await pair.transfers.borrow(transfer, epoch=OTHER_EPOCH)


async def test_the_queue_never_calls_a_partition_sold_out(pair: Pair) -> None:
    connections = pair.home.connections
    store = ReservationStore(connections, Keys(), clock=NOW)
    queue = PrepareQueue(connections, Keys(), expiry=store.expiry, clock=NOW, limits=BuyerLimits())
    wish = plain_wish(("a", 1))
    baskets = [
        Basket(
            sale_id=pair.home.id,
            order_id=pair.home.basket()["order"],
            buyer_id=f"buyer-{number}",
            wish=wish,
        )
        for number in range(3)
    ]
    calls = (queue.prepare(basket, epoch=EPOCH) for basket in baskets)
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(refusal) for refusal in found] == [PartitionDry] * 3
    assert all(isinstance(refusal, Unavailable) for refusal in found)
    assert [refusal.available for refusal in found if isinstance(refusal, PartitionDry)] == [
        {"a": 0}
    ] * 3


async def test_a_claim_in_a_partition_is_dry_and_never_expired(pair: Pair) -> None:
    store = ReservationStore(pair.home.connections, Keys(), clock=NOW)
    order = await ended_order(pair)

    async def claim() -> Claimed | Present:
        return await store.claim(order, epoch=EPOCH, payment_key="pk", lease_ms=1000)

    with pytest.raises(PartitionDry) as refusal:
        await claim()
    assert refusal.value.available == {"a": 0}
    await pair.lend(1, after=1)
    await pair.borrow(2, 2)
    assert isinstance(await claim(), Claimed)


async def test_a_claim_behind_an_overdue_hold_that_cannot_end_is_unavailable(pair: Pair) -> None:
    """A damaged hold never ends, and other partitions may have the units."""
    order = await ended_order(pair)
    await pair.lend(1, after=1)
    await pair.borrow(2, 2)
    damaged = await pair.home.hold("eve")
    await pair.home.run_out(damaged)
    store = ReservationStore(pair.home.connections, Keys(), clock=NOW)
    key = pair.home.keys.order(damaged["order"])
    items = await pair.home.connections.command("HGET", key, "items")
    await pair.home.connections.command("HSET", key, "items", "damaged")
    with pytest.raises(Unavailable):
        await store.claim(order, epoch=EPOCH, payment_key="pk", lease_ms=1000)
    await pair.home.connections.command("HSET", key, "items", items)


async def ended_order(pair: Pair) -> Reservation:
    """Return an order that has ended in the home partition, whose unit is then given away."""
    await pair.lend(1, operation="first")
    waiting = pair.basket(("a", 1))
    received = await pair.borrow(1, 1, waiting)
    assert isinstance(received, Received)
    assert isinstance(received.decision, HoldCreated)
    basket = {"order": waiting.order_id, "buyer": "ann", "lines": {"a": 1}}
    assert await pair.home.release(basket) == ["released"]
    assert (await pair.home.lend(1, "a"))[0] == "lent"
    await pair.peer.borrow(0, "a")
    return msgspec.structs.replace(received.decision.reservation(), sale_id=pair.home.id)


async def test_a_partition_does_not_lend_to_itself(pair: Pair) -> None:
    with pytest.raises(ValueError, match="itself"):
        await pair.transfers.lend(
            pair.sale_id, 1, 1, epoch=EPOCH, sku="a", units=1, after=0, operation="one"
        )


async def test_a_rebuild_removes_the_transfers_of_a_partition(valkey_url: str) -> None:
    async def no_orders() -> AsyncIterator[list[tuple[str, str]]]:
        for page in ():
            yield page

    connections = RedisClient(valkey_url, clock=NOW)
    await connections.measure_offset()
    partition = LuaPartition(connections)
    await partition.put()
    await partition.lend()
    writer = SaleWriter(connections, Keys())
    await writer.clear(partition.id, epoch=EPOCH, orders=no_orders(), skus=["a", "b"])
    left = await connections.command("KEYS", f"{partition.keys.all}*")
    await connections.aclose()
    assert left == [partition.keys.sale]


def test_a_partition_has_keys_like_a_sale() -> None:
    names = Keys().of(lane_of("s", 7))
    assert names.sale == "rsv:{s.7}:sale"
    assert names.transfers == "rsv:{s.7}:transfers"
    for partition in (-1, 64):
        with pytest.raises(ValueError, match="partition"):
            lane_of("s", partition)
