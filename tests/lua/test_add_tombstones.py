"""add_tombstones.lua: each result word, and each order that stays."""

import pytest

from reservation.adapters.redis.keys import buyer_field, order_field
from tests.support.lua_sale import LONG_BEFORE_MS, LOST, LuaSale
from tests.support.lua_tombstones import ADDED, NOT_ADDED, bucket, damage, leave, seq_of


async def test_a_late_call_or_one_to_another_sale_changes_nothing(sale: LuaSale) -> None:
    basket = await leave(sale)
    for how, word in (({"late": 1}, "too_late"), ({"epoch": "other"}, "recovering")):
        async with sale.unchanged():
            assert await sale.add_tombstones(basket, **how) == [word]


@pytest.mark.parametrize("what", LOST)
async def test_a_server_that_went_back_is_not_changed(sale: LuaSale, what: str) -> None:
    basket = await leave(sale)
    async with sale.unchanged():
        assert await sale.add_tombstones(basket, mark=sale.lost(what)) == ["went_back"]
    assert await sale.add_tombstones(basket, mark=sale.mark) == ADDED


async def test_an_ended_order_is_replaced_once(sale: LuaSale) -> None:
    basket = await leave(sale)
    fields = await sale.order(basket)
    assert await sale.add_tombstones(basket, up_to=3) == ADDED
    assert await sale.order(basket) == {}
    text = f"R {fields['seq']} {fields['digest']}"
    expected = {order_field(basket["order"]): text, buyer_field("buyer"): "1"}
    assert await bucket(sale) == expected
    assert await sale.connections.command("EXISTS", sale.keys.buyer_orders("buyer")) == 0
    assert await seq_of(sale) == "3"
    async with sale.unchanged():
        assert await sale.add_tombstones(basket, text=text) == NOT_ADDED


async def test_an_expired_order_is_replaced(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.run_out(basket)
    assert await sale.expire(basket) == ["expired"]
    assert await sale.add_tombstones(basket) == ADDED
    assert (await bucket(sale))[order_field(basket["order"])].startswith("E ")
    assert await seq_of(sale) == "0"


async def test_the_place_only_rises_and_only_in_a_sale_with_tombstones(sale: LuaSale) -> None:
    assert await sale.add_tombstones(up_to=2) == NOT_ADDED
    assert await seq_of(sale) is None
    basket = await leave(sale)
    assert await sale.add_tombstones(basket, up_to=3) == ADDED
    assert await sale.add_tombstones(up_to=2) == NOT_ADDED
    assert await seq_of(sale) == "3"
    assert await sale.add_tombstones(up_to=7) == NOT_ADDED
    assert await seq_of(sale) == "7"


async def test_orders_in_other_states_stay(sale: LuaSale) -> None:
    held, sold = await sale.hold("h"), await sale.sold("s")
    paying, void = await sale.hold("p"), await sale.hold("v")
    await sale.claim(paying)
    await sale.claim(void, "pk-void")
    assert (await sale.finish(void, 1, "voided", attempt=""))[0] == "done"
    assert await sale.release(void) == ["released"]
    async with sale.unchanged():
        assert await sale.add_tombstones(held, sold, paying, void) == NOT_ADDED


async def test_an_order_in_another_state_than_sql_has_stays(sale: LuaSale) -> None:
    basket = await leave(sale)
    fields = await sale.order(basket)
    for text in ("", f"E {fields['seq']} {fields['digest']}", f"R 1 {fields['digest']}", "R 3 x"):
        async with sale.unchanged():
            assert await sale.add_tombstones(basket, text=text) == NOT_ADDED


async def test_a_recent_order_stays_by_the_servers_clock(sale: LuaSale) -> None:
    basket = await leave(sale)
    async with sale.unchanged():
        assert await sale.add_tombstones(basket, keep_ms=0) == NOT_ADDED
    await sale.run_out(basket)
    await sale.connections.command("ZREM", sale.keys.deadlines, basket["order"])
    async with sale.unchanged():
        assert await sale.add_tombstones(basket, keep_ms=60_000) == NOT_ADDED
    assert await sale.add_tombstones(basket, keep_ms=5_000) == ADDED


@pytest.mark.parametrize("field", ["fence", "claimed_at", "payment_key", "finished", "attempt:pk"])
async def test_an_order_with_a_trace_of_a_payment_stays(sale: LuaSale, field: str) -> None:
    basket = await leave(sale)
    await sale.connections.command("HSET", sale.keys.order(basket["order"]), field, "0")
    async with sale.unchanged():
        assert await sale.add_tombstones(basket) == NOT_ADDED


async def test_a_damaged_bucket_keeps_its_orders_and_no_others(sale: LuaSale) -> None:
    bad, good = await leave(sale, "bad"), await leave(sale, "good")
    await sale.connections.command("SET", sale.keys.ended("bad"), "x")
    assert await sale.add_tombstones(bad, good) == ["done", "1", "1"]
    assert await sale.order(bad)
    assert not await sale.order(good)


@pytest.mark.parametrize("count", ["x", "-1"])
async def test_a_damaged_count_keeps_the_order(sale: LuaSale, count: str) -> None:
    basket = await leave(sale)
    key = sale.keys.ended("buyer")
    await sale.connections.command("HSET", key, buyer_field("buyer"), count)
    async with sale.unchanged():
        assert await sale.add_tombstones(basket) == ["done", "0", "1"]


async def test_an_order_that_has_both_stays(sale: LuaSale) -> None:
    basket = await leave(sale)
    await damage(sale, basket, "R 3 digest")
    key = sale.keys.ended("buyer")
    await sale.connections.command("HSET", key, buyer_field("buyer"), "1")
    async with sale.unchanged():
        assert await sale.add_tombstones(basket) == ["done", "0", "1"]


async def test_keys_of_another_buyer_or_order_change_nothing(sale: LuaSale) -> None:
    basket, other = await leave(sale), await leave(sale, "other")
    fields = await sale.order(basket)
    text = f"R {fields['seq']} {fields['digest']}"
    names = sale.keys
    for order, buyer, bucket_of, order_id in (
        (basket, "other", "other", basket["order"]),
        (basket, "buyer", "other", basket["order"]),
        (basket, "other", "buyer", basket["order"]),
        (basket, "buyer", "buyer", other["order"]),
    ):
        keys = [names.sale, names.outbox, names.order(order["order"])]
        keys += [names.buyer_orders(buyer), names.ended(bucket_of)]
        async with sale.unchanged():
            reply = await sale.call("add_tombstones", keys, LONG_BEFORE_MS, 0, order_id, text)
            assert reply == ["done", "0", "1"]


async def test_an_order_missing_in_its_buyers_list_stays(sale: LuaSale) -> None:
    basket = await leave(sale)
    await sale.connections.command("ZREM", sale.keys.buyer_orders("buyer"), basket["order"])
    async with sale.unchanged():
        assert await sale.add_tombstones(basket) == NOT_ADDED
