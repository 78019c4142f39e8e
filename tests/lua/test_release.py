"""release.lua: each result word, and the race against a claim in both orders."""

import pytest

from tests.support.lua_sale import LOST, LuaSale


async def test_a_release_gives_stock_and_limit_back_once(sale: LuaSale) -> None:
    basket = await sale.hold(lines={"a": 2, "b": 1})
    assert await sale.release(basket) == ["released"]
    assert await sale.stock("a") == (10, 10, 0, 0)
    assert await sale.bought() == {}
    before = await sale.dump()
    assert await sale.release(basket) == ["present", "RELEASED"]
    assert await sale.dump() == before


async def test_a_release_before_the_payment_lets_it_take_the_basket_again(sale: LuaSale) -> None:
    basket = await sale.hold()
    assert await sale.release(basket) == ["released"]
    assert (await sale.claim(basket))[0] == "claimed"


async def test_a_release_after_the_payment_began_changes_nothing(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    before = await sale.dump()
    assert await sale.release(basket) == ["present", "CONFIRMING"]
    assert await sale.dump() == before


async def test_a_paid_order_is_not_given_back(sale: LuaSale) -> None:
    assert await sale.release(await sale.sold()) == ["present", "CONFIRMED"]


async def test_where_nothing_was_held_nothing_is_given_back(bare_sale: LuaSale) -> None:
    await bare_sale.put(hold_policy="success")
    basket = await bare_sale.hold()
    assert await bare_sale.release(basket) == ["released"]
    assert await bare_sale.stock("a") == (10, 10, 0, 0)
    await bare_sale.check()


async def test_a_release_of_nothing_a_late_one_and_one_of_another_epoch(sale: LuaSale) -> None:
    basket = await sale.hold()
    before = await sale.dump()
    assert await sale.release(sale.basket()) == ["not_found"]
    assert await sale.release(basket, late=1) == ["too_late"]
    assert await sale.release(basket, epoch="other") == ["recovering"]
    assert await sale.dump() == before


@pytest.mark.parametrize("lines", [{"b": 1}, {}])
async def test_stock_keys_that_are_not_the_orders_change_nothing(
    sale: LuaSale, lines: dict[str, int]
) -> None:
    basket = await sale.hold()
    before = await sale.dump()
    with pytest.raises(Exception, match="stock keys do not fit the order"):
        await sale.release(basket | {"lines": lines})
    assert await sale.dump() == before


@pytest.mark.parametrize("held", ["0", "1", "two"])
async def test_less_is_held_than_the_order_has_and_nothing_changes(
    sale: LuaSale, held: str
) -> None:
    basket = await sale.hold(lines={"a": 2})
    await sale.connections.command("HSET", sale.keys.stock("a"), "held", held)
    before = await sale.dump()
    with pytest.raises(Exception, match="held of a is less than the order"):
        await sale.release(basket)
    assert await sale.dump() == before
    await sale.connections.command("HSET", sale.keys.stock("a"), "held", "2")


@pytest.mark.parametrize("what", LOST)
async def test_a_server_that_lost_acknowledged_events_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.hold()
    before = await sale.dump()
    assert await sale.release(basket, mark=sale.lost(what)) == ["went_back"]
    assert await sale.dump() == before
    assert await sale.release(basket, mark=sale.mark) == ["released"]
