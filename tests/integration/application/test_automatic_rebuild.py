"""A worker rebuilds a sale that lost data where that is certain, and takes over from a dead one."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import text

from reservation import failpoints
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.errors import StoreUnavailable
from reservation.adapters.sql.payment_intents import Intent
from reservation.application.recovery import automatic
from reservation.domain.alarms import Alarm
from reservation.domain.errors import SaleRecovering
from reservation.domain.levels import LEVEL_OF_0_1_0, LEVEL_OF_AUTOMATIC_REBUILD
from reservation.domain.payment_gateway import Answer
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.telemetry import metrics
from reservation.workers.runner import Worker
from tests.faults.payments.shop import raising
from tests.support.in_process import Bench, bench
from tests.support.service import NOT_INHERITED

#: The points of a rebuild, in their order. A sale of one partition has no peers.
POINTS = [
    point
    for point in failpoints.POINTS
    if point.startswith("rebuild:") and point != "rebuild:after_peers"
]
PATIENCE_SECONDS = 30.0


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str, database_url: str) -> AsyncIterator[Bench]:
    """A service on each database; SQLite if there is no URL."""
    address = "" if database_url.startswith("sqlite") else database_url
    async with bench(tmp_path, valkey_url, RESERVATION_DATABASE_URL=address) as made:
        yield made
    failpoints.disarm()


async def rebuild(here: Bench, sale_id: str) -> int:
    """One comparison and one round of a worker."""
    await here.service.redis_monitor.check_redis()
    return await here.service.automatic_rebuild.run_once([sale_id])


async def eventually_rebuilt(here: Bench, sale_id: str) -> None:
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not await rebuild(here, sale_id):
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.02)
    await here.service.redis_monitor.check_redis()


async def intend(here: Bench, order: Reservation, fence: int, key: str = "key-1") -> None:
    epoch = (await here.service.catalog.fresh(order.sale_id)).epoch
    document = msgspec.json.encode(order).decode()
    intent = Intent(
        order_id=order.order_id,
        payment_key=key,
        amount=order.amount,
        currency="KRW",
        idempotency_key="i",
        now_ms=1,
        fence=fence,
        sale_id=order.sale_id,
        epoch=epoch,
        reservation=document,
    )
    await here.service.sql.intents.add(intent)


async def a_lost_sale(here: Bench, key: str = "key-1") -> tuple[str, Reservation, Reservation]:
    """A sale that lost all: one hold is in SQL, and one payment is there only by its intent."""
    sale_id = await here.sale()
    kept = await here.hold(sale_id)
    await here.flush(sale_id)
    paying = await here.hold(sale_id, "bob")
    await intend(here, paying, (await here.claim(paying, key)).fence, key)
    await here.hold(sale_id, "cat")
    await here.service.redis_monitor.check_redis()
    await here.lose(sale_id)
    return sale_id, kept, paying


async def check_rebuilt(here: Bench, sale_id: str, kept: Reservation, paying: Reservation) -> None:
    await here.service.redis_monitor.check_redis()
    found = {
        order.order_id: await here.service.store.read(order.order_id) for order in (kept, paying)
    }
    statuses = {key: order.status if order else None for key, order in found.items()}
    assert statuses == {kept.order_id: Status.HELD, paying.order_id: Status.CONFIRMING}
    await here.flush(sale_id)
    sale = (await here.service.catalog.fresh(sale_id)).sale
    assert sale.items[0].available == 98
    await here.service.sql.intents.mark_ended(paying.order_id, "key-1", 1)
    assert await here.audited(sale_id) == ()
    assert here.alarms == []


async def rebuilt_event(here: Bench, sale_id: str) -> dict[str, Any]:
    """The data of the last event `rebuilt` in SQL."""
    events = await here.service.sql.events.list_after(sale_id, 0, 100)
    return msgspec.json.decode([event for event in events if event.event == "rebuilt"][-1].data)


async def test_a_total_loss_is_rebuilt_and_told(here: Bench) -> None:
    sale_id, kept, paying = await a_lost_sale(here)
    before = metrics.LOST_EVENTS._value.get()
    assert await rebuild(here, sale_id) == 1
    await check_rebuilt(here, sale_id, kept, paying)
    # Two holds and a claim.
    assert metrics.LOST_EVENTS._value.get() - before == 3
    event = await rebuilt_event(here, sale_id)
    assert (event["lostEvents"], event["operator"]) == (3, "automatic")
    assert await here.service.sql.rebuilds.list_unfinished() == {}
    assert await rebuild(here, sale_id) == 0


async def test_events_that_only_redis_has_survive(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    order = await here.hold(sale_id)
    memory = await here.remembered(sale_id)
    await here.hold(sale_id, "bob")
    await here.service.redis_monitor.check_redis()
    await here.put_back(sale_id, memory)
    before = metrics.LOST_EVENTS._value.get()
    assert await rebuild(here, sale_id) == 1
    found = await here.service.store.read(order.order_id)
    assert found is not None
    assert found.status is Status.HELD
    assert metrics.LOST_EVENTS._value.get() - before == 1
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
async def test_a_rebuild_continues_where_a_killed_worker_ended(
    here: Bench, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "SILENT_SECONDS", 0.2)
    sale_id, kept, paying = await a_lost_sale(here)
    settings = here.service.settings
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tests.faults.processes.rebuilding_process", sale_id, point],
        env={k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
        | {
            "RESERVATION_DATA_DIR": str(settings.data_dir),
            "RESERVATION_REDIS_URL": settings.redis_url,
            "RESERVATION_DATABASE_URL": settings.database_url,
        },
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    if point == "rebuild:after_hand_over":
        await here.service.redis_monitor.check_redis()
        assert await rebuild(here, sale_id) == 0
    else:
        await eventually_rebuilt(here, sale_id)
    await check_rebuilt(here, sale_id, kept, paying)
    assert (await rebuilt_event(here, sale_id))["lostEvents"] == 3


async def test_a_rebuild_that_died_after_its_last_step_is_no_part_of_a_later_loss(
    here: Bench,
) -> None:
    sale_id, _, paying = await a_lost_sale(here)

    def fail(_: str) -> None:
        raise ConnectionResetError

    failpoints.arm("rebuild:after_hand_over", fail)
    assert await rebuild(here, sale_id) == 0
    failpoints.disarm()
    await here.service.redis_monitor.check_redis()
    assert here.service.catalog.closed == {}
    assert await here.service.automatic_rebuild.run_once([]) == 0
    assert await here.service.sql.rebuilds.list_unfinished() == {}
    await here.flush(sale_id)
    first = await rebuilt_event(here, sale_id)
    await here.hold(sale_id, "dan")
    await here.service.redis_monitor.check_redis()
    await here.lose(sale_id)
    await eventually_rebuilt(here, sale_id)
    await here.flush(sale_id)
    second = await rebuilt_event(here, sale_id)
    # The first one lost two holds and a claim, the second one a hold.
    assert (first["lostEvents"], second["lostEvents"]) == (3, 1)
    await here.service.sql.intents.mark_ended(paying.order_id, "key-1", 1)
    assert await here.audited(sale_id) == ()


async def test_a_worker_records_the_end_of_an_operators_rebuild_that_died_after_its_last_step(
    here: Bench,
) -> None:
    """Also where only an operator rebuilds: a later loss would continue the rebuild that died."""
    assert here.service.settings.rebuild == "manual"
    sale_id = await here.sale()
    await here.flush(sale_id)
    for buyer in ("ann", "bob"):
        await here.hold(sale_id, buyer)
    await here.service.redis_monitor.check_redis()
    await here.lose(sale_id)

    def fail(_: str) -> None:
        raise ConnectionResetError

    failpoints.arm("rebuild:after_hand_over", fail)
    with pytest.raises(ConnectionResetError):
        await here.service.rebuild.run(sale_id, operator="op")
    failpoints.disarm()
    working = asyncio.create_task(Worker(here.service).run())
    sql = here.service.sql
    async with asyncio.timeout(PATIENCE_SECONDS):
        # The worker also writes the event `rebuilt`.
        while True:
            flushed_seq, _ = await sql.events.cursor(sale_id)
            if flushed_seq == 2 and not await sql.rebuilds.list_unfinished():
                break
            await asyncio.sleep(0.05)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    # The worker may have ended in the middle of a round that reads the sale again.
    await here.eventually_hold(sale_id, refused=SaleRecovering)
    await here.service.redis_monitor.check_redis()
    await here.lose(sale_id)
    assert (await here.service.rebuild.run(sale_id, operator="op")).lost_events == 1


async def test_survivors_reach_sql_after_a_rebuild_that_died_before_them(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    order = await here.hold(sale_id)
    memory = await here.remembered(sale_id)
    await here.hold(sale_id, "bob")
    await here.service.redis_monitor.check_redis()
    await here.put_back(sale_id, memory)

    def fail(_: str) -> None:
        raise ConnectionResetError

    for point in ("rebuild:after_epoch", "rebuild:after_fence"):
        failpoints.arm(point, fail)
        assert await rebuild(here, sale_id) == 0
        failpoints.disarm()
    await eventually_rebuilt(here, sale_id)
    found = await here.service.store.read(order.order_id)
    assert found is not None
    assert found.status is Status.HELD
    assert (await rebuilt_event_after_flush(here, sale_id))["lostEvents"] == 1


async def rebuilt_event_after_flush(here: Bench, sale_id: str) -> dict[str, Any]:
    await here.flush(sale_id)
    return await rebuilt_event(here, sale_id)


async def test_a_running_rebuild_is_not_disturbed(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by another worker, which sees its beat, nor forever if it died."""
    monkeypatch.setattr(automatic, "SILENT_SECONDS", 3.0)
    monkeypatch.setattr("reservation.application.recovery.beats.BEAT_SECONDS", 0.05)
    sale_id, _, _ = await a_lost_sale(here)
    await here.service.redis_monitor.check_redis()
    service = here.service
    goes_on = asyncio.Event()
    reclaim = service.rebuild._reclaim.reclaim

    async def late(*args: Any) -> Any:
        await goes_on.wait()
        return await reclaim(*args)

    monkeypatch.setattr(service.rebuild._reclaim, "reclaim", late)
    by_operator = asyncio.create_task(service.rebuild.run(sale_id, operator="op"))
    while not (await service.sql.rebuilds.list_unfinished()):  # noqa: ASYNC110 - in SQL
        await asyncio.sleep(0.01)
    for _ in range(5):
        assert await service.automatic_rebuild.run_once([sale_id]) == 0
    goes_on.set()
    assert (await by_operator).rebuilt


