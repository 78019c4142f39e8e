"""claim.lua: each result word, and the race of a late payment against the reaper in both orders."""

import pytest

from tests.support.lua_sale import LOST, NOW, LuaSale


async def test_a_claim_lifts_the_deadline_and_issues_a_fence(sale: LuaSale) -> None:
    basket = await sale.hold()
    word, fence, lease_end = await sale.claim(basket, "pk")
    assert (word, fence) == ("claimed", "1")
    assert float(lease_end) > NOW.now_ms()
    order = await sale.order(basket)
    assert (order["status"], order["payment_key"], order["attempts"]) == ("CONFIRMING", "pk", "1")
    command = sale.connections.command
    assert await command("ZSCORE", sale.keys.deadlines, basket["order"]) is None
    assert await command("ZSCORE", sale.keys.confirming, basket["order"]) == lease_end
    assert await sale.stock("a") == (10, 9, 1, 0)


async def test_a_repeated_claim_gets_the_same_fence(sale: LuaSale) -> None:
    basket = await sale.hold()
    first = await sale.claim(basket, claim_id="c")
    async with sale.unchanged():
        again = await sale.claim(basket, claim_id="c")
        assert (again[:2], float(again[2])) == (first[:2], float(first[2]))


async def test_a_second_claim_reports_the_payment_in_progress(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket, "pk")
    async with sale.unchanged():
        assert await sale.claim(basket, "pk") == ["present", "CONFIRMING", ""]
        assert await sale.claim(basket, "another") == ["present", "CONFIRMING", ""]


async def test_an_ended_payment_key_always_gets_its_outcome(sale: LuaSale) -> None:
    basket = await sale.hold()
    claimed = await sale.claim(basket, "pk")
    await sale.finish(basket, claimed[1], "declined", attempt="declined:X")
    assert await sale.claim(basket, "pk") == ["present", "RELEASED", "declined:X"]
    assert (await sale.claim(basket, "second card"))[:2] == ["claimed", "2"]


@pytest.mark.parametrize("outcome", ["confirmed", "awaiting_deposit"])
async def test_a_paid_order_accepts_no_other_payment_key(sale: LuaSale, outcome: str) -> None:
    basket = await sale.hold()
    claimed = await sale.claim(basket, "pk")
    status = (await sale.finish(basket, claimed[1], outcome))[1]
    assert await sale.claim(basket, "another") == ["present", status, ""]


async def test_a_refunded_order_accepts_no_other_payment_key(sale: LuaSale) -> None:
    basket = await sale.sold()
    await sale.refund(basket)
    assert await sale.claim(basket, "another") == ["present", "REFUNDED", ""]


async def test_the_number_of_attempts_is_limited(sale: LuaSale) -> None:
    basket = await sale.hold()
    claimed = await sale.claim(basket, "one")
    await sale.finish(basket, claimed[1], "declined")
    async with sale.unchanged():
        assert await sale.claim(basket, "two", attempts_max=1) == ["attempts_exhausted"]


