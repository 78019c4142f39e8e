"""prepare.lua in a sale with tombstones: replays, the limit on unpaid orders, and damage."""

import pytest

from reservation.adapters.redis.keys import buyer_field
from tests.support.lua_sale import LuaSale
from tests.support.lua_tombstones import ADDED, damage, leave, replaced


async def test_a_prepare_is_told_to_declare_the_buckets(sale: LuaSale) -> None:
    await replaced(sale)
    async with sale.unchanged():
        assert await sale.common(sale.basket()) == ["tombstones"]
    sale.buckets = True
    assert (await sale.prepare(sale.basket()))[0][0] == "held"


async def test_buckets_may_be_declared_without_a_tombstone(sale: LuaSale) -> None:
    sale.buckets = True
    await damage(sale, {"buyer": "buyer", "order": "x" * 24}, "garbage")
    assert (await sale.prepare(sale.basket()))[0][0] == "held"


async def test_a_replayed_key_finds_its_tombstone(sale: LuaSale) -> None:
    basket = await replaced(sale)
    async with sale.unchanged():
        assert await sale.prepare(basket) == [["replayed"]]
        assert await sale.prepare({**basket, "digest": "1" * 32}) == [["key_reused"]]
    other = sale.basket("other")
    assert [reply[0] for reply in await sale.prepare(basket, other)] == ["replayed", "held"]


async def test_tombstones_count_against_the_limit_on_unpaid_orders(sale: LuaSale) -> None:
    for _ in range(2):
        await replaced(sale)
    left = await leave(sale)
    assert await sale.prepare(sale.basket(), unpaid_max=3) == [["too_many_orders", "3"]]
    assert (await sale.prepare(sale.basket("other"), unpaid_max=3))[0][0] == "held"
    assert (await sale.prepare(sale.basket(), unpaid_max=4))[0][0] == "held"
    assert await sale.add_tombstones(left) == ADDED
    assert (await sale.prepare(sale.basket(), unpaid_max=4))[0][0] == "held"
    assert await sale.prepare(sale.basket("buyer", lines={"b": 1}), unpaid_max=3) == [
        ["too_many_orders", "3"]
    ]


@pytest.mark.parametrize("text", ["", "R 3", "X 3 digest", "R x digest", "R 3 a b"])
async def test_a_damaged_tombstone_takes_no_hold(sale: LuaSale, text: str) -> None:
    basket, other = await replaced(sale), sale.basket("other")
    await damage(sale, basket, text)
    assert (await sale.prepare(other))[0][0] == "held"
    damaged, held = await sale.replies(basket, sale.basket("third"))
    assert isinstance(damaged, Exception)
    assert "tombstone is damaged" in str(damaged)
    assert held > 0


async def test_a_standing_order_is_replayed_beside_a_damaged_bucket(sale: LuaSale) -> None:
    await replaced(sale)
    held = await sale.hold()
    await sale.connections.command("HSET", sale.keys.ended("buyer"), buyer_field("buyer"), "many")
    assert await sale.prepare(held) == [["replayed"]]
    [refused] = await sale.replies(sale.basket())
    assert isinstance(refused, Exception)
