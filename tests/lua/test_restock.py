"""restock.lua: each result word; idempotent by its operation."""

import json

import pytest

from reservation.adapters.redis.mapping import as_mapping
from tests.support.lua_sale import LOST, LuaSale


async def test_units_are_added_and_withdrawn_once_per_operation(sale: LuaSale) -> None:
    for _ in range(2):
        assert await sale.restock(delta=5, operation="one") == ["done"]
    assert await sale.stock("a") == (15, 15, 0, 0)
    assert await sale.restock(delta=-15) == ["done"]
    assert await sale.stock("a") == (0, 0, 0, 0)


async def test_the_same_operation_cannot_ask_for_something_else(sale: LuaSale) -> None:
    await sale.restock(operation="one")
    before = await sale.dump()
    assert await sale.restock(operation="one", digest="other") == ["key_reused"]
    assert await sale.dump() == before


async def test_held_units_cannot_be_withdrawn(sale: LuaSale) -> None:
    await sale.hold(lines={"a": 3})
    before = await sale.dump()
    assert await sale.restock(delta=-8) == ["insufficient", "7"]
    assert await sale.dump() == before


async def test_an_unknown_item_and_too_many_units_are_refused(sale: LuaSale) -> None:
    before = await sale.dump()
    assert await sale.restock("z") == ["sku_not_found"]
    assert await sale.restock(delta=991) == ["too_many", "10"]
    assert await sale.dump() == before
    assert await sale.restock(delta=990) == ["done"]


async def test_another_epoch_and_a_late_call_change_nothing(sale: LuaSale) -> None:
    before = await sale.dump()
    assert await sale.restock(epoch="other") == ["recovering"]
    assert await sale.restock(late=1) == ["too_late"]
    assert await sale.dump() == before


async def test_the_event_has_the_item_and_its_new_counters(sale: LuaSale) -> None:
    await sale.restock("b", 2)
    [[_, flat]] = await sale.connections.command(
        "XREVRANGE", sale.keys.outbox, "+", "-", "COUNT", 1
    )
    fields = as_mapping(flat)
    assert fields["event"] == "restocked"
    assert json.loads(fields["data"]) == {"sku": "b", "delta": 2, "total": 7, "version": 2}


async def test_too_many_reports_the_total_but_not_the_available_units(sale: LuaSale) -> None:
    await sale.hold(lines={"a": 3})
    assert await sale.restock(delta=991) == ["too_many", "10"]


async def test_a_put_of_before_a_restock_is_refused(sale: LuaSale) -> None:
    assert await sale.restock(delta=50) == ["done"]
    assert await sale.put(version=1) == ["changed", "2"]
    assert await sale.stock("a") == (60, 60, 0, 0)


async def test_a_restock_keeps_the_put_before_it_from_being_repeated(sale: LuaSale) -> None:
    assert await sale.put(version=1, digest="same") == ["done", "2"]
    assert await sale.put(version=1, digest="same") == ["done", "2"]
    await sale.restock(delta=5)
    assert await sale.put(version=2, digest="same") == ["changed", "3"]
    assert await sale.put(version=1, digest="same") == ["changed", "3"]


async def test_a_creation_is_not_repeated_after_a_restock(sale: LuaSale) -> None:
    await sale.restock(delta=5)
    assert await sale.put() == ["exists", "2"]


async def test_a_sale_without_a_version_is_a_bug_before_anything_is_written(
    bare_sale: LuaSale,
) -> None:
    await bare_sale.put()
    sold = await bare_sale.sold()
    await bare_sale.connections.command("HDEL", bare_sale.keys.sale, "version")
    before = await bare_sale.dump()
    with pytest.raises(Exception, match="BUG restock"):
        await bare_sale.restock()
    with pytest.raises(Exception, match="BUG refund"):
        await bare_sale.refund(sold, restock=0)
    assert await bare_sale.dump() == before


@pytest.mark.parametrize("what", LOST)
async def test_a_server_that_lost_acknowledged_events_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    before = await sale.dump()
    assert await sale.restock(mark=sale.lost(what)) == ["went_back"]
    assert await sale.dump() == before
    assert await sale.restock(mark=sale.mark) == ["done"]
