"""prepare.lua: the sustained rate limit of a buyer and the limit of unpaid orders per buyer."""

from typing import Any

import pytest

from tests.support.lua_sale import LuaSale

MINUTE_MS = 60_000


async def leave(sale: LuaSale, buyer: str = "ann", **limits: Any) -> str:
    """One iteration of a prepare / release loop; returns the reply word of the prepare."""
    basket = sale.basket(buyer)
    word = (await sale.prepare(basket, **limits))[0][0]
    if word == "held":
        assert await sale.release(basket) == ["released"]
    return word


async def test_the_unpaid_orders_of_a_buyer_are_limited(sale: LuaSale) -> None:
    words = [await leave(sale, unpaid_max=3) for _ in range(5)]
    refused = "too_many_orders"
    assert words == [*["held"] * 3, refused, refused]
    async with sale.unchanged():
        assert await sale.prepare(sale.basket("ann"), unpaid_max=3) == [["too_many_orders", "3"]]
    assert await leave(sale, "bob", unpaid_max=3) == "held"


async def test_prepared_orders_without_a_hold_count_as_unpaid(bare_sale: LuaSale) -> None:
    await bare_sale.put(hold_policy="success")
    baskets = [bare_sale.basket("ann") for _ in range(4)]
    words = [reply[0] for reply in await bare_sale.prepare(*baskets, unpaid_max=3)]
    assert words == ["prepared"] * 3 + ["too_many_orders"]


@pytest.mark.parametrize("at_once", [False, True])
async def test_held_orders_do_not_count_as_unpaid(sale: LuaSale, at_once: bool) -> None:
    """Nor do orders in CONFIRMING or AWAITING_DEPOSIT."""
    paying, waiting = await sale.hold("ann"), await sale.hold("ann")
    await sale.claim(paying)
    claimed = await sale.claim(waiting)
    await sale.finish(waiting, claimed[1], "awaiting_deposit", due_ms=1)
    held = [sale.basket("ann", lines={"b": 1}) for _ in range(3)]
    words = [reply[0] for reply in await sale.prepare(*held, unpaid_max=1)]
    assert words == ["held"] * 3
    another = sale.basket("ann", lines={"b": 1})
    await sale.release(held[0])
    if at_once:
        [last] = await sale.prepare(another, unpaid_max=1)
    else:
        [first, last] = await sale.prepare(sale.basket("bob"), another, unpaid_max=1)
        assert first[0] == "held"
    assert last[0] == "too_many_orders"


async def test_an_expired_order_counts_as_unpaid(sale: LuaSale) -> None:
    basket = await sale.hold("ann")
    await sale.run_out(basket)
    assert await sale.expire(basket) == ["expired"]
    assert (await sale.prepare(sale.basket("ann"), unpaid_max=1))[0][0] == "too_many_orders"


async def test_a_declined_order_counts_as_unpaid(sale: LuaSale) -> None:
    basket = await sale.hold("ann")
    claimed = await sale.claim(basket)
    await sale.finish(basket, claimed[1], "declined")
    assert (await sale.prepare(sale.basket("ann"), unpaid_max=1))[0][0] == "too_many_orders"


async def test_paid_and_refunded_orders_do_not_count_as_unpaid(sale: LuaSale) -> None:
    sold = await sale.sold("ann")
    assert await leave(sale, unpaid_max=1) == "held"
    assert await leave(sale, unpaid_max=1) == "too_many_orders"
    assert await sale.refund(sold) == ["refunded"]
    assert await sale.paid("ann") == 1
    assert await leave(sale, unpaid_max=1) == "too_many_orders"
    assert await leave(sale, unpaid_max=2) == "held"


async def test_a_reversed_deposit_may_count_as_unpaid(sale: LuaSale) -> None:
    sold = await sale.sold("ann")
    await sale.finish(sold, 1, "awaiting_deposit", due_ms=1)
    assert await sale.paid("ann") == 0
    await sale.finish(sold, 1, "expired")
    assert await leave(sale, unpaid_max=1) == "too_many_orders"


async def test_refunded_late_money_counts_as_paid(sale: LuaSale) -> None:
    basket = await sale.hold("ann")
    claimed = await sale.claim(basket)
    await sale.finish(basket, claimed[1], "refunded")
    assert await sale.paid("ann") == 1


async def test_a_replay_is_answered_before_both_limits(sale: LuaSale) -> None:
    basket = await sale.hold("ann")
    await sale.release(basket)
    limits = {"unpaid_max": 1, "rate": (50, 20), "sustained": (1, MINUTE_MS)}
    assert await sale.prepare(basket, **limits) == [["replayed"]]
    assert (await sale.prepare(sale.basket("ann"), **limits))[0][0] == "too_many_orders"


