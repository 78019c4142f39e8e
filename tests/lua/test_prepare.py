"""prepare.lua: each result word, and baskets of one batch that see the earlier ones."""

from typing import Any

import pytest

from tests.support.lua_sale import LOST, NOW, LuaSale


async def test_a_basket_is_held_until_its_deadline(sale: LuaSale) -> None:
    basket = sale.basket(lines={"a": 2, "b": 1})
    [[word, expires_at, seq, created_at, items]] = await sale.prepare(basket)
    assert (word, seq, items) == ("held", "2", '[["a",2,1000],["b",1,500]]')
    assert int(expires_at) - int(created_at) == 300_000
    assert await sale.stock("a") == (10, 8, 2, 0)
    assert await sale.stock("b") == (5, 4, 1, 0)
    assert await sale.bought() == {"a": "2", "b": "1"}
    assert (await sale.order(basket))["status"] == "HELD"


async def test_the_success_policy_prepares_without_a_hold(bare_sale: LuaSale) -> None:
    await bare_sale.put(hold_policy="success")
    basket = bare_sale.basket()
    assert (await bare_sale.prepare(basket))[0][0] == "prepared"
    assert await bare_sale.stock("a") == (10, 10, 0, 0)
    assert await bare_sale.bought() == {}
    assert (await bare_sale.order(basket))["status"] == "PREPARED"
    await bare_sale.check()


async def test_a_repeated_key_replays_its_body_and_refuses_another(sale: LuaSale) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        assert await sale.prepare(basket) == [["replayed"]]
        assert await sale.prepare({**basket, "digest": "1" * 32}) == [["key_reused"]]


async def test_baskets_of_one_batch_are_decided_in_order(sale: LuaSale) -> None:
    wishes = [sale.basket(f"buyer-{number}", lines={"b": 2}) for number in range(4)]
    words = [reply[0] for reply in await sale.prepare(*wishes)]
    assert words == ["held", "held", "sold_out", "sold_out"]
    small = sale.basket("late", lines={"b": 1})
    assert [reply[0] for reply in await sale.prepare(wishes[3], small)] == ["sold_out", "held"]


async def test_the_same_order_twice_in_one_batch_is_held_once(sale: LuaSale) -> None:
    basket = sale.basket()
    assert [reply[0] for reply in await sale.prepare(basket, basket)] == ["held", "replayed"]
    assert await sale.stock("a") == (10, 9, 1, 0)


async def test_sold_out_reports_available_units_and_the_next_deadline(sale: LuaSale) -> None:
    held = await sale.hold("first", lines={"b": 4})
    [[word, next_deadline, *left]] = await sale.prepare(sale.basket(lines={"a": 1, "b": 2}))
    assert (word, left) == ("sold_out", ["a", "10", "b", "1"])
    assert next_deadline == (await sale.order(held))["expires_at"]


async def test_a_basket_is_held_completely_or_not_at_all(sale: LuaSale) -> None:
    before = await sale.dump()
    assert (await sale.prepare(sale.basket(lines={"a": 1, "b": 5})))[0][0] == "held"
    after = await sale.dump()
    assert (await sale.prepare(sale.basket("other", lines={"a": 1, "b": 1})))[0][0] == "sold_out"
    assert await sale.dump() == after != before


async def test_a_buyer_cannot_exceed_the_limit(sale: LuaSale) -> None:
    await sale.hold(lines={"a": 2})
    async with sale.unchanged():
        wish = sale.basket(lines={"a": 2})
        assert await sale.prepare(wish) == [["limit_exceeded", "a", "3", "2"]]


async def test_an_amount_other_than_the_price_is_refused(sale: LuaSale) -> None:
    async with sale.unchanged():
        assert await sale.prepare(sale.basket(amount=999)) == [["amount_mismatch", "1000"]]


