"""restock.lua: each result word; idempotent by its operation."""

import json

import pytest

from reservation.adapters.redis.mapping import as_mapping
from tests.support.lua_sale import LOST, LuaSale


async def test_an_operation_adds_or_withdraws_units_once(sale: LuaSale) -> None:
    for _ in range(2):
        assert await sale.restock(delta=5, operation="one") == ["done"]
    assert await sale.stock("a") == (15, 15, 0, 0)
    assert await sale.restock(delta=-15) == ["done"]
    assert await sale.stock("a") == (0, 0, 0, 0)


async def test_an_operation_id_cannot_be_reused_for_another_change(sale: LuaSale) -> None:
    await sale.restock(operation="one")
    async with sale.unchanged():
        assert await sale.restock(operation="one", digest="other") == ["key_reused"]


async def test_held_units_cannot_be_withdrawn(sale: LuaSale) -> None:
    await sale.hold(lines={"a": 3})
    async with sale.unchanged():
        assert await sale.restock(delta=-8) == ["insufficient", "7"]


async def test_an_unknown_item_or_an_excessive_total_is_refused(sale: LuaSale) -> None:
    async with sale.unchanged():
        assert await sale.restock("z") == ["sku_not_found"]
        assert await sale.restock(delta=991) == ["too_many", "10"]
    assert await sale.restock(delta=990) == ["done"]


async def test_an_outdated_or_late_call_changes_nothing(sale: LuaSale) -> None:
    async with sale.unchanged():
        assert await sale.restock(epoch="other") == ["recovering"]
        assert await sale.restock(late=1) == ["too_late"]


async def test_the_restock_event_has_the_item_and_its_new_counters(sale: LuaSale) -> None:
    await sale.restock("b", 2)
    [[_, flat]] = await sale.connections.command(
        "XREVRANGE", sale.keys.outbox, "+", "-", "COUNT", 1
    )
    fields = as_mapping(flat)
    assert fields["event"] == "restocked"
    assert json.loads(fields["data"]) == {"sku": "b", "delta": 2, "total": 7, "version": 2}


async def test_an_excessive_total_refusal_reports_the_total_alone(sale: LuaSale) -> None:
    await sale.hold(lines={"a": 3})
    assert await sale.restock(delta=991) == ["too_many", "10"]


async def test_a_put_based_on_a_version_before_a_restock_is_refused(sale: LuaSale) -> None:
    assert await sale.restock(delta=50) == ["done"]
    assert await sale.put(version=1) == ["changed", "2"]
    assert await sale.stock("a") == (60, 60, 0, 0)


async def test_a_put_cannot_be_repeated_after_a_restock(sale: LuaSale) -> None:
    assert await sale.put(version=1, digest="same") == ["done", "2"]
    assert await sale.put(version=1, digest="same") == ["done", "2"]
    await sale.restock(delta=5)
    assert await sale.put(version=2, digest="same") == ["changed", "3"]
    assert await sale.put(version=1, digest="same") == ["changed", "3"]


async def test_a_creation_cannot_be_repeated_after_a_restock(sale: LuaSale) -> None:
    await sale.restock(delta=5)
    assert await sale.put() == ["exists", "2"]


async def test_a_sale_without_a_version_fails_as_a_bug_without_a_write(
    bare_sale: LuaSale,
) -> None:
    await bare_sale.put()
    sold = await bare_sale.sold()
    await bare_sale.connections.command("HDEL", bare_sale.keys.sale, "version")
    async with bare_sale.unchanged():
        with pytest.raises(Exception, match="BUG restock"):
            await bare_sale.restock()
        with pytest.raises(Exception, match="BUG refund"):
            await bare_sale.refund(sold, restock=0)


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    async with sale.unchanged():
        assert await sale.restock(mark=sale.lost(what)) == ["went_back"]
    assert await sale.restock(mark=sale.mark) == ["done"]
