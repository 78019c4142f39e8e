"""The outbox as the flusher reads it: in order, again until acknowledged, never without a tail."""

from collections.abc import AsyncIterator

import pytest

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.outbox import GROUP, RedisOutbox
from reservation.domain.events import GENESIS, Event, chain_of
from tests.support.lua_sale import NOW, LuaSale


class Bench:
    """A sale whose events are read."""

    def __init__(self, connections: RedisClient) -> None:
        self.sale = LuaSale(connections)
        self.outbox = RedisOutbox(connections, Keys())

    async def new(self, count: int = 100) -> list[int]:
        return numbers(await self.outbox.read_new(self.sale.id, count))

    async def pending(self, count: int = 100) -> list[int]:
        return numbers(await self.outbox.read_pending(self.sale.id, count))


def numbers(events: list[Event]) -> list[int]:
    return [event.seq for event in events]


@pytest.fixture
async def bench(each_server_url: str) -> AsyncIterator[Bench]:
    """Four events: the sale, two holds, and the release of one."""
    connections = RedisClient(each_server_url, clock=NOW)
    made = Bench(connections)
    await made.sale.put()
    first = await made.sale.hold("one")
    await made.sale.hold("two", lines={"a": 1, "b": 1})
    await made.sale.release(first)
    await made.outbox.ensure_group(made.sale.id, 0)
    yield made
    await connections.aclose()


async def test_events_are_read_once_in_order_and_unchanged(bench: Bench) -> None:
    events = await bench.outbox.read_new(bench.sale.id, 100)
    assert numbers(events) == [1, 2, 3, 4]
    assert [event.event for event in events] == ["sale_put", "prepared", "prepared", "released"]
    chain = GENESIS
    for event in events:
        chain = chain_of(
            chain,
            seq=event.seq,
            event=event.event,
            order_id=event.order_id,
            at_ms=event.at_ms,
            data=event.data,
        )
        assert event.chain == chain
    assert await bench.new() == []


async def test_a_batch_respects_the_requested_size(bench: Bench) -> None:
    assert [await bench.new(3), await bench.new(3), await bench.new(3)] == [[1, 2, 3], [4], []]


async def test_read_entries_stay_pending_until_acknowledged(bench: Bench) -> None:
    await bench.new()
    assert await bench.pending() == [1, 2, 3, 4]
    assert await bench.pending(2) == [1, 2]
    await bench.outbox.ack(bench.sale.id, [1, 2])
    assert await bench.pending() == [3, 4]
    await bench.outbox.ack(bench.sale.id, [])
    await bench.outbox.ack(bench.sale.id, [1, 3, 4])
    assert await bench.pending() == []


async def test_a_second_flusher_takes_over_pending_entries(
    bench: Bench, each_server_url: str
) -> None:
    await bench.new(2)
    connections = RedisClient(each_server_url, clock=NOW)
    heir = RedisOutbox(connections, Keys())
    assert numbers(await heir.read_pending(bench.sale.id, 100)) == [1, 2]
    assert numbers(await heir.read_new(bench.sale.id, 100)) == [3, 4]
    await connections.aclose()


async def test_a_trimmed_entry_is_never_ahead_of_an_unwritten_one(
    bench: Bench,
) -> None:
    """One flusher committed and crashed before its acknowledgement; another one trimmed."""
    await bench.new()
    await bench.outbox.trim(bench.sale.id, 4)
    assert await bench.pending(2) == [4]
    assert await bench.pending(2) == [4]


async def test_an_existing_group_is_left_unchanged(bench: Bench) -> None:
    await bench.new(3)
    await bench.outbox.ensure_group(bench.sale.id, 0)
    assert await bench.new() == [4]


async def test_a_new_group_starts_after_the_events_in_sql(bench: Bench) -> None:
    await bench.sale.connections.command("XGROUP", "DESTROY", bench.sale.keys.outbox, GROUP)
    await bench.outbox.ensure_group(bench.sale.id, 2)
    assert await bench.new() == [3, 4]


async def test_a_lost_group_is_not_an_empty_outbox(bench: Bench) -> None:
    await bench.sale.connections.command("XGROUP", "DESTROY", bench.sale.keys.outbox, GROUP)
    for read in (bench.outbox.read_new, bench.outbox.read_pending):
        with pytest.raises(StoreUnavailable):
            await read(bench.sale.id, 100)


async def test_a_reader_does_not_recreate_a_lost_outbox(bench: Bench) -> None:
    """An empty stream would be indistinguishable from a sale that never sold."""
    key = bench.sale.keys.outbox
    await bench.sale.connections.command("DEL", key)
    with pytest.raises(StoreUnavailable):
        await bench.outbox.read_new(bench.sale.id, 100)
    with pytest.raises(StoreUnavailable):
        await bench.outbox.ensure_group(bench.sale.id, 0)
    assert await bench.sale.connections.command("EXISTS", key) == 0


async def test_trimming_keeps_the_last_event_for_the_scripts(bench: Bench) -> None:
    await bench.new()
    await bench.outbox.ack(bench.sale.id, [1, 2, 3, 4])
    await bench.outbox.trim(bench.sale.id, 4)
    assert numbers(await bench.outbox.after(bench.sale.id, 0, 100)) == [4]
    assert (await bench.sale.prepare(bench.sale.basket("three")))[0][0] == "held"
    assert await bench.new() == [5]


async def test_events_can_be_read_without_acknowledging_them(bench: Bench) -> None:
    assert numbers(await bench.outbox.after(bench.sale.id, 1, 2)) == [2, 3]
    assert await bench.new() == [1, 2, 3, 4]


async def test_the_backlog_counts_untrimmed_entries_except_the_tail(bench: Bench) -> None:
    assert await bench.outbox.backlog(bench.sale.id) == 3
    await bench.outbox.trim(bench.sale.id, 4)
    assert await bench.outbox.backlog(bench.sale.id) == 0
    await bench.sale.connections.command("DEL", bench.sale.keys.outbox)
    assert await bench.outbox.backlog(bench.sale.id) == 0


async def test_events_of_sales_are_separate(bench: Bench, each_server_url: str) -> None:
    connections = RedisClient(each_server_url, clock=NOW)
    other = Bench(connections)
    await other.sale.put()
    await other.outbox.ensure_group(other.sale.id, 0)
    assert await other.new() == [1]
    assert await bench.new() == [1, 2, 3, 4]
    await connections.aclose()