async def test_the_limit_counts_thousands_of_orders(bare_sale: LuaSale) -> None:
    await bare_sale.put(items=[("a", "A", 1000, 5_000, 5_000)])
    baskets = [bare_sale.basket("ann") for _ in range(2_500)]
    for start in range(0, 2_500, 100):
        await bare_sale.prepare(*baskets[start : start + 100])
    await bare_sale.release(baskets[0])
    await bare_sale.release(baskets[2_400])
    assert (await bare_sale.prepare(bare_sale.basket("ann"), unpaid_max=2))[0][0] == (
        "too_many_orders"
    )
    assert (await bare_sale.prepare(bare_sale.basket("ann"), unpaid_max=3))[0][0] == "held"


async def test_a_buyer_cannot_exceed_the_sustained_rate(sale: LuaSale) -> None:
    limits: dict[str, Any] = {"rate": (MINUTE_MS, 1_000), "sustained": (3, MINUTE_MS)}
    words = [await leave(sale, **limits) for _ in range(4)]
    assert words == ["held"] * 3 + ["rate_limited"]
    async with sale.unchanged():
        [[word, wait_ms]] = await sale.prepare(sale.basket("ann"), **limits)
        assert word == "rate_limited"
        assert 0 < int(wait_ms) <= MINUTE_MS


@pytest.mark.parametrize(("moved_ms", "word"), [(-60_001, "held"), (-30_000, "rate_limited")])
async def test_the_sustained_rate_counts_a_sliding_period(
    sale: LuaSale, moved_ms: int, word: str
) -> None:
    first, second = await sale.hold("ann"), await sale.hold("ann")
    orders = sale.keys.buyer_orders("ann")
    await sale.connections.command("ZINCRBY", orders, moved_ms, first["order"])
    await sale.connections.command("ZINCRBY", orders, -1_000, second["order"])
    reply = await sale.prepare(sale.basket("ann"), rate=(1, 1_000), sustained=(2, MINUTE_MS))
    assert reply[0][0] == word


async def test_after_a_clock_step_back_the_sustained_rate_lasts_one_period(
    sale: LuaSale,
) -> None:
    basket = await sale.hold("ann")
    await sale.connections.command(
        "ZINCRBY", sale.keys.buyer_orders("ann"), 3_600_000, basket["order"]
    )
    reply = await sale.prepare(sale.basket("ann"), rate=(1, 9), sustained=(1, MINUTE_MS))
    assert reply == [["rate_limited", str(MINUTE_MS)]]


async def test_without_a_burst_there_is_no_sustained_rate(sale: LuaSale) -> None:
    words = [await leave(sale, rate=(0, 0), sustained=(1, MINUTE_MS)) for _ in range(3)]
    assert words == ["held"] * 3


async def test_a_malformed_paid_count_fails_as_a_bug(bare_sale: LuaSale) -> None:
    await bare_sale.put()
    basket = await bare_sale.hold("ann")
    await bare_sale.connections.command("HSET", bare_sale.keys.buyer("ann"), ":paid", "many")
    [bug] = await bare_sale.prepare(bare_sale.basket("ann"), unpaid_max=1)
    assert "BUG prepare: the buyer's count of paid orders is not valid" in str(bug)
    claimed = await bare_sale.claim(basket)
    async with bare_sale.unchanged():
        with pytest.raises(Exception, match="BUG finish"):
            await bare_sale.finish(basket, claimed[1], "confirmed")


async def test_the_paid_count_never_falls_below_zero(bare_sale: LuaSale) -> None:
    """A bank that takes a deposit back makes a paid order unpaid again."""
    await bare_sale.put()
    basket = await bare_sale.hold("ann")
    fence = (await bare_sale.claim(basket))[1]
    await bare_sale.finish(basket, fence, "confirmed")
    buyer = bare_sale.keys.buyer("ann")
    for damage in (("HDEL", buyer, ":paid"), ("HSET", buyer, ":paid", "0")):
        await bare_sale.connections.command(*damage)
        async with bare_sale.unchanged():
            with pytest.raises(Exception, match="BUG finish: the buyer's count of paid orders"):
                await bare_sale.finish(basket, fence, "awaiting_deposit", due_ms=1)
    await bare_sale.connections.command("HSET", buyer, ":paid", "1")
    reply = await bare_sale.finish(basket, fence, "awaiting_deposit", due_ms=1)
    assert reply == ["done", "AWAITING_DEPOSIT"]
    assert await bare_sale.paid("ann") == 0


async def test_sold_out_refusals_write_no_keys(sale: LuaSale) -> None:
    await sale.hold("first", lines={"b": 5})
    async with sale.unchanged():
        limits = {"rate": (50, 20), "sustained": (20, MINUTE_MS), "unpaid_max": 20}
        crowd = [sale.basket(f"late-{number}", lines={"b": 1}) for number in range(20)]
        assert {reply[0] for reply in await sale.prepare(*crowd, **limits)} == {"sold_out"}
