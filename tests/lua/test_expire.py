"""expire.lua: each result word, batches, and two clocks."""

import pytest
from redis.exceptions import ResponseError

from tests.support.lua_sale import LOST, NOW, LuaSale


async def test_overdue_holds_are_released_once(sale: LuaSale) -> None:
    baskets = [await sale.hold(f"buyer-{n}", lines={"a": 1, "b": 1}) for n in range(3)]
    await sale.run_out(*baskets)
    assert await sale.expire(*baskets) == ["expired"] * 3
    assert await sale.stock("a") == (10, 10, 0, 0)
    assert (await sale.order(baskets[0]))["status"] == "EXPIRED"
    async with sale.unchanged():
        assert await sale.expire(*baskets) == ["settled"] * 3


async def test_each_order_of_a_batch_is_decided_separately(sale: LuaSale) -> None:
    due, running = await sale.hold("due"), await sale.hold("running")
    paid = await sale.hold("paid")
    await sale.claim(paid)
    await sale.run_out(due)
    assert await sale.expire(running, due, paid) == ["not_due", "expired", "settled"]


async def test_a_call_without_orders_replies_with_nothing(sale: LuaSale) -> None:
    assert await sale.expire() == []


@pytest.mark.parametrize("slow", ["caller", "server"])
async def test_a_hold_never_ends_early_by_either_clock(sale: LuaSale, slow: str) -> None:
    basket = await sale.hold()
    caller_ms = NOW.now_ms()
    if slow == "caller":
        await sale.run_out(basket)
        caller_ms -= 3_600_000
    else:
        caller_ms += 3_600_000
    async with sale.unchanged():
        assert await sale.expire(basket, caller_ms=caller_ms) == ["not_due"]


async def test_a_late_or_outdated_call_changes_nothing(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.run_out(basket)
    async with sale.unchanged():
        assert await sale.expire(basket, late=1) == ["too_late"]
        assert await sale.expire(basket, epoch="other") == ["recovering"]
    await sale.expire(basket)


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (("HSET", "order", "status", "CONFIRMED"), "is neither HELD nor PREPARED"),
        (("HSET", "order", "items", "[["), "expire"),
        (("HSET", "buyer", "a", "x"), "is not valid"),
        (("SET", "buyer", "not what it should be"), "WRONGTYPE"),
    ],
)
async def test_a_damaged_order_is_skipped_and_others_expire(
    bare_sale: LuaSale, edit: tuple[str, ...], names: str
) -> None:
    await bare_sale.put()
    before, damaged, after = [await bare_sale.hold(f"buyer-{n}") for n in range(3)]
    await bare_sale.run_out(before, damaged, after)
    command, kind, *rest = edit
    keys = {
        "order": bare_sale.keys.order(damaged["order"]),
        "buyer": bare_sale.keys.buyer(damaged["buyer"]),
    }
    await bare_sale.connections.command(command, keys[kind], *rest)
    first, bug, last = await bare_sale.expire(before, damaged, after)
    assert [first, last] == ["expired", "expired"]
    assert isinstance(bug, ResponseError)
    assert names in str(bug)
    assert await bare_sale.stock("a") == (10, 9, 1, 0)
    assert (await bare_sale.order(damaged))["seq"] == "3"


async def test_held_counters_are_tracked_through_a_batch(bare_sale: LuaSale) -> None:
    await bare_sale.put()
    baskets = [await bare_sale.hold(f"buyer-{n}") for n in range(2)]
    await bare_sale.run_out(*baskets)
    stock = bare_sale.keys.stock("a")
    await bare_sale.connections.command("HSET", stock, "held", "1")
    first, bug = await bare_sale.expire(*baskets)
    assert first == "expired"
    assert "held of a is less than the order" in str(bug)
    # The first order has ended completely; the second is unchanged.
    assert await bare_sale.stock("a") == (10, 9, 0, 0)
    assert (await bare_sale.order(baskets[0]))["status"] == "EXPIRED"
    assert (await bare_sale.order(baskets[1]))["status"] == "HELD"
    await bare_sale.connections.command("HSET", stock, "held", "1")
    assert await bare_sale.expire(*baskets) == ["settled", "expired"]
    await bare_sale.check()


async def test_an_order_listed_twice_expires_once(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.run_out(basket)
    assert await sale.expire(basket, basket) == ["expired", "settled"]
    assert await sale.stock("a") == (10, 10, 0, 0)


async def test_an_expiry_reduces_the_buyer_count_and_removes_a_zero(sale: LuaSale) -> None:
    first, second = await sale.hold("ann"), await sale.hold("ann", lines={"a": 2})
    counted = ("HGETALL", sale.keys.buyer("ann"))
    await sale.run_out(second)
    assert await sale.expire(second) == ["expired"]
    assert await sale.connections.command(*counted) == ["a", "1"]
    await sale.run_out(first)
    assert await sale.expire(first) == ["expired"]
    assert await sale.connections.command(*counted) == []


async def test_the_expiry_of_an_order_without_units_returns_none(bare_sale: LuaSale) -> None:
    await bare_sale.put(hold_policy="success")
    prepared, paying = [await bare_sale.hold("ann", lines={"a": 1}) for _ in range(2)]
    assert (await bare_sale.claim(paying))[0] == "claimed"
    await bare_sale.run_out(prepared)
    assert await bare_sale.expire(prepared) == ["expired"]
    assert await bare_sale.stock("a") == (10, 9, 1, 0)
    assert await bare_sale.bought("ann") == {"a": "1"}
    await bare_sale.check()


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.hold()
    await sale.run_out(basket)
    async with sale.unchanged():
        assert await sale.expire(basket, basket, mark=sale.lost(what)) == ["went_back"] * 2
    assert await sale.expire(basket, mark=sale.mark) == ["expired"]
