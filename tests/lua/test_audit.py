"""audit.lua: each result word; the script reads and never writes."""

from tests.support.lua_sale import LuaSale


async def test_head_and_counters_are_read_at_one_instant(sale: LuaSale) -> None:
    await sale.hold("held", lines={"a": 2})
    await sale.hold("also held")
    await sale.sold("sold", lines={"a": 1, "b": 1})
    await sale.claim(await sale.hold("paying"), "pk")
    async with sale.unchanged():
        word, seq, _, epoch, last_id, *rest = await sale.audit()
        assert (word, epoch, last_id) == ("counters", "epoch-1", f"{seq}-0")
        deadlines, confirming, deposits, _, *stocks = map(int, rest)
        assert (deadlines, confirming, deposits) == (2, 1, 0)
        assert stocks == [10, 5, 4, 1, 5, 4, 0, 1]


async def test_changed_items_are_sent(sale: LuaSale) -> None:
    assert await sale.audit(["a"]) == ["changed"]


async def test_a_missing_sale_is_reported(bare_sale: LuaSale) -> None:
    assert await bare_sale.audit() == ["not_found"]
