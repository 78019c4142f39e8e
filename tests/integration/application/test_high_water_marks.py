"""High-water marks outlive processes; writes to another server wait until all marks are known."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from reservation.adapters.redis.marks import NO_MARK, Marks
from reservation.adapters.redis.sale_writer import RedisSaleHead
from reservation.adapters.sql.events import MarkRow
from reservation.adapters.sql.sales import SaleHead
from reservation.application.readiness.head_comparison import compare
from reservation.domain.errors import SaleRecovering
from tests.support.in_process import Bench, bench
from tests.support.valkey import MakeServer

HEAD = SaleHead(epoch="e", seq=5, chain="c5")
AHEAD = RedisSaleHead(epoch="e", seq=9, chain="c9", chains={5: "c5", 8: "c8"})


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


def mark(seq: int, chain: str = "", epoch: str = "e") -> MarkRow:
    return MarkRow(epoch=epoch, seq=seq, chain=chain)


@pytest.mark.parametrize(
    ("seen", "gap"),
    [
        (mark(9, "c9"), None),
        (mark(9), None),
        (mark(8, "c8"), None),
        # It has left the outbox: SQL has it, and the next check reads its chain value from there.
        (mark(7, "c7"), None),
        (mark(11, "c11"), "acknowledged event 11 before: 2 events are lost"),
        (mark(11), "2 events are lost"),
        (mark(9, "x"), "event 9 differs"),
        (mark(8, "x"), "event 8 differs"),
        (msgspec.structs.replace(mark(7, "x"), differs=True), "event 7 in SQL differs"),
        (mark(11, "c11", epoch="an earlier one"), None),
    ],
)
def test_a_server_behind_its_marks_has_lost_events(seen: MarkRow, gap: str | None) -> None:
    compared = compare(HEAD, AHEAD, [seen])
    assert compared is None if gap is None else compared is not None and gap in compared


def test_a_mark_rises_within_an_epoch_and_restarts_in_the_next() -> None:
    marks = Marks()
    assert marks.of("s", "e") == NO_MARK
    marks.learn("s", "e", 5, "c5")
    marks.learn("s", "e", 4, "c4")
    marks.learn("s", "e", 5, "")
    assert marks.of("s", "e") == (5, "c5")
    marks.learn("s", "e", 7, "")
    marks.learn("s", "e", 7, "c7")
    assert (marks.of("s", "e"), marks.of("s", "other")) == ((7, "c7"), NO_MARK)
    marks.learn("s", "next", 1, "c1")
    assert (marks.of("s", "e"), marks.of("s", "next")) == (NO_MARK, (1, "c1"))
    assert [one.seq for one in marks.take_unwritten().values()] == [1]
    assert marks.take_unwritten() == {}


async def test_marks_in_sql_show_a_loss_after_all_processes_ended(
    tmp_path: Path, valkey_url: str
) -> None:
    """All processes end before SQL has the events: the marks alone show the loss."""
    async with bench(tmp_path, valkey_url) as first:
        sale_id = await first.sale()
        memory = await first.remembered(sale_id)
        await first.hold(sale_id)
        await first.service.data_loss.write("")
        await first.put_back(sale_id, memory)
    async with bench(tmp_path, valkey_url) as second:
        await second.service.redis_monitor.check_redis()
        assert "1 events are lost" in second.service.redis_monitor.gaps[sale_id]
        with pytest.raises(SaleRecovering):
            await second.hold(sale_id)
        await second.service.rebuild.run(sale_id, operator="op")
        await second.service.redis_monitor.check_redis()
        await second.hold(sale_id)


async def test_a_different_event_at_a_mark_is_a_loss(tmp_path: Path, valkey_url: str) -> None:
    """A process that had not seen the event reused its number, and SQL has the other event."""
    async with bench(tmp_path, valkey_url) as here:
        sale_id = await here.sale()
        memory = await here.remembered(sale_id)
        await here.hold(sale_id)
        await here.put_back(sale_id, memory)
        async with bench(tmp_path, valkey_url) as other:
            await other.hold(sale_id, "ben")
            await other.hold(sale_id, "cid")
            await other.flush(sale_id)
            await other.service.redis_monitor.check_redis()
            assert sale_id not in other.service.redis_monitor.gaps
            await here.service.data_loss.write("")
            await other.service.redis_monitor.check_redis()
            assert sale_id in other.service.redis_monitor.gaps


async def test_a_process_waits_until_others_have_stored_their_marks(
    tmp_path: Path, valkey_url: str
) -> None:
    async with bench(tmp_path, valkey_url) as here, bench(tmp_path, valkey_url) as other:
        here.service.connections.guard()
        await other.service.data_loss.write("the life before")
        await here.service.redis_monitor.check_redis()
        assert not here.service.connections.vouched
        # The other process has detected it: its marks are in SQL, and it writes to no server.
        await other.service.data_loss.write("")
        await here.service.redis_monitor.check_redis()
        assert here.service.connections.vouched


async def test_ended_and_dead_processes_are_not_waited_for(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path, valkey_url) as here:
        async with bench(tmp_path, valkey_url) as ended:
            await ended.service.data_loss.write("the life before")
        assert await here.service.data_loss.writing_elsewhere("this life") == []
        async with bench(tmp_path, valkey_url) as other:
            await other.service.data_loss.write("the life before")
            assert len(await here.service.data_loss.writing_elsewhere("this life")) == 1
            monkeypatch.setattr("reservation.application.readiness.data_loss.LIVE_SECONDS", 0.0)
            await asyncio.sleep(0.005)
            assert await here.service.data_loss.writing_elsewhere("this life") == []


async def test_a_loss_reported_by_one_process_closes_the_sale_in_all(
    tmp_path: Path, valkey_url: str
) -> None:
    async with bench(tmp_path, valkey_url) as here, bench(tmp_path, valkey_url) as other:
        sale_id = await here.sale()
        epoch = (await here.service.catalog.get(sale_id)).epoch
        here.service.data_loss.report(sale_id, epoch, "a test")
        with pytest.raises(SaleRecovering):
            await here.hold(sale_id)
        await here.service.redis_monitor.check_redis()
        assert here.service.redis_monitor.gaps == {sale_id: "a test"}
        await other.service.redis_monitor.check_redis()
        assert other.service.redis_monitor.gaps == {sale_id: "a test"}
        await other.service.rebuild.run(sale_id, operator="op")
        for each in (here, other):
            await each.service.redis_monitor.check_redis()
            assert each.service.redis_monitor.gaps == {}


async def test_a_loss_report_is_kept_until_sql_stores_it(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    epoch = (await here.service.catalog.get(sale_id)).epoch

    async def away(*_: object, **__: object) -> None:
        raise OSError("SQL is away")

    with monkeypatch.context() as patch:
        patch.setattr(here.service.sql.events, "put_marks", away)
        here.service.data_loss.report(sale_id, epoch, "a test")
        await here.service.redis_monitor.check_redis()
        assert sale_id in here.service.redis_monitor.gaps
    await here.service.redis_monitor.check_redis()
    assert await here.service.sql.events.list_losses() == {sale_id: "a test"}


async def test_concurrent_writers_store_a_loss_report_once(
    here: Bench,
) -> None:
    sale_id = await here.sale()
    epoch = (await here.service.catalog.get(sale_id)).epoch
    here.service.data_loss.report(sale_id, epoch, "a test")
    await asyncio.gather(*(here.service.data_loss.write(run_id) for run_id in ("", "", "a life")))
    assert await here.service.sql.events.list_losses() == {sale_id: "a test"}
    assert not here.service.data_loss.is_reported(sale_id)


async def test_a_check_that_times_out_lets_the_write_finish(here: Bench) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    writing = asyncio.create_task(here.service.data_loss.write("a life"))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    # SQLite's single writer is free again, and the mark is there.
    await here.service.data_loss.write("")
    assert [row.seq for row in (await here.service.sql.events.list_unproven_marks())[sale_id]] == [
        2
    ]


async def test_checks_continue_while_marks_cannot_be_written(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reservation.application.readiness.redis_monitor.MARK_SECONDS", 0.01)
    monkeypatch.setattr("reservation.application.readiness.redis_monitor.CHECK_SECONDS", 0.01)
    here.service.connections.guard()
    await here.service.redis_monitor.check_redis()
    broken = 0

    async def broke(_run_id: str) -> None:
        nonlocal broken
        broken += 1
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(here.service.data_loss, "write", broke)
        watching = asyncio.create_task(here.service.redis_monitor.run())
        async with asyncio.timeout(30):
            while broken < 4:  # noqa: ASYNC110 - both loops fail, and continue
                await asyncio.sleep(0.01)
        assert not watching.done()
        watching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await watching


async def test_marks_whose_event_is_in_sql_are_removed(here: Bench) -> None:
    events = here.service.sql.events
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.service.data_loss.write("")
    assert [row.seq for row in (await events.list_unproven_marks())[sale_id]] == [2]
    await events.prune_marks(before_ms=2**50)
    assert sale_id in await events.list_unproven_marks(), "SQL lacks its event"
    await here.flush(sale_id)
    assert sale_id not in await events.list_unproven_marks()


async def test_a_rebuild_saves_events_that_sql_does_not_have(here: Bench) -> None:
    sale_id = await here.sale()
    kept = await here.hold(sale_id)
    memory = await here.remembered(sale_id)
    await here.hold(sale_id, "ben")
    await here.put_back(sale_id, memory)
    await here.service.redis_monitor.check_redis()
    assert sale_id in here.service.redis_monitor.gaps
    await here.service.rebuild.run(sale_id, operator="op")
    assert await here.service.store.read(kept.order_id) is not None


@pytest.mark.parametrize("how", ["its file lost its end", "an older copy was put in its place"])
async def test_a_restart_from_an_older_file_is_detected_without_sql_rows(
    tmp_path: Path, make_server: MakeServer, how: str
) -> None:
    server = make_server("redis")
    await server.start()
    async with bench(tmp_path, server.url) as here:
        here.service.connections.guard()
        await here.service.redis_monitor.check_redis()
        sale_id = await here.sale()
        await here.hold(sale_id)
        file = next((tmp_path / "redis" / "valkey" / "appendonlydir").glob("*.incr.aof"))
        older = file.read_bytes()
        await here.hold(sale_id)
        await server.stop(grace_seconds=0)
        if how == "its file lost its end":
            # Valkey drops an incomplete command, and starts (`aof-load-truncated`).
            file.write_bytes(file.read_bytes()[:-1])
        else:
            file.write_bytes(older)
        await server.start()
        await here.service.redis_monitor.check_redis()
        assert "acknowledged event 3 before" in here.service.redis_monitor.gaps[sale_id]
        with pytest.raises(SaleRecovering):
            await here.hold(sale_id)
        await here.service.rebuild.run(sale_id, operator="op")
        await here.service.redis_monitor.check_redis()
        await here.hold(sale_id)
