"""release.lua: each result word, and the race against a claim in both orders."""

import pytest

from tests.support.lua_sale import LOST, LuaSale


async def test_a_release_returns_stock_and_limit_once(sale: LuaSale) -> None:
    basket = await sale.hold(lines={"a": 2, "b": 1})
    assert await sale.release(basket) == ["released"]
    assert await sale.stock("a") == (10, 10, 0, 0)
    assert await sale.bought() == {}
    async with sale.unchanged():
        assert await sale.release(basket) == ["present", "RELEASED"]


async def test_a_claim_after_a_release_holds_the_basket_again(sale: LuaSale) -> None:
    basket = await sale.hold()
    assert await sale.release(basket) == ["released"]
    assert (await sale.claim(basket))[0] == "claimed"


async def test_a_release_after_a_claim_changes_nothing(sale: LuaSale) -> None:
    basket = await sale.hold()
    await sale.claim(basket)
    async with sale.unchanged():
        assert await sale.release(basket) == ["present", "CONFIRMING"]


async def test_a_paid_order_is_not_released(sale: LuaSale) -> None:
    assert await sale.release(await sale.sold()) == ["present", "CONFIRMED"]


async def test_the_release_of_an_order_without_a_hold_returns_no_units(bare_sale: LuaSale) -> None:
    await bare_sale.put(hold_policy="success")
    basket = await bare_sale.hold()
    assert await bare_sale.release(basket) == ["released"]
    assert await bare_sale.stock("a") == (10, 10, 0, 0)
    await bare_sale.check()


async def test_an_unknown_late_or_outdated_release_changes_nothing(sale: LuaSale) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        assert await sale.release(sale.basket()) == ["not_found"]
        assert await sale.release(basket, late=1) == ["too_late"]
        assert await sale.release(basket, epoch="other") == ["recovering"]


@pytest.mark.parametrize("lines", [{"b": 1}, {}])
async def test_a_release_with_other_stock_keys_changes_nothing(
    sale: LuaSale, lines: dict[str, int]
) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        with pytest.raises(Exception, match="stock keys do not fit the order"):
            await sale.release(basket | {"lines": lines})


@pytest.mark.parametrize("held", ["0", "1", "two"])
async def test_a_release_above_the_held_counter_changes_nothing(sale: LuaSale, held: str) -> None:
    basket = await sale.hold(lines={"a": 2})
    await sale.connections.command("HSET", sale.keys.stock("a"), "held", held)
    async with sale.unchanged():
        with pytest.raises(Exception, match="held of a is less than the order"):
            await sale.release(basket)
    await sale.connections.command("HSET", sale.keys.stock("a"), "held", "2")


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        assert await sale.release(basket, mark=sale.lost(what)) == ["went_back"]
    assert await sale.release(basket, mark=sale.mark) == ["released"]
