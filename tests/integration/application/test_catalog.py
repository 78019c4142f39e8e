"""The catalog: cached sales and unknown ones, one read for concurrent callers, and paged lists."""

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from reservation.adapters.redis import client as connection
from reservation.adapters.redis import connection_pool as pool
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.application.sales import manage
from reservation.application.sales.listing import SaleList
from reservation.domain.errors import (
    MalformedRequest,
    SaleNotFound,
    SaleRecovering,
    UpgradeInProgress,
)
from reservation.domain.sale import Sale
from reservation.domain.sale_settings import SaleDefinition
from reservation.domain.states import SaleStatus, Visibility
from reservation.telemetry.metrics import ALARMS
from reservation.workers.runner import Worker
from tests.support.in_process import Bench, bench, sale_definition


@pytest.fixture
async def here(tmp_path: Path, own_server: EmbeddedServer) -> AsyncIterator[Bench]:
    """On its own server: its list has no other test's sales."""
    async with bench(tmp_path / "sql", own_server.url) as made:
        yield made


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Every statement sent to SQL."""
    seen: list[str] = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


def change(**changes: Any) -> SaleDefinition:
    return sale_definition(changes.pop("now_ms"), **changes)


async def test_invented_sale_ids_cost_no_query_and_no_memory(
    here: Bench, statements: list[str]
) -> None:
    service = here.service
    await here.sale()
    with pytest.raises(SaleNotFound):
        await service.catalog.fresh("first")
    statements.clear()
    for number in range(300):
        with pytest.raises(SaleNotFound):
            await service.catalog.get(f"made-up-{number}")
        assert await service.queries.find(f"made-up-{number}-{'A' * 24}") is None
    assert statements == []
    kept = [value for value in vars(service.catalog).values() if isinstance(value, dict | set)]
    assert not [key for some in kept for key in some if str(key).startswith("made-up")]


async def test_key_names_are_cached_for_a_bounded_number_of_sales(here: Bench) -> None:
    keys = here.service.keys
    for number in range(6_000):
        keys.of(f"made-up-{number}")
    assert keys.of.cache_info().currsize <= 4_096
    assert keys.of("one") is keys.of("one")


async def test_a_sale_created_by_another_process_is_found_at_once(
    tmp_path: Path, own_server: EmbeddedServer
) -> None:
    async with (
        bench(tmp_path / "sql", own_server.url) as one,
        bench(tmp_path / "sql", own_server.url) as other,
    ):
        await other.hold(await other.sale())
        for _ in range(20):
            sale_id = await one.sale()
            assert (await other.service.catalog.get(sale_id)).sale.sale_id == sale_id
            await other.hold(sale_id)


async def test_a_sale_lost_by_redis_is_recovering_and_never_unknown(here: Bench) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.lose(sale_id)
    here.service.catalog.forget(sale_id)
    for _ in range(3):
        with pytest.raises(SaleRecovering):
            await here.service.catalog.fresh(sale_id)


@pytest.mark.parametrize("learned", [False, True])
async def test_an_epoch_read_before_a_rebuild_is_read_again_after_it(
    here: Bench, monkeypatch: pytest.MonkeyPatch, *, learned: bool
) -> None:
    """catalog:  SELECT epoch ---------------------------> the old one
    rebuild:                 new epoch in SQL, in Redis
    """
    service = here.service
    sale_id = await here.sale()
    service.catalog.forget(sale_id)
    epoch_of = service.sql.sales.epoch
    asked, rebuilt = asyncio.Event(), asyncio.Event()

    async def late(sale_id: str) -> str | None:
        found = await epoch_of(sale_id)
        asked.set()
        await rebuilt.wait()
        return found

    monkeypatch.setattr(service.sql.sales, "epoch", late)
    loading = asyncio.create_task(service.catalog.get(sale_id))
    await asked.wait()
    report = await service.rebuild.run(sale_id, operator="op", force=True)
    if learned:
        service.catalog.learn(sale_id, report.epoch)
    rebuilt.set()
    assert (await loading).epoch == report.epoch
    assert service.catalog.cached(sale_id) is not None


async def test_a_cached_sale_is_read_again_after_a_rebuild(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalog gets the new epoch while a read of the old state is in flight."""
    service = here.service
    sale_id = await here.sale()
    service.catalog.forget(sale_id)
    read = service.sale_store.read
    asked, rebuilt = asyncio.Event(), asyncio.Event()

    async def late(sale_id: str) -> Sale | None:
        found = await read(sale_id)
        asked.set()
        await rebuilt.wait()
        return found

    monkeypatch.setattr(service.sale_store, "read", late)
    loading = asyncio.create_task(service.catalog.get(sale_id))
    await asked.wait()
    report = await service.rebuild.run(sale_id, operator="op", force=True)
    service.catalog.learn(sale_id, report.epoch)
    rebuilt.set()
    assert (await loading).epoch == report.epoch


