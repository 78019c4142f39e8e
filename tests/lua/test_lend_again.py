"""lend_again.lua: each result word; units that a peer has received leave the partition once."""

import pytest

from reservation.adapters.redis.errors import UnexpectedReply
from reservation.adapters.redis.scripts import load
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import EPOCH, LuaSale


async def test_units_that_a_peer_has_received_leave_the_partition(partition: LuaPartition) -> None:
    assert await partition.lend_again(number=3, up_to=4) == ["lent", "4"]
    assert await partition.stock() == (6, 6, 0, 0)
    assert await partition.transfers() == {"lent:1:a": "3 4"}
    event, data = await partition.last_event()
    assert (event, data) == (
        "lent",
        {
            "peer": 1,
            "sku": "a",
            "number": 3,
            "units": 4,
            "upTo": 4,
            "total": 6,
            "version": 2,
            "operation": "rebuild",
        },
    )
    async with partition.unchanged():
        assert await partition.lend_again(number=3, up_to=4) == ["done"]
        assert await partition.lend_again(number=2, up_to=1) == ["done"]
    assert await partition.lend(after=3) == ["lent", "4", "1", "5"]


async def test_only_the_difference_to_the_lends_that_are_known_leaves(
    partition: LuaPartition,
) -> None:
    await partition.lend(units=2)
    assert await partition.lend_again(number=3, up_to=5) == ["lent", "3"]
    assert await partition.stock() == (5, 5, 0, 0)


async def test_units_that_are_held_do_not_leave(partition: LuaPartition) -> None:
    await partition.hold(lines={"a": 3})
    async with partition.unchanged():
        assert await partition.lend_again(number=1, up_to=8) == ["short", "7"]
        assert await partition.lend_again(sku="z", number=1, up_to=1) == ["short", "0"]


async def test_another_epoch_or_a_late_call_changes_nothing(partition: LuaPartition) -> None:
    async with partition.unchanged():
        assert await partition.lend_again(epoch="other") == ["recovering"]
        assert await partition.lend_again(late=1) == ["too_late"]


async def test_a_later_number_of_no_more_units_is_a_bug(partition: LuaPartition) -> None:
    await partition.lend(units=2)
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="more units"):
            await partition.lend_again(number=2, up_to=2)


@pytest.mark.parametrize("damaged", ["lent:1:a", "total", "version"])
async def test_damaged_data_are_a_bug(partition: LuaPartition, damaged: str) -> None:
    names, command = partition.keys, partition.connections.command
    key = {"total": names.stock("a"), "version": names.sale}.get(damaged, names.transfers)
    before = await command("HGET", key, damaged)
    await command("HSET", key, damaged, "x")
    async with partition.unchanged():
        with pytest.raises(UnexpectedReply, match="BUG lend_again"):
            await partition.lend_again(number=1, up_to=1)
    await command("HDEL", key, damaged)
    if before is not None:
        await command("HSET", key, damaged, before)


async def test_a_whole_sale_lends_nothing(sale: LuaSale) -> None:
    names = sale.keys
    keys = [names.sale, names.outbox, names.transfers, names.stock("a")]
    not_after = sale.connections.server_now_ms() + 5_000
    async with sale.unchanged():
        with pytest.raises(UnexpectedReply, match="not a partition"):
            await sale.connections.call(load("lend_again"), keys, [not_after, EPOCH, 1, "a", 1, 1])
