"""refund.lua: each result word; units return to stock or leave the sale."""

import pytest

from tests.support.lua_sale import LOST, LuaSale


async def test_a_refund_returns_the_units_to_sale_once(sale: LuaSale) -> None:
    basket = await sale.sold(lines={"a": 2})
    assert await sale.refund(basket) == ["refunded"]
    assert await sale.stock("a") == (10, 10, 0, 0)
    assert await sale.bought() == {}
    async with sale.unchanged():
        assert await sale.refund(basket) == ["refunded"]


async def test_a_refund_can_withdraw_the_units_from_sale(sale: LuaSale) -> None:
    basket = await sale.sold(lines={"a": 2})
    assert await sale.refund(basket, restock=0) == ["refunded"]
    assert await sale.stock("a") == (8, 8, 0, 0)
    assert await sale.bought() == {}


async def test_an_unsold_order_is_not_refunded(sale: LuaSale) -> None:
    basket = await sale.hold()
    async with sale.unchanged():
        assert await sale.refund(basket) == ["present", "HELD"]


async def test_an_unknown_late_or_outdated_refund_changes_nothing(sale: LuaSale) -> None:
    basket = await sale.sold()
    async with sale.unchanged():
        assert await sale.refund(sale.basket()) == ["not_found"]
        assert await sale.refund(basket, late=1) == ["too_late"]
        assert await sale.refund(basket, epoch="other") == ["recovering"]


@pytest.mark.parametrize(("restock", "reply"), [(1, ["done", "2"]), (0, ["changed", "2"])])
async def test_the_version_changes_with_the_total(
    sale: LuaSale, restock: int, reply: list[str]
) -> None:
    sold = await sale.sold()
    assert await sale.refund(sold, restock=restock) == ["refunded"]
    assert await sale.put(version=1) == reply


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.sold()
    async with sale.unchanged():
        assert await sale.refund(basket, mark=sale.lost(what)) == ["went_back"]
    assert await sale.refund(basket, mark=sale.mark) == ["refunded"]
