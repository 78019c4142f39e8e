"""A server that lost something is noticed before anything is sold from it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.domain.errors import SaleRecovering, Unavailable
from reservation.persistence.recovery import SaleHead
from reservation.recovery import compare
from reservation.redis.restore import Found
from tests.fixtures.in_process import Bench, bench
from tests.fixtures.valkey import MakeServer

HEAD = SaleHead(epoch="e", seq=5, chain="c5")


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


@pytest.mark.parametrize(
    ("found", "gap"),
    [
        (Found(epoch="e", seq=5, chain="c5", chain_there="c5"), None),
        (Found(epoch="e", seq=9, chain="c9", chain_there="c5"), None),
        (Found(epoch="e", seq=9, chain="c9", chain_there=None), None),
        (None, "no such sale"),
        (Found(epoch="d", seq=5, chain="c5", chain_there="c5"), "another epoch"),
        (Found(epoch="e", seq=3, chain="c3", chain_there=None), "2 events are lost"),
        (Found(epoch="e", seq=5, chain="x", chain_there="x"), "event 5 is another one"),
        (Found(epoch="e", seq=9, chain="c9", chain_there="x"), "event 5 is another one"),
    ],
)
def test_only_what_sql_has_and_redis_lacks_is_a_loss(found: Found | None, gap: str | None) -> None:
    told = compare(HEAD, found)
    assert told is None if gap is None else told is not None and gap in told


async def test_a_sale_that_went_back_in_time_is_closed_and_reopened(here: Bench) -> None:
    sale_id, other_id = await here.sale(), await here.sale()
    await here.hold(sale_id)
    memory = await here.remembered(sale_id)
    await here.hold(sale_id)
    await here.flush(sale_id)
    await here.put_back(sale_id, memory)
    watch = here.service.watch
    await watch.look()
    assert list(watch.gaps) == [sale_id]
    assert "1 events are lost" in watch.gaps[sale_id]
    with pytest.raises(SaleRecovering):
        await here.hold(sale_id)
    await here.hold(other_id)
    await here.service.rebuild(sale_id, operator="op")
    await watch.look()
    assert watch.gaps == {}
    await here.hold(sale_id)


async def test_a_sale_that_is_being_made_is_not_lost(here: Bench) -> None:
    await here.service.ledger.register_sale("soon", "{}", 1)
    watch = here.service.watch
    await watch.look()
    assert watch.gaps == {}
    await watch.look()
    assert list(watch.gaps) == ["soon"]


async def test_a_server_that_nobody_vouched_for_is_sold_nothing_from(
    tmp_path: Path, make_server: MakeServer
) -> None:
    server = make_server()
    await server.start()
    async with bench(tmp_path / "sql", server.url) as here:
        here.service.connections.guard()
        sale_id = await here.sale()
        with pytest.raises(Unavailable):
            await here.hold(sale_id)
        await here.service.watch.look()
        await here.hold(sale_id)

        await server.stop()
        await server.start()
        # The pool connects again by itself; the sale is as it was, and that nobody knows yet.
        with pytest.raises(Unavailable):
            await here.hold(sale_id)
        assert here.service.connections.doubted.is_set()
        await here.service.watch.look()
        await here.hold(sale_id)


async def test_the_watch_vouches_by_itself_soon_after_a_restart(
    tmp_path: Path, make_server: MakeServer
) -> None:
    server = make_server()
    await server.start()
    async with bench(tmp_path / "sql", server.url) as here:
        here.service.connections.guard()
        sale_id = await here.sale()
        watching = asyncio.create_task(here.service.watch.run())
        try:
            await eventually_holds(here, sale_id)
            await server.stop()
            await server.start()
            await eventually_holds(here, sale_id)
        finally:
            watching.cancel()


async def test_what_preflight_misses_closes_prepare_and_nothing_else(
    tmp_path: Path, make_server: MakeServer
) -> None:
    server = make_server()
    await server.start()
    async with bench(tmp_path / "sql", server.url) as here:
        sale_id = await here.sale()
        order = await here.hold(sale_id)
        await here.service.connections.command("CONFIG", "SET", "appendfsync", "no")
        await here.service.watch.look()
        with pytest.raises(Unavailable, match="redis-fsync-policy") as refusal:
            await here.hold(sale_id)
        assert refusal.value.facts["missing"] == ["redis-fsync-policy"]
        assert refusal.value.facts["retryAfter"]
        claimed = await here.claim(order)
        await here.finish(order, claimed.fence)
        await here.service.connections.command("CONFIG", "SET", "appendfsync", "always")
        await here.service.watch.look()
        await here.hold(sale_id)


async def eventually_holds(here: Bench, sale_id: str) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await here.hold(sale_id)
            except Unavailable:
                await asyncio.sleep(0.02)
            else:
                return
