"""put_sale.lua: each result word, the mutable fields and the immutable ones."""

import pytest

from reservation.adapters.redis.mapping import as_mapping
from tests.support.lua_sale import LOST, LuaSale

A, B = ("a", "A", 1000, 10, 3), ("b", "B", 500, 5, 5)


async def test_a_repeated_creation_changes_nothing(sale: LuaSale) -> None:
    opens = (await sale.connections.command("HGET", sale.keys.sale, "opens_at"), 1)[0]
    async with sale.unchanged():
        assert await sale.put(opens_at=opens) == ["done", "1"]
        assert await sale.put(digest="another") == ["exists", "1"]


async def test_an_update_needs_the_current_version(sale: LuaSale) -> None:
    assert await sale.put(version=1, digest="d2", name="New") == ["done", "2"]
    async with sale.unchanged():
        assert await sale.put(version=1, digest="d2", name="New") == ["done", "2"]
        assert await sale.put(version=1, digest="d3", name="Late") == ["changed", "2"]


async def test_currency_and_hold_policy_cannot_change(sale: LuaSale) -> None:
    async with sale.unchanged():
        assert await sale.put(version=1, digest="x", currency="USD") == ["fixed", "currency"]
        assert await sale.put(version=1, digest="x", hold_policy="success") == [
            "fixed",
            "hold_policy",
        ]


async def test_a_total_covers_held_and_sold_units(sale: LuaSale) -> None:
    await sale.hold("one", lines={"a": 2})
    await sale.sold("two", lines={"a": 1})
    async with sale.unchanged():
        low = [("a", "A", 1000, 2, 3), B]
        assert await sale.put(version=1, digest="x", items=low) == ["total_too_low", "a", "3"]
    just = [("a", "A", 1000, 3, 3), B]
    assert await sale.put(version=1, digest="y", items=just) == ["done", "2"]
    assert await sale.stock("a") == (3, 0, 2, 1)


async def test_only_an_unused_item_can_be_removed(sale: LuaSale) -> None:
    held = await sale.hold(lines={"b": 1})
    async with sale.unchanged():
        leave = {"items": [A], "leaving": ["b"]}
        assert await sale.put(version=1, digest="x", **leave) == ["item_in_use", "b"]
    await sale.release(held)
    assert await sale.put(version=1, digest="y", **leave) == ["done", "2"]
    assert await sale.connections.command("EXISTS", sale.keys.stock("b")) == 0


async def test_a_new_price_applies_to_new_prepares(sale: LuaSale) -> None:
    held = await sale.hold()
    await sale.put(version=1, digest="x", items=[("a", "A", 2000, 10, 3), B])
    assert (await sale.claim(held))[0] == "claimed"
    assert (await sale.prepare(sale.basket("new")))[0] == ["amount_mismatch", "2000"]


async def test_leftover_keys_of_a_lost_sale_block_its_creation(bare_sale: LuaSale) -> None:
    await bare_sale.put()
    await bare_sale.connections.command("DEL", bare_sale.keys.sale)
    assert await bare_sale.put() == ["recovering"]


async def test_an_outdated_or_late_call_changes_nothing(sale: LuaSale) -> None:
    async with sale.unchanged():
        assert await sale.put(version=1, digest="x", epoch="other") == ["recovering"]
        assert await sale.put(version=1, digest="x", late=1) == ["too_late"]


async def test_a_sale_stores_exactly_its_settings(sale: LuaSale) -> None:
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


async def test_an_item_stores_its_name_price_and_limit(sale: LuaSale) -> None:
    async def kept(sku: str) -> list[str]:
        key = sale.keys.stock(sku)
        return await sale.connections.command("HMGET", key, "name", "price", "limit", "total")

    assert await kept("a") == ["A", "1000", "3", "10"]
    await sale.put(version=1, digest="x", items=[A, ("b", "Better", 700, 9, 2)])
    assert await kept("b") == ["Better", "700", "2", "9"]


async def test_a_partly_held_and_sold_item_cannot_be_removed(sale: LuaSale) -> None:
    await sale.hold("one", lines={"b": 1})
    await sale.sold("two", lines={"b": 1})
    leave = {"items": [A], "leaving": ["b"]}
    assert await sale.put(version=1, digest="x", **leave) == ["item_in_use", "b"]


async def test_an_item_unknown_to_the_caller_is_not_removed(sale: LuaSale) -> None:
    async with sale.unchanged():
        assert await sale.put(version=1, digest="x", items=[A]) == ["changed", "1"]
        wrong = {"items": [A], "leaving": ["z"]}
        assert await sale.put(version=1, digest="x", **wrong) == ["changed", "1"]


@pytest.mark.parametrize("what", LOST)
async def test_a_server_with_lost_events_refuses_and_changes_nothing(
    sale: LuaSale, what: str
) -> None:
    async with sale.unchanged():
        assert await sale.put(version=1, digest="e", mark=sale.lost(what)) == ["went_back"]
    assert await sale.put(version=1, digest="e", mark=sale.mark) == ["done", "2"]