async def test_two_workers_rebuild_a_sale_once(here: Bench) -> None:
    sale_id, kept, paying = await a_lost_sale(here)
    settings = here.service.settings
    async with bench(
        settings.data_dir, settings.redis_url, RESERVATION_DATABASE_URL=settings.database_url
    ) as other:
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        done = 0
        while not done:
            assert time.monotonic() < give_up_at
            done += sum(await asyncio.gather(rebuild(here, sale_id), rebuild(other, sale_id)))
        assert done == 1
    await check_rebuilt(here, sale_id, kept, paying)


async def test_a_gateway_that_hangs_delays_no_other_lost_sale(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first sale has a payment without an order; the orphan loop gives its money back."""
    lost, _, paying = await a_lost_sale(here)
    async with here.service.sql.database.write() as connection:
        await connection.execute(
            text("UPDATE payment_intents SET reservation = NULL WHERE sale_id = :sale_id"),
            {"sale_id": lost},
        )
    other, *_ = await a_lost_sale(here, key="key-2")
    await here.service.redis_monitor.check_redis()
    asked: list[str] = []

    async def hangs(payment_key: str) -> Answer:
        asked.append(payment_key)
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(here.service.gateway, "look_up", hangs)
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert await here.service.automatic_rebuild.run_once([lost, other]) == 2
    await here.service.redis_monitor.check_redis()
    assert here.service.catalog.closed == {}
    assert await here.service.store.read(paying.order_id) is None
    assert [one.sale_id for one in await here.service.sql.intents.list_unmet(lost)] == [lost]
    assert asked == []


async def test_sales_that_are_open_are_rebuilt_first(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ms = here.service.clock.now_ms()
    minute, day = 60_000, 86_400_000
    ended = await here.sale(opens_at_ms=now_ms - day, closes_at_ms=now_ms - minute)
    unreadable = await here.sale()
    begun = await here.sale()
    later = await here.sale(opens_at_ms=now_ms + minute)
    unflushed = await here.sale()
    sales = [ended, unreadable, begun, later, unflushed]
    for sale_id in sales[:-1]:
        await here.flush(sale_id)
    async with here.service.sql.database.write() as connection:
        await connection.execute(
            text("UPDATE sales SET settings = '{' WHERE sale_id = :sale_id"),
            {"sale_id": unreadable},
        )
    for sale_id in sales:
        await here.lose(sale_id)
    for _ in range(2):
        # A sale without an event in SQL may be one that is being created.
        await here.service.redis_monitor.check_redis()
    run, done = here.service.rebuild.run, []

    async def noted(sale_id: str, **how: Any) -> Any:
        done.append(sale_id)
        return await run(sale_id, **how)

    monkeypatch.setattr(here.service.rebuild, "run", noted)
    with raising(Alarm.REBUILD_UNCERTAIN):
        assert await here.service.automatic_rebuild.run_once(sales) == 4
    assert done == [begun, unflushed, ended, unreadable, later]


async def test_an_outbox_that_contradicts_sql_leaves_the_sale_closed(here: Bench) -> None:
    """SQL has an event of a server that is gone; Redis has another one under its number."""
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.flush(sale_id)
    names = here.service.keys.of(sale_id)
    await here.service.connections.command("HSET", names.sale, "chain", "f" * 16)
    epoch = await here.service.sql.sales.epoch(sale_id)
    with raising(Alarm.REBUILD_UNCERTAIN):
        assert await rebuild(here, sale_id) == 0
    # Not again within a minute, and nothing has changed.
    with raising(Alarm.REBUILD_UNCERTAIN, times=0):
        assert await rebuild(here, sale_id) == 0
    assert await here.service.sql.sales.epoch(sale_id) == epoch
    assert sale_id in here.service.catalog.closed


async def test_an_unreadable_event_in_the_outbox_leaves_the_sale_closed(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the next attempt, when Redis has the epoch of the first one."""
    monkeypatch.setattr(automatic, "UNCERTAIN_SECONDS", 0.0)
    sale_id = await here.sale()
    await here.flush(sale_id)
    await here.hold(sale_id)
    epoch = (await here.service.catalog.fresh(sale_id)).epoch
    outbox = here.service.keys.of(sale_id).outbox
    await here.service.connections.command(
        "XADD",
        outbox,
        "3-0",
        *["event", "prepared", "order", "x", "at", "1", "data", "{", "chain", "f"],
    )
    await here.service.sql.events.add_loss(sale_id, epoch, "for the test", 1)
    for _ in range(2):
        with raising(Alarm.REBUILD_UNCERTAIN):
            assert await rebuild(here, sale_id) == 0
        assert sale_id in here.service.catalog.closed
    # The operator decides for SQL's state, with all events that follow.
    report = await here.service.rebuild.run(sale_id, operator="op")
    assert (report.rebuilt, report.orders) == (True, 1)


async def test_orders_that_exceed_the_total_leave_the_sale_closed(here: Bench) -> None:
    sale_id, _, _ = await a_lost_sale(here)
    async with here.service.sql.database.write() as connection:
        await connection.execute(
            text(
                "UPDATE items SET held = held + 1, available = available - 1"
                " WHERE sale_id = :sale_id"
            ),
            {"sale_id": sale_id},
        )
    with raising(Alarm.REBUILD_UNCERTAIN):
        assert await rebuild(here, sale_id) == 0


async def test_a_rebuild_awaits_the_level_at_which_no_older_flusher_runs(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id, _, _ = await a_lost_sale(here)
    level = LEVEL_OF_0_1_0

    async def level_now() -> int:
        return level

    monkeypatch.setattr(here.service.sql.installation, "level", level_now)
    assert await rebuild(here, sale_id) == 0
    level = LEVEL_OF_AUTOMATIC_REBUILD
    assert await rebuild(here, sale_id) == 1


async def test_a_rebuild_ends_when_another_server_answers(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that is promoted between two writes may lack the first one."""
    sale_id, kept, paying = await a_lost_sale(here)
    service = here.service
    pool = service.connections.pool
    failpoints.arm("rebuild:after_clear", lambda _: pool.follow("another life"))
    real = pool._greet

    async def greet_as_another(connection: Any) -> None:
        await real(connection)
        connection.life = "another life"

    monkeypatch.setattr(pool, "_greet", greet_as_another)
    with pytest.raises(StoreUnavailable, match="the server changed"):
        await service.rebuild.run(sale_id, operator="op")
    monkeypatch.undo()
    failpoints.disarm()
    await eventually_rebuilt(here, sale_id)
    await check_rebuilt(here, sale_id, kept, paying)


async def test_no_rebuild_begins_while_another_process_uses_another_server(here: Bench) -> None:
    """A worker that is cut off with a former master must not take the sale from the others."""
    sale_id, kept, paying = await a_lost_sale(here)
    events, clock = here.service.sql.events, here.service.clock
    epoch = await here.service.sql.sales.epoch(sale_id)
    await events.put_marks("other", run_id="another life", seen={}, now_ms=clock.now_ms())
    assert await rebuild(here, sale_id) == 0
    assert await here.service.sql.sales.epoch(sale_id) == epoch
    # It is silent for longer than a live process would be.
    await events.put_marks("other", run_id="another life", seen={}, now_ms=clock.now_ms() - 60_000)
    await eventually_rebuilt(here, sale_id)
    await check_rebuilt(here, sale_id, kept, paying)


async def test_no_rebuild_begins_while_the_server_does_not_answer(
    tmp_path: Path, own_server: EmbeddedServer
) -> None:
    async with bench(tmp_path / "sql", own_server.url) as here:
        sale_id, kept, paying = await a_lost_sale(here)
        whole = await here.sale()
        await here.service.redis_monitor.check_redis()
        service = here.service
        epochs = await service.sql.sales.epochs()
        own_server.kill()
        await own_server.wait()
        for _ in range(2):
            await service.redis_monitor.check_redis()
            assert await service.automatic_rebuild.run_once([sale_id, whole]) == 0
        assert await service.sql.sales.epochs() == epochs
        assert await service.sql.rebuilds.list_unfinished() == {}
        await own_server.start()
        await eventually_rebuilt(here, sale_id)
        await check_rebuilt(here, sale_id, kept, paying)
        assert await service.sql.sales.epoch(whole) == epochs[whole]
