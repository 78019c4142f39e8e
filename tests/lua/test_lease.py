"""lease.lua: each result word, and a frozen process that wakes up after a take-over."""

import asyncio
from typing import Any

import pytest

from tests.support.lua_sale import LOST, NOW, LuaSale


async def over(sale: LuaSale, basket: dict[str, Any]) -> None:
    """Let the lease expire."""
    past = str(NOW.now_ms() - 1)
    await sale.connections.command("ZADD", sale.keys.confirming, past, str(basket["order"]))


async def test_an_expired_lease_is_taken_under_the_next_fence(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    word, fence, lease_end = await sale.lease(basket, 1)
    assert (word, fence) == ("taken", "2")
    assert int(lease_end) > NOW.now_ms()


async def test_a_process_cannot_finish_after_a_take_over(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    await sale.lease(basket, 1)
    async with sale.unchanged():
        assert await sale.finish(basket, 1, "confirmed") == ["stale", "CONFIRMING", "2"]
    assert await sale.finish(basket, 2, "confirmed") == ["done", "CONFIRMED"]


async def test_a_finish_before_the_take_over_prevents_it(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    assert await sale.finish(basket, 1, "confirmed") == ["done", "CONFIRMED"]
    assert await sale.lease(basket, 1) == ["stale", "CONFIRMED", "1"]


async def test_a_repeated_take_over_gets_the_same_reply(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    first = await sale.lease(basket, 1, claim_id="me")
    async with sale.unchanged():
        assert await sale.lease(basket, 1, claim_id="me") == first


async def test_a_running_lease_is_not_taken(sale: LuaSale) -> None:
    basket = await sale.hold()
    claimed = await sale.claim(basket)
    async with sale.unchanged():
        word, lease_end = await sale.lease(basket, 1)
        assert word == "leased"
        assert float(lease_end) == float(claimed[2])


async def test_only_one_of_two_concurrent_take_overs_succeeds(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    words = sorted(
        reply[0] for reply in await asyncio.gather(sale.lease(basket, 1), sale.lease(basket, 1))
    )
    assert words == ["stale", "taken"]


async def test_only_the_current_fence_can_move_a_lease(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    word, lease_end = await sale.lease(basket, 1, "move", lease_ms=5)
    assert word == "moved"
    score = await sale.connections.command("ZSCORE", sale.keys.confirming, basket["order"])
    assert float(score) == float(lease_end)
    assert await sale.lease(basket, 7, "move") == ["stale", "CONFIRMING", "1"]


async def test_an_unknown_late_or_outdated_lease_changes_nothing(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    async with sale.unchanged():
        assert await sale.lease(sale.basket(), 1) == ["not_found"]
        assert await sale.lease(basket, 1, late=1) == ["too_late"]
        assert await sale.lease(basket, 1, epoch="other") == ["recovering"]


async def test_an_unclaimed_order_has_fence_0(sale: LuaSale) -> None:
    assert await sale.lease(await sale.hold(), 0) == ["stale", "HELD", "0"]


async def test_a_lease_with_a_lost_fence_fails_as_a_bug(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    await sale.connections.command("HDEL", sale.keys.order(basket["order"]), "fence")
    async with sale.unchanged():
        with pytest.raises(Exception, match="BUG lease"):
            await sale.lease(basket, 0)


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    async with sale.unchanged():
        assert await sale.lease(basket, 1, mark=sale.lost(what)) == ["went_back"]
    assert (await sale.lease(basket, 1, mark=sale.mark))[0] == "taken"


async def test_a_take_over_gets_a_fence_above_the_known_one_in_sql(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await over(sale, basket)
    first = await sale.lease(basket, 1, claim_id="me", known_fence=6)
    assert first[:2] == ["taken", "7"]
    assert await sale.lease(basket, 1, claim_id="me", known_fence=6) == first


async def test_a_pause_is_ended_by_a_take_over_that_does_not_wait(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    word, lease_end = await sale.lease(basket, 1, "pause")
    assert word == "moved"
    score = await sale.connections.command("ZSCORE", sale.keys.confirming, basket["order"])
    assert float(score) == float(lease_end) - 0.5
    async with sale.unchanged():
        assert (await sale.lease(basket, 1))[0] == "leased"
    assert (await sale.lease(basket, 1, "take_now"))[:2] == ["taken", "2"]


async def test_a_lease_without_a_pause_is_never_ended_early(sale: LuaSale) -> None:
    """Its holder may be calling the PG."""
    basket = await sale.hold()
    await sale.claim(basket)
    async with sale.unchanged():
        assert (await sale.lease(basket, 1, "take_now"))[0] == "leased"
    await sale.lease(basket, 1, "move")
    async with sale.unchanged():
        assert (await sale.lease(basket, 1, "take_now"))[0] == "leased"


async def test_a_take_over_ends_the_pause(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await sale.lease(basket, 1, "pause")
    await sale.lease(basket, 1, "take_now")
    async with sale.unchanged():
        assert (await sale.lease(basket, 2, "take_now"))[0] == "leased"
    await sale.lease(basket, 2, "pause", lease_ms=-1)
    assert (await sale.lease(basket, 2))[:2] == ["taken", "3"]
