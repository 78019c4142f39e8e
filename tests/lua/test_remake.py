"""remake.lua: each result word; a lost order is held again with its stock, or not at all."""

import json
from typing import Any

import pytest

from reservation.adapters.redis.errors import UnexpectedReply
from reservation.adapters.redis.scripts import load
from tests.support.lua_sale import EPOCH, LuaSale


async def remake(
    sale: LuaSale, basket: dict[str, Any], *, epoch: str = EPOCH, late: int = 0
) -> Any:
    prices = {"a": 1100, "b": 500}
    items = [[sku, count, prices[sku]] for sku, count in basket["lines"].items()]
    amount = sum(count * price for _, count, price in items)
    names = sale.keys
    order, buyer, *stock = sale.order_keys(basket)
    keys = [names.sale, names.deadlines, names.outbox, order, buyer]
    name = 'n"1'
    return await sale.connections.call(
        load("remake"),
        [*keys, names.buyer_orders(basket["buyer"]), names.ended(basket["buyer"]), *stock],
        [
            sale.connections.server_now_ms() + 5_000 - late * 10_000,
            epoch,
            basket["order"],
            basket["buyer"],
            json.dumps(items),
            amount,
            name,
            json.dumps(name),
            basket["digest"],
        ],
    )


async def test_a_lost_order_is_held_again_at_its_original_prices(
    sale: LuaSale,
) -> None:
    basket = sale.basket(lines={"a": 2, "b": 1})
    await sale.switch("closed")
    assert await remake(sale, basket) == ["done"]
    order = await sale.order(basket)
    assert (order["status"], order["amount"], order["name"]) == ("HELD", "2700", 'n"1')
    assert (await sale.stock("a"), await sale.stock("b")) == ((10, 8, 2, 0), (5, 4, 1, 0))
    assert await sale.bought() == {"a": "2", "b": "1"}
    async with sale.unchanged():
        assert await remake(sale, basket) == ["done"]
    assert (await sale.claim(basket))[0] == "claimed"


async def test_a_remade_order_under_the_success_policy_holds_no_stock(
    bare_sale: LuaSale,
) -> None:
    await bare_sale.put(hold_policy="success")
    basket = bare_sale.basket()
    assert await remake(bare_sale, basket) == ["done"]
    assert (await bare_sale.order(basket))["status"] == "PREPARED"
    assert await bare_sale.stock() == (10, 10, 0, 0)
    await bare_sale.check()


async def test_unavailable_items_are_not_held_again(sale: LuaSale) -> None:
    await sale.hold("other", lines={"b": 5})
    mine = sale.basket("mine", lines={"a": 1, "b": 1})
    async with sale.unchanged():
        assert await remake(sale, mine) == ["sold_out", "", "a", "10", "b", "0"]
        assert await remake(sale, sale.basket(lines={"a": 4})) == ["limit_exceeded", "a", "3", "0"]
        assert await remake(sale, mine, epoch="other") == ["recovering"]
        assert await remake(sale, mine, late=1) == ["too_late"]


async def test_overdue_holds_are_named_before_a_lost_order_is_refused(sale: LuaSale) -> None:
    old = await sale.hold("old", lines={"b": 5})
    full = await sale.hold("buyer", lines={"a": 3})
    await sale.run_out(old)
    await sale.run_out(full)
    overdue = ["due", old["order"], full["order"]]
    short, over = sale.basket("mine", lines={"b": 1}), sale.basket(lines={"a": 1})
    async with sale.unchanged():
        assert sorted(await remake(sale, short)) == sorted(overdue)
        assert sorted(await remake(sale, over)) == sorted(overdue)
    await sale.expire(old)
    await sale.expire(full)
    assert await remake(sale, short) == ["done"]
    assert await remake(sale, over) == ["done"]


async def test_no_overdue_hold_is_named_where_none_could_help(
    sale: LuaSale, bare_sale: LuaSale
) -> None:
    await sale.run_out(await sale.hold("old", lines={"b": 5}))
    async with sale.unchanged():
        assert (await remake(sale, sale.basket(lines={"a": 4})))[0] == "limit_exceeded"
        assert (await remake(sale, sale.basket("mine", lines={"b": 6})))[0] == "limit_exceeded"
    # Under this policy a hold takes no stock.
    await bare_sale.put(hold_policy="success")
    for buyer in ("one", "two"):
        first = await bare_sale.hold(buyer, lines={"b": 3})
    await bare_sale.run_out(first)
    assert (await bare_sale.claim(await bare_sale.hold("three", lines={"b": 3})))[0] == "claimed"
    async with bare_sale.unchanged():
        assert (await remake(bare_sale, bare_sale.basket("mine", lines={"b": 3})))[0] == "sold_out"


async def test_a_removed_item_is_not_held_again(sale: LuaSale) -> None:
    await sale.put(version=1, digest="e", items=[("a", "A", 1000, 10, 3)], leaving=["b"])
    basket = sale.basket(lines={"b": 1})
    assert await remake(sale, basket) == ["item_gone", "b"]


async def test_a_remake_with_a_damaged_list_of_orders_changes_nothing(bare_sale: LuaSale) -> None:
    await bare_sale.put()
    basket = bare_sale.basket()
    list_of_orders = bare_sale.keys.buyer_orders(basket["buyer"])
    await bare_sale.connections.command("SET", list_of_orders, "no sorted set")
    async with bare_sale.unchanged():
        with pytest.raises(UnexpectedReply, match="WRONGTYPE"):
            await remake(bare_sale, basket)
