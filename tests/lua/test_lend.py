"""lend.lua: each result word; a lend has one number, and its repeat gets the same answer."""

import pytest
from redis.exceptions import ResponseError

from reservation.adapters.redis.errors import UnexpectedReply
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import LOST, LuaSale


async def test_a_lend_takes_the_units_out_of_the_partition(partition: LuaPartition) -> None:
    await partition.hold(lines={"a": 3})
    assert await partition.lend(units=2) == ["lent", "1", "2", "2"]
    assert await partition.stock() == (8, 5, 3, 0)
    assert await partition.transfers() == {"lent:1:a": "1 2"}
    assert await partition.refills() == 0


async def test_a_lend_gives_no_more_than_is_available(partition: LuaPartition) -> None:
    await partition.hold(lines={"a": 3})
    assert await partition.lend(units=9) == ["lent", "1", "7", "7"]
    assert await partition.stock() == (3, 0, 3, 0)


async def test_the_numbers_count_each_receiver_and_sku_alone(partition: LuaPartition) -> None:
    assert await partition.lend(units=2) == ["lent", "1", "2", "2"]
    assert await partition.lend(units=1, after=1) == ["lent", "2", "1", "3"]
    assert await partition.lend(2, units=4) == ["lent", "1", "4", "4"]
    assert await partition.lend(sku="b", units=5) == ["lent", "1", "5", "5"]
    assert await partition.transfers() == {
        "lent:1:a": "2 3",
        "lent:2:a": "1 4",
        "lent:1:b": "1 5",
    }


async def test_a_repeated_lend_gets_the_same_answer(partition: LuaPartition) -> None:
    await partition.lend(units=2)
    first = await partition.lend(units=3, after=1, operation="mine")
    async with partition.unchanged():
        assert await partition.lend(units=3, after=1, operation="mine") == first
    assert first == ["lent", "2", "3", "5"]


@pytest.mark.parametrize("operation", ["", "op.1", "a:b", "a b", 'x","units":9,"y":"'])
async def test_an_operation_that_is_no_name_lends_nothing(
    partition: LuaPartition, operation: str
) -> None:
    """It would end in the event's JSON and in a field of which the next lend reads the parts."""
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="the operation is not a valid id"):
            await partition.lend(units=1, operation=operation)


async def test_a_lend_under_a_number_of_another_operation_lends_nothing(
    partition: LuaPartition,
) -> None:
    """A repeat that arrives after another collector's lend must not lend a second time."""
    await partition.lend(units=1, operation="mine")
    await partition.lend(units=1, after=1, operation="another")
    async with partition.unchanged():
        assert await partition.lend(units=1, operation="mine") == ["overtaken", "2"]


async def test_a_caller_with_a_later_number_shows_that_lends_were_lost(
    partition: LuaPartition,
) -> None:
    async with partition.unchanged():
        assert await partition.lend(after=1) == ["went_back"]


async def test_overdue_holds_are_reported_once_nothing_is_available(
    partition: LuaPartition,
) -> None:
    old = [await partition.hold(f"buyer-{n}", lines={"a": 3}) for n in range(3)]
    await partition.run_out(*old)
    assert await partition.lend(units=2) == ["lent", "1", "1", "1"]
    async with partition.unchanged():
        word, *orders = await partition.lend(after=1)
        assert (word, set(orders)) == ("due", {basket["order"] for basket in old})


async def test_a_deadline_must_have_passed_by_the_callers_clock_as_well(
    partition: LuaPartition,
) -> None:
    old = [await partition.hold(f"buyer-{n}", lines={"a": 2}) for n in range(5)]
    await partition.run_out(*old)
    assert await partition.lend(caller_ms=1) == ["dry"]


async def test_prepared_orders_hold_nothing_that_a_lend_could_wait_for(
    partition: LuaPartition,
) -> None:
    assert await LuaPartition(partition.connections).put() == ["done", "1"]
    later = LuaPartition(partition.connections)
    await later.put(hold_policy="success")
    await later.run_out(await later.hold())
    await later.lend(units=10)
    assert await later.lend(after=1) == ["dry"]


