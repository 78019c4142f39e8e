"""reading.lua: each result word; everything that a certificate compares, at one instant."""

import pytest

from reservation.adapters.redis.errors import UnexpectedReply
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import EPOCH, LOST, LuaSale


async def test_a_reading_has_the_units_the_refills_and_the_transfers(
    partition: LuaPartition,
) -> None:
    await partition.lend(2, units=4)
    await partition.borrow(1, up_to=1)
    await partition.borrow(1, number=2, up_to=3)
    await partition.borrow(2, "b", up_to=1)
    await partition.hold(lines={"a": 2})
    async with partition.unchanged():
        word, epoch, refills, due, available, transfers = await partition.reading()
    assert (word, epoch, refills, due) == ("reading", EPOCH, "3", [])
    assert available == ["7", "6"]
    lots = {tuple(transfers[i : i + 5]) for i in range(0, len(transfers), 5)}
    assert lots == {
        ("lent", "2", "a", "1", "4"),
        ("received", "1", "a", "2", "3"),
        ("received", "2", "b", "1", "1"),
    }


async def test_a_reading_has_the_wanted_items_alone(partition: LuaPartition) -> None:
    await partition.lend(2, "b", 4)
    assert (await partition.reading(["a"]))[4:] == [["10"], []]
    assert (await partition.reading(["b"]))[4:] == [["1"], ["lent", "2", "b", "1", "4"]]


async def test_a_reading_names_overdue_holds_by_the_servers_clock(
    partition: LuaPartition,
) -> None:
    old = await partition.hold()
    await partition.hold("other")
    assert (await partition.reading())[3] == []
    await partition.run_out(old)
    assert (await partition.reading())[3] == [old["order"]]


async def test_the_deadline_of_a_prepared_order_frees_no_unit(partition: LuaPartition) -> None:
    later = LuaPartition(partition.connections)
    await later.put(hold_policy="success")
    await later.run_out(await later.hold())
    assert (await later.reading())[3] == []


async def test_an_item_that_the_partition_lacks_is_not_available(partition: LuaPartition) -> None:
    assert (await partition.reading(["a", "z"]))[4] == ["10", "0"]


async def test_an_outdated_or_late_reading_is_refused(partition: LuaPartition) -> None:
    assert await partition.reading(epoch="other") == ["recovering"]
    assert await partition.reading(late=1) == ["too_late"]


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_is_not_read(partition: LuaPartition, what: str) -> None:
    await partition.hold()
    assert await partition.reading(mark=partition.lost(what)) == ["went_back"]


@pytest.mark.parametrize(
    ("key", "field", "message"),
    [("stock", "available", "not a valid count"), ("transfers", "lent:1:a", "damaged")],
)
async def test_damaged_data_is_an_error(
    partition: LuaPartition, key: str, field: str, message: str
) -> None:
    names = partition.keys
    name = {"stock": names.stock("a"), "transfers": names.transfers}[key]
    before = await partition.connections.command("HGET", name, field)
    await partition.connections.command("HSET", name, field, "x")
    with pytest.raises(UnexpectedReply, match=message):
        await partition.reading()
    if before:
        await partition.connections.command("HSET", name, field, before)


async def test_damaged_refills_close_the_partition(partition: LuaPartition) -> None:
    for damage in ("x", "1.5", "9" * 20):
        await partition.connections.command("HSET", partition.keys.sale, "refills", damage)
        assert await partition.reading() == ["recovering"]
        assert await partition.restock() == ["recovering"]


async def test_a_sale_of_one_partition_has_no_reading(sale: LuaSale) -> None:
    names = sale.keys
    keys = [names.sale, names.deadlines, names.outbox, names.transfers, names.stock("a")]
    with pytest.raises(UnexpectedReply, match="not a partition"):
        await sale.call("reading", keys, 2, "a")


async def test_a_caller_with_the_current_mark_is_served(partition: LuaPartition) -> None:
    await partition.hold()
    assert (await partition.reading(mark=partition.mark))[0] == "reading"
