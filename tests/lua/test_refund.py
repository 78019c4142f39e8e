"""refund.lua: each result word; units return to stock or leave the sale."""

import pytest

from tests.support.lua_sale import LOST, LuaSale


async def test_a_refund_puts_the_units_on_sale_again_once(sale: LuaSale) -> None:
    basket = await sale.sold(lines={"a": 2})
    assert await sale.refund(basket) == ["refunded"]
    assert await sale.stock("a") == (10, 10, 0, 0)
    assert await sale.bought() == {}
    before = await sale.dump()
    assert await sale.refund(basket) == ["refunded"]
    assert await sale.dump() == before


async def test_a_refund_may_take_the_units_out_of_the_sale(sale: LuaSale) -> None:
    basket = await sale.sold(lines={"a": 2})
    assert await sale.refund(basket, restock=0) == ["refunded"]
    assert await sale.stock("a") == (8, 8, 0, 0)
    assert await sale.bought() == {}


async def test_an_unsold_order_is_not_refunded(sale: LuaSale) -> None:
    basket = await sale.hold()
    before = await sale.dump()
    assert await sale.refund(basket) == ["present", "HELD"]
    assert await sale.dump() == before


async def test_a_refund_of_nothing_a_late_one_and_one_of_another_epoch(sale: LuaSale) -> None:
    basket = await sale.sold()
    before = await sale.dump()
    assert await sale.refund(sale.basket()) == ["not_found"]
    assert await sale.refund(basket, late=1) == ["too_late"]
    assert await sale.refund(basket, epoch="other") == ["recovering"]
    assert await sale.dump() == before


@pytest.mark.parametrize(("restock", "reply"), [(1, ["done", "2"]), (0, ["changed", "2"])])
async def test_the_version_moves_where_the_total_does(
    sale: LuaSale, restock: int, reply: list[str]
) -> None:
    sold = await sale.sold()
    assert await sale.refund(sold, restock=restock) == ["refunded"]
    assert await sale.put(version=1) == reply


@pytest.mark.parametrize("what", LOST)
async def test_a_server_that_lost_acknowledged_events_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    basket = await sale.sold()
    before = await sale.dump()
    assert await sale.refund(basket, mark=sale.lost(what)) == ["went_back"]
    assert await sale.dump() == before
    assert await sale.refund(basket, mark=sale.mark) == ["refunded"]
