"""prepare.lua: due holds defer a refusal only if their expiry may lift it."""

from tests.support.lua_sale import LuaSale


async def overdue(sale: LuaSale, count: int = 3, **lines: int) -> list[dict[str, object]]:
    """Holds of other buyers past their deadline, with no reaper running."""
    baskets = [await sale.hold(f"old-{number}", lines=lines) for number in range(count)]
    await sale.run_out(*baskets)
    return baskets


async def test_a_basket_above_the_limit_is_refused_at_once(sale: LuaSale) -> None:
    await overdue(sale, a=1)
    own = await sale.hold("ann")
    await sale.run_out(own)
    reply = await sale.prepare(sale.basket("ann", lines={"a": 4}))
    assert reply == [["limit_exceeded", "a", "3", "1"]]


async def test_a_buyer_without_an_overdue_hold_is_refused_at_once(sale: LuaSale) -> None:
    await overdue(sale, a=1)
    await sale.hold("ann", lines={"a": 3})
    assert await sale.prepare(sale.basket("ann")) == [["limit_exceeded", "a", "3", "3"]]


async def test_only_the_buyers_own_overdue_holds_are_reported(sale: LuaSale) -> None:
    await overdue(sale, a=1)
    own = await sale.hold("ann", lines={"a": 3})
    other_item = await sale.hold("ann", lines={"b": 1})
    await sale.run_out(own)
    [[word, *order_ids]] = await sale.prepare(sale.basket("ann"))
    assert (word, order_ids) == ("due", [own["order"]])
    assert await sale.expire(own) == ["expired"]
    assert (await sale.prepare(sale.basket("ann")))[0][0] == "held"
    assert (await sale.order(other_item))["status"] == "HELD"


async def test_a_permanently_sold_out_item_is_refused_at_once(sale: LuaSale) -> None:
    await overdue(sale, a=1)
    await sale.sold("buyer-1", lines={"b": 5})
    wish = sale.basket("ann", lines={"a": 1, "b": 1})
    assert await sale.prepare(wish) == [["sold_out", "", "a", "7", "b", "0"]]


async def test_overdue_holds_of_exactly_the_missing_units_are_reported(sale: LuaSale) -> None:
    await sale.sold("buyer-1", lines={"b": 2})
    old = await sale.hold("old", lines={"b": 3})
    await sale.run_out(old)
    assert await sale.prepare(sale.basket("ann", lines={"b": 3})) == [["due", old["order"]]]


async def test_units_held_in_the_same_batch_count_as_held(sale: LuaSale) -> None:
    await overdue(sale, a=1)
    taken, late = sale.basket("bob", lines={"b": 5}), sale.basket("ann", lines={"b": 1})
    replies = await sale.prepare(taken, late)
    assert [reply[0] for reply in replies] == ["held", "due"]


async def test_a_sold_out_reply_has_no_deadline_of_another_item(sale: LuaSale) -> None:
    held = await sale.hold("bob", lines={"a": 1})
    await sale.sold("buyer-1", lines={"b": 5})
    assert await sale.prepare(sale.basket("ann", lines={"b": 1})) == [["sold_out", "", "b", "0"]]
    assert (await sale.order(held))["status"] == "HELD"


async def test_a_buyer_over_the_limit_does_not_delay_the_batch(sale: LuaSale) -> None:
    await overdue(sale, count=5, a=1)
    await sale.hold("ann", lines={"a": 3})
    greedy, bob = sale.basket("ann"), sale.basket("bob")
    replies = await sale.prepare(greedy, bob)
    assert [reply[0] for reply in replies] == ["limit_exceeded", "held"]


async def test_out_of_turn_baskets_behind_a_due_one_are_decided(sale: LuaSale) -> None:
    old = await overdue(sale, count=2, b=2)
    wishes = [
        sale.basket("ann", lines={"b": 2}),
        sale.basket("bob", lines={"b": 1}),
        sale.basket("cat", lines={"b": 3}),
        sale.basket("dan"),
    ]
    [first, *others] = await sale.prepare(*wishes, in_turn=0)
    assert first == ["due", *(basket["order"] for basket in old)]
    assert [reply[0] for reply in others] == ["held", "due", "held"]
    assert others[1] == ["due"], "named once in a reply"


async def test_a_basket_that_waited_is_refused_while_another_is_due(
    sale: LuaSale,
) -> None:
    await overdue(sale, count=5, b=1)
    wishes = [sale.basket(name, lines={"b": 1}) for name in ("ann", "bob", "cat")]
    replies = await sale.prepare(*wishes, in_turn=0, waited="1 3")
    assert [reply[0] for reply in replies] == ["sold_out", "due", "sold_out"]
    assert replies[0][2:] == ["b", "0"]


async def test_a_limit_refusal_is_final_after_waiting(sale: LuaSale) -> None:
    own = await sale.hold("ann", lines={"a": 3})
    await sale.run_out(own)
    reply = await sale.prepare(sale.basket("ann"), waited="1")
    assert reply == [["limit_exceeded", "a", "3", "3"]]
