"""restore_order.lua: each result word."""

import pytest

from reservation.adapters.redis.errors import UnexpectedReply
from reservation.adapters.redis.keys import buyer_field
from tests.support.lua_sale import LOST, LuaSale
from tests.support.lua_tombstones import bucket, damage, leave, replaced


async def test_a_late_call_or_one_to_another_sale_changes_nothing(sale: LuaSale) -> None:
    basket = await replaced(sale)
    for how, word in (({"late": 1}, "too_late"), ({"epoch": "other"}, "recovering")):
        async with sale.unchanged():
            assert await sale.restore_order(basket, **how) == [word]


@pytest.mark.parametrize("what", LOST)
async def test_a_server_that_went_back_is_not_changed(sale: LuaSale, what: str) -> None:
    basket = await replaced(sale)
    async with sale.unchanged():
        assert await sale.restore_order(basket, mark=sale.lost(what)) == ["went_back"]
    assert await sale.restore_order(basket, mark=sale.mark) == ["done"]


async def test_a_restored_order_is_as_before(sale: LuaSale) -> None:
    first, second = await leave(sale), await leave(sale)
    before = await sale.dump()
    assert await sale.add_tombstones(first, second) == ["done", "2", "0"]
    assert (await bucket(sale))[buyer_field("buyer")] == "2"
    assert await sale.restore_order(first) == ["done"]
    assert (await bucket(sale))[buyer_field("buyer")] == "1"
    assert await sale.restore_order(second) == ["done"]
    assert await bucket(sale) == {}
    await sale.connections.command("HDEL", sale.keys.sale, "tombstone_seq")
    assert await sale.dump() == before


async def test_a_restore_repeats_without_effect(sale: LuaSale) -> None:
    basket = await replaced(sale)
    kept = dict(sale.replaced)
    assert await sale.restore_order(basket) == ["done"]
    sale.replaced |= kept
    async with sale.unchanged():
        assert await sale.restore_order(basket) == ["present"]


async def test_a_missing_tombstone_is_not_found(sale: LuaSale) -> None:
    basket = await replaced(sale)
    await sale.connections.command("UNLINK", sale.keys.ended("buyer"))
    async with sale.unchanged():
        assert await sale.restore_order(basket) == ["not_found"]


@pytest.mark.parametrize("text", ["", "garbage", "R 999 " + "0" * 32])
async def test_a_tombstone_that_differs_from_sql_stays(sale: LuaSale, text: str) -> None:
    basket = await replaced(sale)
    async with sale.unchanged():
        assert await sale.restore_order(basket, text="R 1 other") == ["differs"]
    await damage(sale, basket, text)
    async with sale.unchanged():
        assert await sale.restore_order(basket) == ["differs"]


async def test_a_tombstone_with_a_wrong_count_stays(sale: LuaSale) -> None:
    basket = await replaced(sale)
    for count in ("x", "0"):
        await sale.connections.command(
            "HSET", sale.keys.ended("buyer"), buyer_field("buyer"), count
        )
        async with sale.unchanged():
            assert await sale.restore_order(basket) == ["differs"]


async def test_a_damaged_list_of_the_buyer_keeps_the_tombstone(sale: LuaSale) -> None:
    basket = await replaced(sale)
    await sale.connections.command("SET", sale.keys.buyer_orders("buyer"), "x")
    async with sale.unchanged():
        with pytest.raises(UnexpectedReply):
            await sale.restore_order(basket)