async def test_a_claim_before_the_reaper_keeps_the_hold(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.run_out(basket)
    assert (await sale.claim(basket))[0] == "claimed"
    assert await sale.expire(basket) == ["settled"]


async def test_a_claim_after_the_reaper_holds_the_basket_again(sale: LuaSale) -> None:
    basket = await sale.hold(lines={"a": 2})
    await sale.run_out(basket)
    assert await sale.expire(basket) == ["expired"]
    assert (await sale.claim(basket))[0] == "claimed"
    assert await sale.stock("a") == (10, 8, 2, 0)
    assert await sale.bought() == {"a": "2"}


async def test_an_unavailable_basket_cannot_be_held_again(sale: LuaSale) -> None:
    basket = await sale.hold("late", lines={"b": 2})
    await sale.release(basket)
    await sale.hold("quick", lines={"b": 4})
    async with sale.unchanged():
        assert await sale.claim(basket) == ["expired"]


async def test_a_closed_sale_accepts_no_new_holds_but_pays_existing_ones(sale: LuaSale) -> None:
    ended, held = await sale.hold("ended"), await sale.hold("held")
    await sale.release(ended)
    await sale.switch("closed")
    assert await sale.claim(ended) == ["expired"]
    assert (await sale.claim(held))[0] == "claimed"


async def test_holding_again_respects_the_buyer_limit(sale: LuaSale) -> None:
    basket = await sale.hold(lines={"a": 2})
    await sale.release(basket)
    await sale.hold(lines={"a": 2})
    assert await sale.claim(basket) == ["limit_exceeded", "a", "3", "2"]


async def test_overdue_holds_are_reported_before_a_late_claim_is_refused(sale: LuaSale) -> None:
    late = await sale.hold("late", lines={"b": 3})
    await sale.release(late)
    old = await sale.hold("old", lines={"b": 5})
    await sale.run_out(old)
    assert await sale.claim(late) == ["due", old["order"]]
    await sale.expire(old)
    assert (await sale.claim(late))[0] == "claimed"


async def test_the_success_policy_holds_stock_at_claim_or_is_sold_out(bare_sale: LuaSale) -> None:
    await bare_sale.put(hold_policy="success")
    first = await bare_sale.hold("one", lines={"b": 3})
    second = await bare_sale.hold("two", lines={"b": 3})
    assert (await bare_sale.claim(first))[0] == "claimed"
    assert await bare_sale.stock("b") == (5, 2, 3, 0)
    assert await bare_sale.claim(second) == ["sold_out", "", "b", "2"]
    await bare_sale.check()


async def test_a_claim_under_the_success_policy_expires_no_prepared_order(
    bare_sale: LuaSale,
) -> None:
    await bare_sale.put(hold_policy="success")
    first, second, old = [await bare_sale.hold(f"b{n}", lines={"b": 3}) for n in range(3)]
    await bare_sale.run_out(old)
    assert (await bare_sale.claim(first))[0] == "claimed"
    assert await bare_sale.claim(second) == ["sold_out", "", "b", "2"]


async def test_an_unknown_late_or_outdated_claim_changes_nothing(sale: LuaSale) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        assert await sale.claim(sale.basket()) == ["not_found"]
        assert await sale.claim(basket, late=1) == ["too_late"]
        assert await sale.claim(basket, epoch="other") == ["recovering"]


@pytest.mark.parametrize("lost", ["fence", "attempts"])
async def test_a_claim_with_a_lost_counter_fails_as_a_bug(sale: LuaSale, lost: str) -> None:
    basket = await sale.hold()
    claimed = await sale.claim(basket, "pk")
    await sale.finish(basket, claimed[1], "declined", attempt="declined:X")
    await sale.connections.command("HDEL", sale.keys.order(basket["order"]), lost)
    async with sale.unchanged():
        with pytest.raises(Exception, match="BUG claim"):
            await sale.claim(basket, "second card")


async def test_a_claim_with_stock_keys_of_other_items_fails_as_a_bug(sale: LuaSale) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        wrong = [*sale.order_keys(basket)[:2], sale.keys.stock("b")]
        with pytest.raises(Exception, match="BUG claim"):
            await sale.claim(basket, order_keys=wrong)


async def test_an_item_removed_from_the_sale_is_not_held_again(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.release(basket)
    left = await sale.put(version=1, digest="e", items=[("b", "B", 500, 5, 5)], leaving=["a"])
    assert left[0] == "done"
    async with sale.unchanged():
        assert await sale.claim(basket) == ["expired"]


async def test_a_reclaimed_basket_counts_on_top_of_current_holds(sale: LuaSale) -> None:
    given_back = await sale.hold("ann", lines={"a": 2})
    await sale.release(given_back)
    await sale.hold("ann")
    assert (await sale.claim(given_back))[0] == "claimed"
    assert await sale.bought("ann") == {"a": "3"}


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        assert await sale.claim(basket, mark=sale.lost(what)) == ["went_back"]
    assert (await sale.claim(basket, mark=sale.mark))[0] == "claimed"


async def test_a_claim_gets_a_fence_above_the_known_one_in_sql(sale: LuaSale) -> None:
    basket = await sale.hold()
    assert (await sale.claim(basket, known_fence=4))[:2] == ["claimed", "5"]


async def test_a_claim_takes_the_next_fence_above_its_own(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await sale.finish(basket, 1, "declined")
    assert (await sale.claim(basket, "pk-2", known_fence=1))[:2] == ["claimed", "2"]