async def test_concurrent_creations_each_return_their_sale(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQL's answers may come late and out of order; a stale read must not overwrite a newer one."""
    epochs, calls = here.service.sql.sales.epochs, itertools.count()

    async def late() -> dict[str, str]:
        found = await epochs()
        await asyncio.sleep(next(calls) % 3 * 0.01)
        return found

    monkeypatch.setattr(here.service.sql.sales, "epochs", late)

    async def create(number: int) -> bool:
        wanted = change(name=f"Sale {number}", now_ms=here.service.clock.now_ms())
        sale_id = f"c{secrets.token_hex(6)}"
        sale, created = await here.service.sales.put(sale_id, wanted, if_match=None, operator="op")
        return created and sale.name == wanted.name

    for start in range(0, 256, 32):
        found = await asyncio.gather(*(create(start + number) for number in range(32)))
        assert all(found)


async def test_the_cost_of_a_creation_is_independent_of_other_sales(
    here: Bench, statements: list[str]
) -> None:
    await here.sale()
    statements.clear()
    await here.sale()
    first = len(statements)
    for _ in range(20):
        await here.sale()
    assert len(statements) == 21 * first
    whole = [one for one in statements if one.startswith("SELECT") and "WHERE" not in one]
    assert whole == []


async def test_concurrent_equal_creations_make_one_sale(here: Bench) -> None:
    wanted = change(now_ms=here.service.clock.now_ms())
    found = await asyncio.gather(
        *(here.service.sales.put("twice", wanted, if_match=None, operator="op") for _ in range(8))
    )
    assert {sale.version for sale, _ in found} == {1}


async def test_the_response_to_an_operator_shows_the_change(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other callers read the sale constantly; their reads may have begun before the change."""
    service = here.service
    sale_id = await here.sale()
    read = service.sale_store.read

    async def read_late(sale_id: str) -> Sale | None:
        sale = await read(sale_id)
        await asyncio.sleep(0.01)
        return sale

    monkeypatch.setattr(service.sale_store, "read", read_late)
    over = asyncio.Event()

    async def poll() -> None:
        while not over.is_set():
            await service.catalog.fresh(sale_id)

    polling = [asyncio.create_task(poll()) for _ in range(20)]
    for number in range(30):
        wanted = SaleStatus.PAUSED if number % 2 == 0 else SaleStatus.OPEN
        # While a read is in progress.
        await asyncio.sleep(0.005)
        sale = await service.sales.switch(sale_id, wanted, reason="test", operator="op")
        assert sale.switched is wanted
        sale = await service.sales.restock(
            sale_id,
            sku="a",
            delta=1,
            reason="test",
            idempotency_key=str(number),
            operator="op",
        )
        assert sale.items[0].total == 101 + number
    over.set()
    await asyncio.gather(*polling)


async def walk(here: Bench, limit: int) -> list[Sale]:
    now_ms = here.service.connections.server_now_ms()
    found: list[Sale] = []
    cursor: str | None = None
    while True:
        page = await here.service.sales.page(cursor, limit, now_ms=now_ms)
        assert len(page.sales) <= limit
        found += page.sales
        cursor = page.next_cursor
        if cursor is None:
            return found


async def test_live_sales_are_listed_before_upcoming_and_ended_ones(here: Bench) -> None:
    now_ms = here.service.connections.server_now_ms()
    hour = 3_600_000
    past = [
        await here.sale(opens_at_ms=now_ms - 9 * hour, closes_at_ms=now_ms - n * hour)
        for n in (1, 2)
    ]
    late, soon = [await here.sale(closes_at_ms=now_ms + n * hour) for n in (5, 1)]
    coming = [
        await here.sale(opens_at_ms=now_ms + n * hour, closes_at_ms=now_ms + 9 * hour)
        for n in (1, 2)
    ]
    shut = await here.sale(closes_at_ms=now_ms + hour)
    await here.service.sales.switch(shut, SaleStatus.CLOSED, reason="test", operator="op")
    expected = [soon, late, *coming, shut, *past]
    for limit in (1, 2, 3, 100):
        assert [sale.sale_id for sale in await walk(here, limit)] == expected


async def test_a_sale_opening_between_two_pages_is_not_skipped(here: Bench) -> None:
    now_ms = here.service.connections.server_now_ms()
    live = [await here.sale(closes_at_ms=now_ms + 3_600_000 + n) for n in range(3)]
    opening = await here.sale(opens_at_ms=now_ms + 60_000, closes_at_ms=now_ms + 90_000)
    page = await here.service.sales.page(None, 3, now_ms=now_ms)
    assert [sale.sale_id for sale in page.sales] == live
    # It closes first, so it would sort before the cursor.
    page = await here.service.sales.page(page.next_cursor, 3, now_ms=now_ms + 61_000)
    assert [sale.sale_id for sale in page.sales] == [opening]


@pytest.mark.parametrize("cursor", ["x", "", "é", "W10", "WzEsMiwzXQ", "WzEsMCwwLCJhIl0"])
async def test_a_foreign_cursor_is_refused(here: Bench, cursor: str) -> None:
    with pytest.raises(MalformedRequest):
        await here.service.sales.page(cursor, 10, now_ms=here.service.clock.now_ms())


async def commands(here: Bench) -> int:
    info = await here.service.connections.command("INFO", "stats")
    line = next(line for line in info.splitlines() if line.startswith("total_commands_processed:"))
    return int(line.partition(":")[2])


async def test_concurrent_readers_share_one_read_of_the_list(here: Bench) -> None:
    for _ in range(30):
        await here.sale()
    now_ms = here.service.connections.server_now_ms()
    sale_list = SaleList(
        here.service.sale_store, here.service.catalog.is_retired, clock=here.service.clock
    )
    before = await commands(here)
    await asyncio.gather(*(sale_list.page(None, 100, now_ms=now_ms) for _ in range(200)))
    first = await commands(here) - before
    # SMEMBERS, 30 heads, 30 hashes, 30 items, INFO.
    assert first <= 92
    # Unchanged sales are not read again.
    sale_list._read_at = float("-inf")
    before = await commands(here)
    await sale_list.page(None, 100, now_ms=now_ms)
    assert await commands(here) - before <= 32


async def test_the_list_shows_a_change_of_this_process_at_once(here: Bench) -> None:
    for number in range(10):
        sale_id = await here.sale(name=f"Sale {number}")
        assert sale_id in {sale.sale_id for sale in await walk(here, 100)}
        await here.service.sales.switch(sale_id, SaleStatus.PAUSED, reason="test", operator="op")
        found = {sale.sale_id: sale for sale in await walk(here, 100)}
        assert found[sale_id].switched is SaleStatus.PAUSED


@pytest.mark.parametrize("harm", ["a field is gone", "another type", "a number is invalid", "far"])
async def test_a_damaged_sale_is_omitted_and_reported(here: Bench, harm: str) -> None:
    whole, hurt = await here.sale(), await here.sale()
    names, command = here.service.keys.of(hurt), here.service.connections.command
    match harm:
        case "a field is gone":
            await command("HDEL", names.sale, "closes_at")
        case "another type":
            await command("DEL", names.sale)
            await command("SET", names.sale, "x")
        case "a number is invalid":
            await command("HSET", names.stock("a"), "total", "many")
        case _:
            await command("HSET", names.sale, "closes_at", str(10**17))
    before = ALARMS.labels("sale_unreadable")._value.get()
    sale_list = SaleList(
        here.service.sale_store, here.service.catalog.is_retired, clock=here.service.clock
    )
    for _ in range(3):
        sale_list._read_at = float("-inf")
        page = await sale_list.page(None, 100, now_ms=here.service.clock.now_ms())
        assert [sale.sale_id for sale in page.sales] == [whole]
    assert ALARMS.labels("sale_unreadable")._value.get() == before + 1


async def test_a_worker_with_a_skewed_clock_raises_one_alarm(here: Bench) -> None:
    service = here.service
    worker = Worker(service)
    before = ALARMS.labels("worker_clock")._value.get()
    await worker._measure_clock()
    assert ALARMS.labels("worker_clock")._value.get() == before
    clock = service.clock
    now_ms = clock.now_ms

    def late() -> int:
        return now_ms() - 5_000

    clock.now_ms = late
    for _ in range(3):
        await worker._measure_clock()
    assert not service.readiness.clocks.may_expire
    assert ALARMS.labels("worker_clock")._value.get() == before + 1


@pytest.mark.slow
async def test_a_thousand_concurrent_prepares_in_separate_sales_are_held(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Generous time-outs for a busy machine: a refusal here means a lack of connections.
    monkeypatch.setattr(connection, "NOT_AFTER_MS", 40_000)
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", 40.0)
    monkeypatch.setattr(pool, "WAIT_SECONDS_MAX", 40.0)
    sale_ids = [await here.sale() for _ in range(1_000)]
    held = await asyncio.gather(*(here.hold(sale_id) for sale_id in sale_ids))
    assert {order.status for order in held} == {"HELD"}


async def test_a_draft_needs_the_level_that_processes_without_drafts_do_not_have(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manage, "LEVEL_OF_PRESENTATION", 3)
    with pytest.raises(UpgradeInProgress):
        await here.sale(visibility=Visibility.DRAFT)
    await here.sale()
