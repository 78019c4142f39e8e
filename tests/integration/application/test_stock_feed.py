"""Stock feed: one exchange with Redis for all watched sales, and a read for those that changed."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from litestar.response import ServerSentEventMessage

from api.http.routes import sales as routes
from api.http.routes.sales import StockFeed
from tests.support.in_process import Bench, bench

SALES = 30
#: Ticks of the feed that a test waits for.
TICKS = 20


@pytest.fixture
async def place(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "var", valkey_url) as found:
        yield found


@pytest.fixture
def feed(place: Bench, monkeypatch: pytest.MonkeyPatch) -> StockFeed:
    monkeypatch.setattr(routes, "TICK_SECONDS", 0.01)
    return StockFeed(cast("Any", SimpleNamespace(service=place.service)))


async def next_available(events: AsyncGenerator[ServerSentEventMessage]) -> int:
    async with asyncio.timeout(20):
        event = await anext(events)
    return msgspec.json.decode(cast("str", event.data))["available"]


async def calls(place: Bench, command: str) -> int:
    """How often Redis ran a command."""
    stats: str = await place.service.connections.command("INFO", "commandstats")
    prefix = f"cmdstat_{command}:calls="
    return sum(
        int(line.removeprefix(prefix).partition(",")[0])
        for line in stats.splitlines()
        if line.startswith(prefix)
    )


async def ticks(place: Bench, count: int) -> None:
    """Wait until the feed has read the heads of all sales this many times."""
    goal = await calls(place, "hmget") + count * SALES
    for _ in range(2000):
        if await calls(place, "hmget") >= goal:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the feed does not read the heads")


async def watched(stack: AsyncExitStack, feed: StockFeed, sale_id: str) -> AsyncGenerator[Any]:
    events = await stack.enter_async_context(aclosing(feed.watch(sale_id, "")))
    assert await next_available(events) > 0
    return events


async def test_idle_sales_are_not_read_again(place: Bench, feed: StockFeed) -> None:
    async with AsyncExitStack() as stack:
        for _ in range(SALES):
            await watched(stack, feed, await place.sale())
        # The last one is read once more at the tick after it was watched.
        await ticks(place, 2)
        whole = await calls(place, "hgetall")
        await ticks(place, TICKS)
        assert await calls(place, "hgetall") == whole


async def test_a_change_reaches_the_streams_of_its_sale(place: Bench, feed: StockFeed) -> None:
    async with AsyncExitStack() as stack:
        changed, idle = await place.sale(), await place.sale()
        streams = [await watched(stack, feed, changed) for _ in range(2)]
        other = await watched(stack, feed, idle)
        before = (await place.service.catalog.fresh(changed)).sale.items[0].available
        await place.hold(changed)
        assert [await next_available(events) for events in streams] == [before - 1] * 2
        waiting = asyncio.ensure_future(anext(other))
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_a_change_at_the_start_of_a_stream_is_sent(
    place: Bench, feed: StockFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another stream of the sale has been shown the change already."""
    sale_id = await place.sale()
    async with AsyncExitStack() as stack:
        first = await watched(stack, feed, sale_id)
        catalog = place.service.catalog
        fresh = catalog.fresh

        async def outdated(asked: str) -> Any:
            found = await fresh(asked)
            monkeypatch.undo()
            await place.hold(sale_id)
            await next_available(first)
            return found

        monkeypatch.setattr(catalog, "fresh", outdated)
        second = await stack.enter_async_context(aclosing(feed.watch(sale_id, "")))
        before = await next_available(second)
        assert await next_available(second) == before - 1


async def test_the_feed_stops_reading_with_its_last_stream(place: Bench, feed: StockFeed) -> None:
    async with AsyncExitStack() as stack:
        await watched(stack, feed, await place.sale())
        assert feed._task is not None
        task = feed._task
    await asyncio.gather(task, return_exceptions=True)
    assert (feed._task, feed._watchers) == (None, {})
