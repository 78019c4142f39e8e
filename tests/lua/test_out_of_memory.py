"""Out of memory: the server refuses new holds; a hold can still end and a sale can still stop."""

import pytest

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable
from reservation.domain.clock import SystemClock
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import LuaSale
from tests.support.valkey import SERVERS, MakeServer, binary_of


@pytest.mark.parametrize("name", SERVERS)
async def test_out_of_memory_refuses_holds_and_sales_before_any_write(
    make_server: MakeServer, name: str
) -> None:
    """`#!lua` without allow-oom is refused before its first command, so no write is half-done."""
    server = make_server("full", binary=binary_of(name))
    await server.start()
    connections = RedisClient(server.url, clock=SystemClock())
    sale = LuaSale(connections)
    await sale.put()
    held, paying, sold = await sale.hold("h"), await sale.hold("p"), await sale.sold("s")
    due = await sale.hold("d")
    await sale.run_out(due)
    await connections.command("CONFIG", "SET", "maxmemory", "1mb")
    async with sale.unchanged():
        with pytest.raises(StoreUnavailable):
            await sale.prepare(sale.basket("new"))
        with pytest.raises(StoreUnavailable):
            await sale.put(version=1)
    assert (await sale.claim(paying))[0] == "claimed"
    assert await sale.finish(paying, 1, "confirmed") == ["done", "CONFIRMED"]
    assert await sale.release(held) == ["released"]
    assert await sale.expire(due) == ["expired"]
    assert await sale.refund(sold) == ["refunded"]
    assert await sale.restock(delta=-3) == ["done"]
    for status in ("paused", "open", "closed"):
        assert await sale.switch(status) == ["done"]
    partition = LuaPartition(connections)
    await connections.command("CONFIG", "SET", "maxmemory", "0")
    await partition.put()
    await connections.command("CONFIG", "SET", "maxmemory", "1mb")
    async with partition.unchanged():
        with pytest.raises(StoreUnavailable):
            await partition.lend()
        with pytest.raises(StoreUnavailable):
            await partition.borrow()
        assert (await partition.reading())[0] == "reading"
    await sale.check()
    await connections.aclose()
