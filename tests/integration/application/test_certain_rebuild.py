"""An automatic rebuild discards no event that SQL lacks, unless a later one took its place."""

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.application.recovery.automatic import REPAIR_SECONDS
from reservation.application.recovery.repair import NotDrained
from reservation.domain.alarms import Alarm
from reservation.domain.clock import SystemClock
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.payments.shop import raising
from tests.support.in_process import Bench, bench
from tests.support.service import NOT_INHERITED


class StoppedClock(SystemClock):
    """A clock that advances only by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "here", valkey_url) as made:
        yield made


async def rebuild(here: Bench, sale_id: str) -> int:
    """One comparison and one round of a worker."""
    await here.service.redis_monitor.check_redis()
    return await here.service.automatic_rebuild.run_once([sale_id])


async def statuses(here: Bench, *orders: Reservation) -> list[Status | None]:
    found = [await here.service.store.read(order.order_id) for order in orders]
    return [order.status if order else None for order in found]


def copy_of_sql(here: Bench, folder: Path) -> Path:
    """The data directory of a service on a standby, which has the commits up to now."""
    data_dir = Path(here.service.settings.data_dir)
    shutil.copytree(data_dir, folder, ignore=shutil.ignore_patterns("orders.sqlite3*"))
    source = sqlite3.connect(data_dir / "orders.sqlite3")
    target = sqlite3.connect(folder / "orders.sqlite3")
    with target:
        source.backup(target)
    source.close()
    target.close()
    return folder


async def begin_later_epoch(here: Bench, sale_id: str) -> None:
    await here.lose(sale_id)
    assert await rebuild(here, sale_id) == 1
    await here.service.redis_monitor.check_redis()


@pytest.mark.parametrize("trimmed", [True, False])
async def test_newer_data_of_an_epoch_that_sql_forgot_stays(
    here: Bench, tmp_path: Path, valkey_url: str, *, trimmed: bool
) -> None:
    """SQL went back to before a rebuild; Redis has sold since."""
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.flush(sale_id)
    standby = copy_of_sql(here, tmp_path / "standby")
    await begin_later_epoch(here, sale_id)
    sold = await here.hold(sale_id, "bob")
    await here.finish(sold, (await here.claim(sold)).fence)
    if trimmed:
        await here.flush(sale_id)
        seq, _ = await here.service.sql.events.cursor(sale_id)
        await here.service.outbox.trim(sale_id, seq)
    else:
        await here.append_refused(sale_id)
    held = await here.hold(sale_id, "cat")
    await here.service.data_loss.leave()
    before = await here.remembered(sale_id)

    async with bench(standby, valkey_url) as later:
        epoch = await later.service.sql.sales.epoch(sale_id)
        with raising(Alarm.REBUILD_UNCERTAIN):
            assert await rebuild(later, sale_id) == 0
        assert sale_id in later.service.catalog.closed
        assert await statuses(later, sold, held) == [Status.CONFIRMED, Status.HELD]
        if trimmed:
            # Nothing was written.
            assert await later.remembered(sale_id) == before
            assert await later.service.sql.sales.epoch(sale_id) == epoch
        # An operator decides for the state in SQL, and what follows it.
        assert (await later.service.rebuild.run(sale_id, operator="op")).rebuilt
        kept = None if trimmed else Status.CONFIRMED
        assert await statuses(later, sold, held) == [kept, None]


async def test_events_of_an_epoch_that_sql_forgot_are_kept_if_all_follow(
    here: Bench, tmp_path: Path, valkey_url: str
) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.flush(sale_id)
    standby = copy_of_sql(here, tmp_path / "standby")
    await begin_later_epoch(here, sale_id)
    held = await here.hold(sale_id, "bob")
    await here.service.data_loss.leave()
    async with bench(standby, valkey_url) as later:
        assert await rebuild(later, sale_id) == 1
        assert await statuses(later, held) == [Status.HELD]
        await later.flush(sale_id)
        assert await later.audited(sale_id) == ()


@pytest.mark.parametrize("rebuilds", [1, 2])
async def test_a_former_server_is_rebuilt_without_an_operator(here: Bench, rebuilds: int) -> None:
    """SQL has its last event, however many rebuilds there were since."""
    sale_id = await here.sale()
    kept = await here.hold(sale_id)
    await here.flush(sale_id)
    memory = await here.remembered(sale_id)
    for _ in range(rebuilds):
        await begin_later_epoch(here, sale_id)
        await here.flush(sale_id)
    later = await here.hold(sale_id, "bob")
    await here.flush(sale_id)
    await here.put_back(sale_id, memory)
    assert await rebuild(here, sale_id) == 1
    assert await statuses(here, kept, later) == [Status.HELD, Status.HELD]
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_events_of_the_epoch_that_a_rebuild_ended_make_way(here: Bench) -> None:
    """A former master comes back, with events that no replica had when it failed."""
    sale_id = await here.sale()
    kept = await here.hold(sale_id)
    await here.flush(sale_id)
    lost = await here.hold(sale_id, "bob")
    memory = await here.remembered(sale_id)
    await begin_later_epoch(here, sale_id)
    later = await here.hold(sale_id, "cat")
    await here.flush(sale_id)
    await here.put_back(sale_id, memory)
    assert await rebuild(here, sale_id) == 1
    assert await statuses(here, kept, lost, later) == [Status.HELD, None, Status.HELD]
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_orders_whose_events_the_outbox_lost_are_not_discarded(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    held = await here.hold(sale_id)
    epoch = (await here.service.catalog.fresh(sale_id)).epoch
    await here.service.connections.command("DEL", here.service.keys.of(sale_id).outbox)
    await here.service.sql.events.add_loss(sale_id, epoch, "for the test", 1)
    with raising(Alarm.REBUILD_UNCERTAIN):
        assert await rebuild(here, sale_id) == 0
    assert await statuses(here, held) == [Status.HELD]


async def test_a_running_repair_keeps_its_sale(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQL refuses an event: the repair reopens the sale as it was."""
    monkeypatch.setattr(here.service.automatic_rebuild, "_clock", StoppedClock())
    sale_id = await here.sale()
    await here.flush(sale_id)
    await here.append_refused(sale_id)
    held = await here.hold(sale_id)

    async def drain(sale_id: str) -> None:
        await here.flush(sale_id)
        for _ in range(2):
            assert await rebuild(here, sale_id) == 0
        assert sale_id in here.service.catalog.closed

    with pytest.raises(NotDrained):
        await here.service.repair.run(sale_id, operator="kim", drain=drain)
    await here.service.redis_monitor.check_redis()
    assert here.service.catalog.closed == {}
    assert await statuses(here, held) == [Status.HELD]
    await here.hold(sale_id, "bob")


