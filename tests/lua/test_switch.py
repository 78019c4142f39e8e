"""switch.lua: each result word."""

import pytest

from tests.support.lua_sale import LOST, LuaSale


async def test_a_sale_is_paused_and_resumed(sale: LuaSale) -> None:
    assert await sale.switch("paused") == ["done"]
    async with sale.unchanged():
        assert await sale.switch("paused") == ["done"]
    assert await sale.switch("open") == ["done"]
    assert (await sale.prepare(sale.basket()))[0][0] == "held"


async def test_a_closed_sale_stays_closed(sale: LuaSale) -> None:
    assert await sale.switch("closed") == ["done"]
    async with sale.unchanged():
        assert await sale.switch("open") == ["closed"]
        assert await sale.switch("paused") == ["closed"]
    assert await sale.prepare(sale.basket()) == [["closed"]]


async def test_an_outdated_or_late_call_changes_nothing(sale: LuaSale) -> None:
    async with sale.unchanged():
        assert await sale.switch("paused", epoch="other") == ["recovering"]
        assert await sale.switch("paused", late=1) == ["too_late"]


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    async with sale.unchanged():
        assert await sale.switch("paused", mark=sale.lost(what)) == ["went_back"]
    assert await sale.switch("paused", mark=sale.mark) == ["done"]
