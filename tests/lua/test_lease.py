"""lease.lua: each result word, and a frozen process that wakes up after a take-over."""

import asyncio
from typing import Any

import pytest

from tests.support.lua_sale import LOST, NOW, LuaSale


async def over(sale: LuaSale, basket: dict[str, Any]) -> None:
    """Let the lease expire."""
    past = str(NOW.now_ms() - 1)
    await sale.connections.command("ZADD", sale.keys.confirming, past, str(basket["order"]))


async def test_a_lease_that_is_over_is_taken_under_the_next_fence(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    word, fence, lease_end = await sale.lease(basket, 1)
    assert (word, fence) == ("taken", "2")
    assert int(lease_end) > NOW.now_ms()


async def test_a_process_that_wakes_up_late_cannot_finish(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    await sale.lease(basket, 1)
    before = await sale.dump()
    assert await sale.finish(basket, 1, "confirmed") == ["stale", "CONFIRMING", "2"]
    assert await sale.dump() == before
    assert await sale.finish(basket, 2, "confirmed") == ["done", "CONFIRMED"]


async def test_a_finish_before_the_take_over_leaves_nothing_to_take(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    assert await sale.finish(basket, 1, "confirmed") == ["done", "CONFIRMED"]
    assert await sale.lease(basket, 1) == ["stale", "CONFIRMED", "1"]


async def test_a_take_over_whose_reply_was_lost_is_answered_again(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    first = await sale.lease(basket, 1, claim_id="me")
    before = await sale.dump()
    assert await sale.lease(basket, 1, claim_id="me") == first
    assert await sale.dump() == before


async def test_a_lease_that_runs_is_left_alone(sale: LuaSale) -> None:
    basket = await sale.hold()
    claimed = await sale.claim(basket)
    before = await sale.dump()
    word, lease_end = await sale.lease(basket, 1)
    assert word == "leased"
    assert float(lease_end) == float(claimed[2])
    assert await sale.dump() == before


async def test_of_two_take_overs_one_gets_the_lease(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    words = sorted(
        reply[0] for reply in await asyncio.gather(sale.lease(basket, 1), sale.lease(basket, 1))
    )
    assert words == ["stale", "taken"]


async def test_one_s_own_lease_can_be_moved_and_no_other(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    word, lease_end = await sale.lease(basket, 1, "move", lease_ms=5)
    assert word == "moved"
    score = await sale.connections.command("ZSCORE", sale.keys.confirming, basket["order"])
    assert float(score) == float(lease_end)
    assert await sale.lease(basket, 7, "move") == ["stale", "CONFIRMING", "1"]


async def test_a_lease_of_nothing_a_late_one_and_one_of_another_epoch(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    before = await sale.dump()
    assert await sale.lease(sale.basket(), 1) == ["not_found"]
    assert await sale.lease(basket, 1, late=1) == ["too_late"]
    assert await sale.lease(basket, 1, epoch="other") == ["recovering"]
    assert await sale.dump() == before


async def test_an_order_that_was_never_claimed_has_fence_0(sale: LuaSale) -> None:
    assert await sale.lease(await sale.hold(), 0) == ["stale", "HELD", "0"]


async def test_a_lost_fence_is_a_bug_and_no_zero(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    await sale.connections.command("HDEL", sale.keys.order(basket["order"]), "fence")
    before = await sale.dump()
    with pytest.raises(Exception, match="BUG lease"):
        await sale.lease(basket, 0)
    assert await sale.dump() == before


@pytest.mark.parametrize("what", LOST)
async def test_a_server_that_lost_acknowledged_events_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    before = await sale.dump()
    assert await sale.lease(basket, 1, mark=sale.lost(what)) == ["went_back"]
    assert await sale.dump() == before
    assert (await sale.lease(basket, 1, mark=sale.mark))[0] == "taken"


async def test_a_take_over_gets_a_fence_above_the_known_one_in_sql(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    first = await sale.lease(basket, 1, claim_id="me", known_fence=6)
    assert first[:2] == ["taken", "7"]
    assert await sale.lease(basket, 1, claim_id="me", known_fence=6) == first