@pytest.mark.parametrize("refused", [False, True])
async def test_a_killed_repair_is_taken_over_after_a_while(
    here: Bench, monkeypatch: pytest.MonkeyPatch, *, refused: bool
) -> None:
    clock = StoppedClock()
    monkeypatch.setattr(here.service.automatic_rebuild, "_clock", clock)
    sale_id = await here.sale()
    await here.flush(sale_id)
    if refused:
        await here.append_refused(sale_id)
    held = await here.hold(sale_id)
    buyer = here.service.keys.of(sale_id).buyer("ann")
    await here.service.connections.command("HINCRBY", buyer, "a", 1)
    settings = here.service.settings
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tests.faults.processes.repairing_process", sale_id],
        env={k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
        | {
            "RESERVATION_DATA_DIR": str(settings.data_dir),
            "RESERVATION_REDIS_URL": settings.redis_url,
        },
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9, done.stderr.decode()
    for seconds in (0.0, REPAIR_SECONDS / 2):
        clock.seconds += seconds
        assert await rebuild(here, sale_id) == 0
    clock.seconds += REPAIR_SECONDS / 2
    if refused:
        with raising(Alarm.REBUILD_UNCERTAIN):
            assert await rebuild(here, sale_id) == 0
    else:
        assert await rebuild(here, sale_id) == 1
    assert await statuses(here, held) == [Status.HELD]
