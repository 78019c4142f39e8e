"""finish.lua: every outcome from every status, repeats, and stale fencing tokens."""

from typing import Any

import pytest

from reservation.domain.states import TRANSITIONS, Status
from tests.support.lua_sale import LOST, NOW, LuaSale

OUTCOMES = ("confirmed", "awaiting_deposit", "declined", "voided", "expired", "refunded")
STATUSES = ("CONFIRMING", "AWAITING_DEPOSIT", "CONFIRMED", "RELEASED", "EXPIRED", "REFUNDED")


async def brought_to(
    sale: LuaSale, status: str, buyer: str = "buyer", quantity: int = 2
) -> dict[str, Any]:
    """A basket in this status, under fence 1."""
    basket = await sale.hold(buyer, lines={"a": quantity})
    await sale.claim(basket, f"pk-{basket['order']}")
    ways = {
        "AWAITING_DEPOSIT": ["awaiting_deposit"],
        "CONFIRMED": ["confirmed"],
        "RELEASED": ["declined"],
        "EXPIRED": ["expired"],
        "REFUNDED": ["refunded"],
    }
    for outcome in ways.get(status, []):
        await sale.finish(basket, 1, outcome, due_ms=NOW.now_ms() + 60_000)
    assert (await sale.order(basket))["status"] == status
    return basket


@pytest.mark.parametrize("status", STATUSES)
async def test_each_outcome_makes_a_listed_transition_or_no_change(
    sale: LuaSale, status: str
) -> None:
    for outcome in OUTCOMES:
        basket = await brought_to(sale, status, f"buyer-{outcome}", 1)
        before = await sale.dump()
        word, to, *_ = await sale.finish(basket, 1, outcome)
        if word == "done" and to != status:
            assert Status(to) in TRANSITIONS[Status(status)]
        else:
            assert await sale.dump() == before
        await sale.check()


async def test_a_confirmed_payment_sells_the_units(sale: LuaSale) -> None:
    basket = await brought_to(sale, "CONFIRMING")
    assert await sale.finish(basket, 1, "confirmed") == ["done", "CONFIRMED"]
    assert await sale.stock("a") == (10, 8, 0, 2)
    assert await sale.bought() == {"a": "2"}
    assert await sale.connections.command("ZCARD", sale.keys.confirming) == 0


async def test_a_declined_payment_returns_stock_and_limit(sale: LuaSale) -> None:
    basket = await brought_to(sale, "CONFIRMING")
    assert await sale.finish(basket, 1, "declined") == ["done", "RELEASED"]
    assert await sale.stock("a") == (10, 10, 0, 0)
    assert await sale.bought() == {}


async def test_a_repeated_finish_gets_the_same_reply_without_a_write(sale: LuaSale) -> None:
    for outcome in OUTCOMES:
        basket = await brought_to(sale, "CONFIRMING", f"buyer-{outcome}", 1)
        first = await sale.finish(basket, 1, outcome)
        async with sale.unchanged():
            assert await sale.finish(basket, 1, outcome) == first


async def test_a_void_restores_the_original_deadline(sale: LuaSale) -> None:
    basket = await sale.hold()
    deadline = (await sale.order(basket))["expires_at"]
    await sale.claim(basket, "pk")
    assert await sale.finish(basket, 1, "voided", attempt="") == ["done", "HELD"]
    score = await sale.connections.command("ZSCORE", sale.keys.deadlines, basket["order"])
    assert score == deadline
    assert (await sale.claim(basket, "pk"))[:2] == ["claimed", "2"]


async def test_a_recorded_void_bars_the_key_from_another_claim(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket, "made up")
    await sale.finish(basket, 1, "voided", attempt="void:X")
    assert await sale.claim(basket, "made up") == ["present", "HELD", "void:X"]


