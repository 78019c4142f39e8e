"""Tombstones for the tests of scripts: orders that end and are replaced, and damaged buckets."""

from typing import Any

from reservation.adapters.redis.keys import order_field
from reservation.adapters.redis.mapping import as_mapping
from tests.support.lua_sale import LuaSale

ADDED, NOT_ADDED = ["done", "1", "0"], ["done", "0", "0"]


async def leave(sale: LuaSale, buyer: str = "buyer", **changes: Any) -> dict[str, Any]:
    """An order that its buyer released."""
    basket = await sale.hold(buyer, **changes)
    assert await sale.release(basket) == ["released"]
    return basket


async def replaced(sale: LuaSale, buyer: str = "buyer", **changes: Any) -> dict[str, Any]:
    """An order with a tombstone."""
    basket = await leave(sale, buyer, **changes)
    assert await sale.add_tombstones(basket) == ADDED
    return basket


async def bucket(sale: LuaSale, buyer: str = "buyer") -> dict[str, str]:
    return as_mapping(await sale.connections.command("HGETALL", sale.keys.ended(buyer)))


async def damage(sale: LuaSale, basket: dict[str, Any], text: str) -> None:
    key = sale.keys.ended(basket["buyer"])
    await sale.connections.command("HSET", key, order_field(basket["order"]), text)


async def seq_of(sale: LuaSale) -> str | None:
    return await sale.connections.command("HGET", sale.keys.sale, "tombstone_seq")