async def test_a_partition_without_units_or_without_the_item_is_dry(
    partition: LuaPartition,
) -> None:
    await partition.lend(units=10)
    async with partition.unchanged():
        assert await partition.lend(after=1) == ["dry"]
        assert await partition.lend(sku="z") == ["dry"]


async def test_a_paused_or_closed_partition_still_lends(partition: LuaPartition) -> None:
    """Its operator may collect units that leave the sale, and other partitions sell on."""
    for number, status in enumerate(("paused", "closed")):
        assert await partition.switch(status) == ["done"]
        assert (await partition.lend(after=number))[0] == "lent"


async def test_the_event_of_a_lend_has_the_row_of_the_transfer(partition: LuaPartition) -> None:
    await partition.lend(units=2)
    await partition.lend(units=3, after=1, operation="mine")
    assert await partition.last_event() == (
        "lent",
        {
            "peer": 1,
            "sku": "a",
            "number": 2,
            "units": 3,
            "upTo": 5,
            "total": 5,
            "version": 3,
            "operation": "mine",
        },
    )


async def test_a_put_from_before_a_lend_creates_no_units(partition: LuaPartition) -> None:
    await partition.lend(units=4)
    async with partition.unchanged():
        assert await partition.put(version=1) == ["changed", "2"]


async def test_an_outdated_or_late_lend_changes_nothing(partition: LuaPartition) -> None:
    async with partition.unchanged():
        assert await partition.lend(epoch="other") == ["recovering"]
        assert await partition.lend(late=1) == ["too_late"]


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_to_lend(
    partition: LuaPartition, what: str
) -> None:
    await partition.hold()
    async with partition.unchanged():
        assert await partition.lend(mark=partition.lost(what)) == ["went_back"]


async def test_a_sale_of_one_partition_lends_nothing(sale: LuaSale) -> None:
    names = sale.keys
    keys = [names.sale, names.deadlines, names.outbox, names.transfers, names.stock("a")]
    async with sale.unchanged():
        with pytest.raises(UnexpectedReply, match="not a partition"):
            await sale.call("lend", keys, 0, 1, "a", 1, 0, "mine")


@pytest.mark.parametrize(
    "text", ["x", "1", "1 2 3", "1 2 3 ", "-1 2", "1 " + "9" * 20, f"1 2 {'9' * 20} op"]
)
async def test_a_damaged_number_of_lends_stops_the_lend(partition: LuaPartition, text: str) -> None:
    await partition.connections.command("HSET", partition.keys.transfers, "lent:1:a", text)
    async with partition.unchanged():
        with pytest.raises((UnexpectedReply, ResponseError), match="damaged"):
            await partition.lend()


async def test_a_rebuilt_number_without_its_operation_is_continued(
    partition: LuaPartition,
) -> None:
    await partition.connections.command("HSET", partition.keys.transfers, "lent:1:a", "4 9")
    assert await partition.lend(units=1, after=4) == ["lent", "5", "1", "10"]


@pytest.mark.parametrize("field", ["version", "total", "available"])
async def test_a_missing_field_stops_the_lend(partition: LuaPartition, field: str) -> None:
    key = partition.keys.sale if field == "version" else partition.keys.stock("a")
    before = await partition.connections.command("HGET", key, field)
    await partition.connections.command("HDEL", key, field)
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="BUG lend"):
            await partition.lend()
    await partition.connections.command("HSET", key, field, before)


async def test_more_units_available_than_in_all_stop_the_lend(partition: LuaPartition) -> None:
    command, stock = partition.connections.command, partition.keys.stock("a")
    await command("HSET", stock, "available", 11)
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="BUG lend"):
            await partition.lend()
    await command("HSET", stock, "available", 10)


async def test_a_caller_with_the_current_mark_is_served(partition: LuaPartition) -> None:
    await partition.hold()
    assert (await partition.lend(mark=partition.mark))[0] == "lent"