async def test_a_void_after_the_deadline_expires_the_hold(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    past = str(NOW.now_ms() - 1_000)
    await sale.connections.command("HSET", sale.keys.order(basket["order"]), "expires_at", past)
    assert await sale.finish(basket, 1, "voided") == ["done", "EXPIRED"]
    assert await sale.stock("a") == (10, 10, 0, 0)


async def test_a_void_under_the_success_policy_holds_no_stock(bare_sale: LuaSale) -> None:
    await bare_sale.put(hold_policy="success")
    basket = await bare_sale.hold()
    await bare_sale.claim(basket)
    assert await bare_sale.finish(basket, 1, "voided") == ["done", "PREPARED"]
    assert await bare_sale.stock("a") == (10, 10, 0, 0)
    await bare_sale.check()


async def test_a_pending_deposit_keeps_its_units_until_the_due_date(sale: LuaSale) -> None:
    basket = await brought_to(sale, "AWAITING_DEPOSIT")
    assert await sale.stock("a") == (10, 8, 2, 0)
    score = await sale.connections.command("ZSCORE", sale.keys.deposits, basket["order"])
    assert (await sale.order(basket))["due_at"] == score
    assert await sale.finish(basket, 1, "confirmed") == ["done", "CONFIRMED"]
    assert await sale.finish(basket, 1, "awaiting_deposit", due_ms=1) == [
        "done",
        "AWAITING_DEPOSIT",
    ]
    assert await sale.stock("a") == (10, 8, 2, 0)


async def test_an_unseen_reversed_deposit_returns_its_units_as_refunded(
    sale: LuaSale,
) -> None:
    basket = await brought_to(sale, "AWAITING_DEPOSIT")
    seq = int((await sale.order(basket))["seq"])
    refunded = await sale.finish(basket, 1, "refunded", attempt="refunded:cancelled_at_provider")
    assert refunded == ["done", "REFUNDED"]
    assert await sale.stock("a") == (10, 10, 0, 0)
    assert (await sale.bought(), await sale.paid()) == ({}, 1)
    assert await sale.connections.command("ZCARD", sale.keys.deposits) == 0
    assert int((await sale.order(basket))["seq"]) == seq + 1
    async with sale.unchanged():
        assert await sale.finish(basket, 1, "refunded", seen=seq) == refunded
    await sale.check()


@pytest.mark.parametrize("outcome", ["refunded", "declined", "expired"])
async def test_units_withdrawn_by_a_refund_leave_the_sale(sale: LuaSale, outcome: str) -> None:
    basket = await brought_to(sale, "AWAITING_DEPOSIT")
    seq = int((await sale.order(basket))["seq"])
    ended = await sale.finish(basket, 1, outcome, restock=0)
    assert ended[0] == "done"
    assert await sale.stock("a") == (8, 8, 0, 0)
    assert await sale.bought() == {}
    async with sale.unchanged():
        assert await sale.finish(basket, 1, outcome, restock=0, seen=seq) == ended
    assert await sale.put(version=1) == ["changed", "2"]
    await sale.check()


@pytest.mark.parametrize(
    ("status", "outcome"), [("AWAITING_DEPOSIT", "confirmed"), ("RELEASED", "refunded")]
)
async def test_only_units_freed_by_the_outcome_are_withdrawn(
    sale: LuaSale, status: str, outcome: str
) -> None:
    basket = await brought_to(sale, status)
    assert (await sale.finish(basket, 1, outcome, restock=0))[0] == "done"
    assert (await sale.stock("a"))[0] == 10
    assert await sale.put(version=1) == ["done", "2"]
    await sale.check()


async def test_a_stale_refund_leaves_a_paid_virtual_account(
    sale: LuaSale,
) -> None:
    basket = await brought_to(sale, "AWAITING_DEPOSIT")
    seen = (await sale.order(basket))["seq"]
    await sale.finish(basket, 1, "confirmed")
    assert await sale.finish(basket, 1, "refunded", seen=seen) == ["stale", "CONFIRMED", "1"]
    await sale.finish(basket, 1, "awaiting_deposit", due_ms=1)
    late = await sale.finish(basket, 1, "refunded", seen=seen)
    assert late == ["stale", "AWAITING_DEPOSIT", "1"]


async def test_the_latest_outcome_of_a_payment_key_is_kept(sale: LuaSale) -> None:
    basket = await sale.hold()
    claimed = await sale.claim(basket, "pk")
    await sale.finish(basket, claimed[1], "awaiting_deposit", due_ms=NOW.now_ms() + 60_000)
    await sale.finish(basket, claimed[1], "confirmed")
    assert await sale.claim(basket, "pk") == ["present", "CONFIRMED", "confirmed"]


async def test_a_fence_above_the_stored_one_detects_a_loss(sale: LuaSale) -> None:
    basket = await brought_to(sale, "CONFIRMING")
    async with sale.unchanged():
        assert await sale.finish(basket, 2, "confirmed") == ["lost", "CONFIRMING", "1"]


async def test_an_unknown_late_or_outdated_finish_changes_nothing(sale: LuaSale) -> None:
    basket = await brought_to(sale, "CONFIRMING")
    async with sale.unchanged():
        assert await sale.finish(sale.basket(), 1, "confirmed") == ["not_found"]
        assert await sale.finish(basket, 1, "confirmed", late=1) == ["too_late"]
        assert await sale.finish(basket, 1, "confirmed", epoch="other") == ["recovering"]


async def test_a_reversed_deposit_is_awaited_until_its_new_due_date(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await sale.finish(basket, 1, "awaiting_deposit", due_ms=1_000)
    await sale.finish(basket, 1, "confirmed")
    done = await sale.finish(basket, 1, "awaiting_deposit", due_ms=2_000)
    assert done == ["done", "AWAITING_DEPOSIT"]
    assert (await sale.order(basket))["due_at"] == "2000"


async def test_a_finish_read_before_the_last_change_is_stale(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    await sale.finish(basket, 1, "awaiting_deposit", due_ms=1_000)
    before_the_deposit = (await sale.order(basket))["seq"]
    await sale.finish(basket, 1, "confirmed")
    after_the_deposit = (await sale.order(basket))["seq"]
    async with sale.unchanged():
        late = await sale.finish(basket, 1, "awaiting_deposit", seen=before_the_deposit)
        assert late == ["stale", "CONFIRMED", "1"]
    await sale.finish(basket, 1, "awaiting_deposit", seen=after_the_deposit)
    late = await sale.finish(basket, 1, "confirmed", seen=before_the_deposit)
    assert late == ["stale", "AWAITING_DEPOSIT", "1"]
    assert await sale.stock("a") == (10, 9, 1, 0)


async def test_a_repeat_made_stale_by_its_own_change_gets_the_same_reply(sale: LuaSale) -> None:
    basket = await brought_to(sale, "AWAITING_DEPOSIT")
    seen = (await sale.order(basket))["seq"]
    first = await sale.finish(basket, 1, "confirmed", seen=seen)
    assert await sale.finish(basket, 1, "confirmed", seen=seen) == first == ["done", "CONFIRMED"]


async def test_a_claim_is_finished_by_its_fence_despite_stale_reads(sale: LuaSale) -> None:
    basket = await sale.hold()
    seen = (await sale.order(basket))["seq"]
    await sale.claim(basket)
    assert await sale.finish(basket, 1, "confirmed", seen=seen) == ["done", "CONFIRMED"]


async def test_an_unrecorded_void_removes_the_payment_key(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket, "pk")
    assert (await sale.order(basket))["payment_key"] == "pk"
    await sale.finish(basket, 1, "voided", attempt="")
    order = await sale.order(basket)
    assert not {"payment_key", "claim_id", "attempt:pk"} & set(order)
    assert order["attempts"] == "0"


async def test_an_unclaimed_order_is_finished_only_under_fence_0(
    sale: LuaSale,
) -> None:
    basket = await sale.hold()
    await sale.release(basket)
    assert await sale.finish(basket, 1, "refunded") == ["lost", "RELEASED", "0"]
    assert await sale.finish(basket, 0, "refunded") == ["done", "REFUNDED"]
    assert not {"fence", "attempts"} & (await sale.order(basket)).keys()


@pytest.mark.parametrize("lost", ["fence", "attempts"])
async def test_a_finish_with_a_lost_counter_fails_as_a_bug(sale: LuaSale, lost: str) -> None:
    basket = await brought_to(sale, "CONFIRMING")
    await sale.connections.command("HDEL", sale.keys.order(basket["order"]), lost)
    async with sale.unchanged():
        for fence in (0, 1):
            with pytest.raises(Exception, match="BUG finish"):
                await sale.finish(basket, fence, "confirmed")


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    async with sale.unchanged():
        assert await sale.finish(basket, 1, "confirmed", mark=sale.lost(what)) == ["went_back"]
    assert await sale.finish(basket, 1, "confirmed", mark=sale.mark) == ["done", "CONFIRMED"]


async def test_a_finish_under_an_unissued_fence_detects_a_loss(sale: LuaSale) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        assert await sale.finish(basket, 1, "confirmed") == ["lost", "HELD", "0"]


@pytest.mark.parametrize(
    ("asked_key", "claim_id"), [("pk", "another"), ("another", "mine"), ("another", "another")]
)
async def test_a_finish_of_another_claim_under_one_fence_detects_a_loss(
    sale: LuaSale, asked_key: str, claim_id: str
) -> None:
    basket = await sale.hold()
    await sale.claim(basket, "pk", claim_id="mine")
    async with sale.unchanged():
        reply = await sale.finish(basket, 1, "confirmed", asked_key=asked_key, claim_id=claim_id)
        assert reply == ["lost", "CONFIRMING", "1"]
    own = await sale.finish(basket, 1, "confirmed", asked_key="pk", claim_id="mine")
    assert own == ["done", "CONFIRMED"]


async def test_a_finish_after_a_take_over_is_stale_and_not_a_loss(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket, "pk", claim_id="mine")
    await sale.connections.command("ZADD", sale.keys.confirming, "1", basket["order"])
    await sale.lease(basket, 1, claim_id="settler")
    reply = await sale.finish(basket, 1, "confirmed", asked_key="pk", claim_id="mine")
    assert reply == ["stale", "CONFIRMING", "2"]
