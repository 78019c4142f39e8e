"""put_sale.lua: each result word, the mutable fields and the immutable ones."""

import pytest

from reservation.adapters.redis.mapping import as_mapping
from tests.support.lua_sale import LOST, LuaSale

A, B = ("a", "A", 1000, 10, 3), ("b", "B", 500, 5, 5)


async def test_the_same_creation_again_is_the_same_sale(sale: LuaSale) -> None:
    opens = (await sale.connections.command("HGET", sale.keys.sale, "opens_at"), 1)[0]
    before = await sale.dump()
    assert await sale.put(opens_at=opens) == ["done", "1"]
    assert await sale.put(digest="another") == ["exists", "1"]
    assert await sale.dump() == before


async def test_an_update_needs_the_version_that_was_read(sale: LuaSale) -> None:
    assert await sale.put(version=1, digest="d2", name="New") == ["done", "2"]
    before = await sale.dump()
    assert await sale.put(version=1, digest="d2", name="New") == ["done", "2"]
    assert await sale.put(version=1, digest="d3", name="Late") == ["changed", "2"]
    assert await sale.dump() == before


async def test_currency_and_policy_stay(sale: LuaSale) -> None:
    before = await sale.dump()
    assert await sale.put(version=1, digest="x", currency="USD") == ["fixed", "currency"]
    assert await sale.put(version=1, digest="x", hold_policy="success") == ["fixed", "hold_policy"]
    assert await sale.dump() == before


async def test_a_total_covers_held_and_sold_units(sale: LuaSale) -> None:
    await sale.hold("one", lines={"a": 2})
    await sale.sold("two", lines={"a": 1})
    before = await sale.dump()
    low = [("a", "A", 1000, 2, 3), B]
    assert await sale.put(version=1, digest="x", items=low) == ["total_too_low", "a", "3"]
    assert await sale.dump() == before
    just = [("a", "A", 1000, 3, 3), B]
    assert await sale.put(version=1, digest="y", items=just) == ["done", "2"]
    assert await sale.stock("a") == (3, 0, 2, 1)


async def test_an_item_in_use_does_not_leave_and_an_unused_one_does(sale: LuaSale) -> None:
    held = await sale.hold(lines={"b": 1})
    before = await sale.dump()
    leave = {"items": [A], "leaving": ["b"]}
    assert await sale.put(version=1, digest="x", **leave) == ["item_in_use", "b"]
    assert await sale.dump() == before
    await sale.release(held)
    assert await sale.put(version=1, digest="y", **leave) == ["done", "2"]
    assert await sale.connections.command("EXISTS", sale.keys.stock("b")) == 0


async def test_a_new_price_is_for_new_prepares(sale: LuaSale) -> None:
    held = await sale.hold()
    await sale.put(version=1, digest="x", items=[("a", "A", 2000, 10, 3), B])
    assert (await sale.claim(held))[0] == "claimed"
    assert (await sale.prepare(sale.basket("new")))[0] == ["amount_mismatch", "2000"]


async def test_keys_of_a_lost_sale_are_in_the_way_of_a_new_one(bare_sale: LuaSale) -> None:
    await bare_sale.put()
    await bare_sale.connections.command("DEL", bare_sale.keys.sale)
    assert await bare_sale.put() == ["recovering"]


async def test_another_epoch_and_a_late_call_change_nothing(sale: LuaSale) -> None:
    before = await sale.dump()
    assert await sale.put(version=1, digest="x", epoch="other") == ["recovering"]
    assert await sale.put(version=1, digest="x", late=1) == ["too_late"]
    assert await sale.dump() == before


async def test_a_sale_keeps_its_settings_and_nothing_else(sale: LuaSale) -> None:
    async def kept() -> dict[str, str]:
        return as_mapping(await sale.connections.command("HGETALL", sale.keys.sale))

    first = await kept()
    settings = {"name", "currency", "opens_at", "closes_at", "hold_seconds", "hold_policy"}
    settings |= {"virtual_accounts", "require_admission"}
    own = {"version", "digest", "skus", "epoch", "status", "created_at", "seq", "chain"}
    assert set(first) == settings | own
    assert (first["name"], first["currency"], first["hold_seconds"]) == ("Sale", "KRW", "300")
    await sale.put(version=1, digest="x", name="New", hold_seconds=60)
    second = await kept()
    assert (second["name"], second["hold_seconds"]) == ("New", "60")
    assert second["created_at"] == first["created_at"]


async def test_an_item_keeps_its_name_price_and_limit(sale: LuaSale) -> None:
    async def kept(sku: str) -> list[str]:
        key = sale.keys.stock(sku)
        return await sale.connections.command("HMGET", key, "name", "price", "limit", "total")

    assert await kept("a") == ["A", "1000", "3", "10"]
    await sale.put(version=1, digest="x", items=[A, ("b", "Better", 700, 9, 2)])
    assert await kept("b") == ["Better", "700", "2", "9"]


async def test_an_item_that_is_half_held_and_half_sold_does_not_leave(sale: LuaSale) -> None:
    await sale.hold("one", lines={"b": 1})
    await sale.sold("two", lines={"b": 1})
    leave = {"items": [A], "leaving": ["b"]}
    assert await sale.put(version=1, digest="x", **leave) == ["item_in_use", "b"]


async def test_an_item_that_the_caller_does_not_know_of_does_not_leave(sale: LuaSale) -> None:
    before = await sale.dump()
    assert await sale.put(version=1, digest="x", items=[A]) == ["changed", "1"]
    wrong = {"items": [A], "leaving": ["z"]}
    assert await sale.put(version=1, digest="x", **wrong) == ["changed", "1"]
    assert await sale.dump() == before


@pytest.mark.parametrize("what", LOST)
async def test_a_server_that_lost_acknowledged_events_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    before = await sale.dump()
    assert await sale.put(version=1, digest="e", mark=sale.lost(what)) == ["went_back"]
    assert await sale.dump() == before
    assert await sale.put(version=1, digest="e", mark=sale.mark) == ["done", "2"]