async def test_an_unknown_item_is_reported_by_its_sku(sale: LuaSale) -> None:
    assert await sale.prepare(sale.basket(lines={"a": 1, "z": 1})) == [["sku_not_found", "z"]]


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"opens_at": NOW.now_ms() + 3_600_000, "closes_at": NOW.now_ms() + 7_200_000}, "not_open"),
        ({"closes_at": NOW.now_ms() - 1}, "closed"),
        ({"require_admission": 1}, "not_admitted"),
    ],
)
async def test_the_sale_window_and_the_admission_are_enforced(
    bare_sale: LuaSale, settings: dict[str, Any], word: str
) -> None:
    await bare_sale.put(**settings)
    [reply] = await bare_sale.prepare(bare_sale.basket())
    assert reply[0] == word
    if word == "not_open":
        assert reply[1] == str(settings["opens_at"])
    if word == "not_admitted":
        assert (await bare_sale.prepare(bare_sale.basket(admitted=1)))[0][0] == "held"
    await bare_sale.check()


async def test_a_paused_sale_holds_nothing_but_still_answers_replays(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.switch("paused")
    assert await sale.prepare(sale.basket("other")) == [["paused"]]
    assert await sale.prepare(basket) == [["replayed"]]


async def test_a_buyer_cannot_exceed_the_rate(sale: LuaSale) -> None:
    rate = (60_000, 2)
    for _ in range(2):
        assert (await sale.prepare(sale.basket(), rate=rate))[0][0] == "held"
    async with sale.unchanged():
        [[word, wait_ms]] = await sale.prepare(sale.basket(), rate=rate)
        assert word == "rate_limited"
        assert 0 < int(wait_ms) <= 60_000
    assert (await sale.prepare(sale.basket("other"), rate=rate))[0][0] == "held"


async def test_a_refused_basket_does_not_count_against_the_rate(sale: LuaSale) -> None:
    for _ in range(5):
        reply = await sale.prepare(sale.basket(amount=1), rate=(60_000, 1))
        assert reply[0][0] == "amount_mismatch"
    assert (await sale.prepare(sale.basket(), rate=(60_000, 1)))[0][0] == "held"


async def test_overdue_holds_are_reported_and_later_baskets_wait(sale: LuaSale) -> None:
    old = await sale.hold("old", lines={"b": 5})
    await sale.run_out(old)
    wishes = [sale.basket("one", lines={"b": 3}), sale.basket("two", lines={"a": 1})]
    assert await sale.prepare(*wishes) == [["due", old["order"]], ["again"]]
    assert await sale.expire(old) == ["expired"]
    assert [reply[0] for reply in await sale.prepare(*wishes)] == ["held", "held"]


async def test_an_overdue_hold_does_not_count_against_its_buyer(sale: LuaSale) -> None:
    old = await sale.hold(lines={"a": 3})
    await sale.run_out(old)
    assert (await sale.prepare(sale.basket()))[0] == ["due", old["order"]]


async def test_a_deadline_passes_only_if_both_clocks_agree(sale: LuaSale) -> None:
    old = await sale.hold("old", lines={"b": 5})
    await sale.run_out(old)
    behind = NOW.now_ms() - 3_600_000
    [reply] = await sale.prepare(sale.basket("new", lines={"b": 1}), caller_ms=behind)
    assert reply[0] == "sold_out"


async def test_a_late_or_outdated_call_changes_nothing(sale: LuaSale) -> None:
    async with sale.unchanged():
        wishes = [sale.basket("one"), sale.basket("two")]
        assert await sale.prepare(*wishes, late=1) == [["too_late"], ["too_late"]]
        assert await sale.prepare(*wishes, epoch="other") == [["recovering"], ["recovering"]]


@pytest.mark.parametrize("broken", ["outbox gone", "outbox longer", "sale gone", "head behind"])
async def test_an_incomplete_sale_accepts_no_prepare(bare_sale: LuaSale, broken: str) -> None:
    await bare_sale.put()
    await bare_sale.hold()
    command, keys = bare_sale.connections.command, bare_sale.keys
    match broken:
        case "outbox gone":
            await command("DEL", keys.outbox)
        case "outbox longer":
            await command("XADD", keys.outbox, "9-0", "event", "forged")
        case "sale gone":
            await command("DEL", keys.sale)
        case _:
            await command("HSET", keys.sale, "seq", "1")
    async with bare_sale.unchanged():
        assert await bare_sale.prepare(bare_sale.basket("other")) == [["recovering"]]


async def test_a_key_of_the_wrong_type_leaves_no_partial_write(bare_sale: LuaSale) -> None:
    await bare_sale.put()
    good, bad = bare_sale.basket("good"), bare_sale.basket("bad")
    await bare_sale.connections.command("SET", bare_sale.keys.buyer("bad"), "not a hash")
    held, wrong = await bare_sale.prepare(good, bad)
    assert held[0] == "held"
    assert "WRONGTYPE" in str(wrong)
    assert await bare_sale.stock("a") == (10, 9, 1, 0)
    await bare_sale.check()
    assert await bare_sale.order(bad) == {}


async def test_an_order_keeps_its_price_and_name(sale: LuaSale) -> None:
    basket = await sale.hold("ann", lines={"a": 2}, digest="5" * 12)
    order = await sale.order(basket)
    began = await sale.connections.command("ZSCORE", sale.keys.buyer_orders("ann"), basket["order"])
    assert order.pop("expires_at") == str(int(began) + 300_000)
    # The complete hash: a field with one value in all open holds would cost memory a million times.
    assert order == {
        "status": "HELD",
        "buyer": "ann",
        "amount": "2000",
        "name": "name",
        "digest": "5" * 12,
        "hold": "300",
        "items": '[["a",2,1000]]',
        "seq": "2",
    }


async def test_the_rate_of_an_idle_caller_expires(sale: LuaSale) -> None:
    for _ in range(2):
        await sale.prepare(sale.basket("ann"), rate=(60_000, 3))
    left = await sale.connections.command("PTTL", sale.keys.rate("ann"))
    assert 60_000 < left <= 120_000


async def test_a_first_hold_counts_against_the_rate_without_a_rate_key(sale: LuaSale) -> None:
    first, second = sale.basket("ann"), sale.basket("ann")
    [held, [word, wait_ms]] = await sale.prepare(first, second, rate=(60_000, 1))
    assert (held[0], word) == ("held", "rate_limited")
    assert 50_000 < int(wait_ms) <= 60_000
    assert not await sale.connections.command("EXISTS", sale.keys.rate("ann"))


@pytest.mark.parametrize(("moved_ms", "word"), [(-60_000, "held"), (-45_000, "rate_limited")])
async def test_a_first_hold_is_counted_for_one_interval(
    sale: LuaSale, moved_ms: int, word: str
) -> None:
    basket = await sale.hold("ann")
    orders = sale.keys.buyer_orders("ann")
    await sale.connections.command("ZINCRBY", orders, moved_ms, basket["order"])
    assert (await sale.prepare(sale.basket("ann"), rate=(60_000, 1)))[0][0] == word


async def test_after_a_clock_step_back_a_first_hold_counts_one_interval(
    sale: LuaSale,
) -> None:
    basket = await sale.hold("ann")
    orders = sale.keys.buyer_orders("ann")
    await sale.connections.command("ZINCRBY", orders, 3_600_000, basket["order"])
    assert await sale.prepare(sale.basket("ann"), rate=(60_000, 1)) == [["rate_limited", "60000"]]


async def test_a_rate_refusal_reports_the_wait(sale: LuaSale) -> None:
    rate = (60_000, 2)
    for _ in range(2):
        assert (await sale.prepare(sale.basket("ann"), rate=rate))[0][0] == "held"
    [[word, wait_ms]] = await sale.prepare(sale.basket("ann"), rate=rate)
    assert word == "rate_limited"
    assert 50_000 < int(wait_ms) <= 60_000


async def test_a_new_order_is_in_the_buyers_list_at_once(sale: LuaSale) -> None:
    basket = await sale.hold("ann")
    order = await sale.order(basket)
    created_at = str(int(order["expires_at"]) - 1000 * int(order["hold"]))
    command, key = sale.connections.command, sale.keys.buyer_orders("ann")
    assert await command("ZRANGE", key, 0, -1, "WITHSCORES") == [basket["order"], created_at]


async def test_an_error_is_reported_beside_overdue_holds(bare_sale: LuaSale) -> None:
    await bare_sale.put()
    await bare_sale.run_out(await bare_sale.hold("old"))
    await bare_sale.connections.command("HSET", bare_sale.keys.buyer("bad"), "a", "two")
    bad, good = bare_sale.basket("bad"), bare_sale.basket("good")
    bug, held = await bare_sale.prepare(bad, good)
    assert "BUG prepare: the buyer's count of a is not valid" in str(bug)
    assert held[0] == "held"


async def test_an_error_in_a_batch_keeps_earlier_decisions(bare_sale: LuaSale) -> None:
    await bare_sale.put()
    baskets = [bare_sale.basket(name, lines={"a": 1, "b": 1}) for name in ("one", "two", "bad")]
    await bare_sale.connections.command("SET", bare_sale.keys.buyer_orders("bad"), "no sorted set")
    *held, wrong = await bare_sale.prepare(*baskets)
    assert [reply[0] for reply in held] == ["held", "held"]
    assert "WRONGTYPE" in str(wrong)
    assert await bare_sale.stock("b") == (5, 3, 2, 0)
    assert await bare_sale.prepare(*baskets[:2]) == [["replayed"], ["replayed"]]
    await bare_sale.check()


async def test_an_out_of_range_deadline_is_omitted(sale: LuaSale) -> None:
    held = await sale.hold("first", lines={"b": 5})
    reply = ["sold_out", "", "b", "0"]
    for score in ("inf", "1.5e300"):
        await sale.connections.command("ZADD", sale.keys.deadlines, score, held["order"])
        assert await sale.prepare(sale.basket(lines={"b": 1})) == [reply]


async def test_a_sold_out_basket_gets_the_deadline_of_its_own_batch(
    sale: LuaSale,
) -> None:
    taken, refused = sale.basket("first", lines={"b": 5}), sale.basket("second", lines={"b": 1})
    [held, sold_out] = await sale.prepare(taken, refused)
    assert (held[0], sold_out) == ("held", ["sold_out", held[1], "b", "0"])


async def test_an_equal_refusal_is_sent_as_a_reference_to_the_first(sale: LuaSale) -> None:
    held = await sale.hold("first", lines={"b": 5})
    deadline = (await sale.order(held))["expires_at"]
    wishes = [{"a": 1, "b": 1}, {"b": 1}] * 2
    baskets = [sale.basket(f"buyer-{n}", lines=lines) for n, lines in enumerate(wishes)]
    [some, one, *others] = await sale.replies(*baskets)
    assert some == ["sold_out", deadline, "a", "10", "b", "0"]
    assert one == ["sold_out", deadline, "b", "0"]
    assert others == [-1, -2]


async def test_sold_out_is_sent_anew_after_stock_was_taken(sale: LuaSale) -> None:
    wishes = [{"b": 5}, {"b": 1}, {"b": 1}, {"a": 1}, {"b": 1}, {"b": 1}]
    baskets = [sale.basket(f"buyer-{n}", lines=lines) for n, lines in enumerate(wishes)]
    first, *replies = await sale.replies(*baskets)
    deadline = (await sale.order(baskets[0]))["expires_at"]
    refusal = ["sold_out", deadline, "b", "0"]
    assert replies == [refusal, -1, first + 1, refusal, -2]


async def test_a_limit_refusal_is_not_replaced_by_a_reference(sale: LuaSale) -> None:
    await sale.hold("has", lines={"a": 3})
    await sale.hold("first", lines={"b": 5})
    baskets = [sale.basket(buyer, lines={"a": 1, "b": 1}) for buyer in ("one", "has", "another")]
    replies = await sale.replies(*baskets)
    assert [replies[0][0], *replies[1:]] == ["sold_out", ["limit_exceeded", "a", "3", "3"], -1]


async def test_an_expired_order_without_units_is_not_listed_as_due(bare_sale: LuaSale) -> None:
    await bare_sale.put(hold_policy="success")
    await bare_sale.run_out(await bare_sale.hold("old"))
    taken = await bare_sale.hold("quick", lines={"b": 5})
    assert (await bare_sale.claim(taken))[0] == "claimed"
    [reply] = await bare_sale.prepare(bare_sale.basket("late", lines={"b": 1}))
    assert reply == ["sold_out", "", "b", "0"]


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    async with sale.unchanged():
        assert await sale.prepare(sale.basket(), mark=sale.lost(what)) == [["went_back"]]
    assert (await sale.prepare(sale.basket(), mark=sale.mark))[0][0] == "held"


async def test_a_caller_that_missed_events_is_served(sale: LuaSale) -> None:
    await sale.hold("bob")
    behind = sale.mark
    await sale.hold("cat")
    assert (await sale.prepare(sale.basket("ann"), mark=behind))[0][0] == "held"
