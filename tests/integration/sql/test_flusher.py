"""The flusher against a real database, and an in-memory stream with a group and pending entries."""

import asyncio
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from reservation.adapters.sql.event_writer import ApplyOutcome
from reservation.adapters.sql.events import EventRepository
from reservation.adapters.sql.store import SqlStore
from reservation.domain.events import Event
from reservation.workers import flusher as flusher_module
from reservation.workers.flusher import STOPPED_SECONDS, FlushCounts, Flusher
from tests.support.outbox import MemoryOutbox, Tape

#: A flusher that has not finished after these rounds never will.
ROUNDS_MAX = 500


class Died(Exception):
    """The process crashed at this point."""


class Bench:
    """A flusher, its outbox, its store, and its alarms."""

    def __init__(self, sql: SqlStore, outbox: MemoryOutbox) -> None:
        self.sql = sql
        self.outbox = outbox
        self.now = 100.0
        self.alarms: list[tuple[str, dict[str, Any]]] = []
        self.flushed: list[int] = []

    def flusher(self, outbox: Any = None, sql: Any = None) -> Flusher:
        return Flusher(
            outbox or self.outbox,
            sql or self.sql,
            on_alarm=lambda name, **facts: self.alarms.append((name, facts)),
            on_flushed=self.flushed.append,
            monotonic=lambda: self.now,
        )

    async def drain(self, flusher: Flusher, sale_id: str = "s") -> None:
        """Rounds until one finds nothing at all."""
        for _ in range(ROUNDS_MAX):
            self.now += 1
            if await flusher.run_once(sale_id) == FlushCounts():
                return
        pytest.fail("the flusher does not come to an end")


def a_busy_sale(sale_id: str = "s", orders: int = 60) -> Tape:
    tape = Tape(sale_id)
    tape.put(a=1000)
    for number in range(orders):
        tape.sell(f"{sale_id}-{number}", a=1)
    return tape


@pytest.fixture
def tape() -> Tape:
    return a_busy_sale()


@pytest.fixture
async def bench(sql: SqlStore, tape: Tape, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(flusher_module, "BATCH", 10)
    await sql.sales.register("s", "{}", 1)
    return Bench(sql, MemoryOutbox(tape))


async def assert_whole(bench: Bench, tape: Tape) -> None:
    sale_id = tape.sale_id
    assert await bench.sql.events.cursor(sale_id) == (len(tape.events), tape.events[-1].chain)
    assert await bench.sql.events.list_after(sale_id, 0, 10_000) == tape.events
    assert bench.outbox.pending(sale_id) == []
    fold = await bench.sql.sales.counters(sale_id)
    assert fold is not None
    sold = fold.skus["a"].sold
    assert (sold, fold.skus["a"].available) == ((len(tape.events) - 1) // 3, 1000 - sold)


async def test_a_flush_writes_acknowledges_and_trims_all_but_the_last_event(
    bench: Bench, tape: Tape
) -> None:
    await bench.drain(bench.flusher())
    await assert_whole(bench, tape)
    assert sum(bench.flushed) == len(tape.events)
    assert bench.outbox.seqs("s") == [len(tape.events)]
    assert bench.alarms == []


async def test_later_events_are_flushed_by_the_next_round(bench: Bench, tape: Tape) -> None:
    flusher = bench.flusher()
    await bench.drain(flusher)
    before = len(tape.events)
    tape.sell("late", a=1)
    bench.outbox.add(tape.events[before:])
    assert await flusher.run_once("s") == FlushCounts(flushed=3, acknowledged=3)
    await assert_whole(bench, tape)


class FrailOutbox:
    """Crashes at one of its calls, before or after the call took effect."""

    def __init__(self, outbox: MemoryOutbox, chance: random.Random) -> None:
        self._outbox = outbox
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._outbox, name)

        async def frail(*args: Any) -> Any:
            if self._chance.random() < 0.15:
                raise Died
            result = await call(*args)
            if self._chance.random() < 0.15:
                raise Died
            return result

        return frail


class FrailEvents:
    """Likewise for SQL."""

    def __init__(self, events: EventRepository, chance: random.Random) -> None:
        self._events = events
        self._chance = chance

    async def cursor(self, sale_id: str) -> tuple[int, str]:
        return await self._events.cursor(sale_id)

    async def apply(
        self, sale_id: str, events: Sequence[Event], *, epoch: str | None = None
    ) -> ApplyOutcome:
        if self._chance.random() < 0.15:
            raise Died
        outcome = await self._events.apply(sale_id, events, epoch=epoch)
        if self._chance.random() < 0.15:
            raise Died
        return outcome


@pytest.mark.slow
@pytest.mark.parametrize("reborn", [True, False], ids=["another process", "the same one"])
@pytest.mark.parametrize("seed", range(3))
async def test_a_flusher_crash_at_any_point_applies_each_event_once(
    bench: Bench, tape: Tape, seed: int, reborn: bool
) -> None:
    chance = random.Random(seed)

    frail_sql = SimpleNamespace(events=FrailEvents(bench.sql.events, chance))

    def frail() -> Flusher:
        return bench.flusher(FrailOutbox(bench.outbox, chance), frail_sql)

    flusher, deaths = frail(), 0
    for _ in range(ROUNDS_MAX):
        bench.now += 1
        try:
            if await flusher.run_once("s") == FlushCounts():
                break
        except Died:
            deaths += 1
            flusher = frail() if reborn else flusher
    assert deaths > 0
    await bench.drain(bench.flusher())
    await assert_whole(bench, tape)
    assert bench.alarms == []


async def test_concurrent_flushers_do_not_interfere(bench: Bench, tape: Tape) -> None:
    flushers = [bench.flusher(), bench.flusher(), bench.flusher()]
    await asyncio.gather(*(bench.drain(flusher) for flusher in flushers))
    await bench.drain(flushers[0])
    await assert_whole(bench, tape)
    assert sum(bench.flushed) == len(tape.events)
    assert bench.alarms == []


async def test_pending_entries_of_a_dead_flusher_are_claimed(bench: Bench, tape: Tape) -> None:
    living = bench.flusher()
    await living.run_once("s")
    # Another one reads all of the rest, and crashes with it.
    left = await bench.outbox.read_new("s", 10_000)
    assert left
    bench.now += 0.1
    assert await living.run_once("s") == FlushCounts()
    await bench.drain(living)
    await assert_whole(bench, tape)


def has_work(flusher: Flusher, bench: Bench, tape: Tape) -> bool:
    return flusher.has_work("s", seq=len(tape.events), outbox=len(bench.outbox.seqs("s")))


async def test_a_flushed_and_trimmed_sale_has_no_work(bench: Bench, tape: Tape) -> None:
    flusher = bench.flusher()
    assert has_work(flusher, bench, tape)
    await flusher.run_once("s")
    assert has_work(flusher, bench, tape)
    await bench.drain(flusher)
    assert not has_work(flusher, bench, tape)


async def test_events_that_another_flusher_wrote_are_no_work(bench: Bench, tape: Tape) -> None:
    second = bench.flusher()
    await second.run_once("s")
    await bench.drain(bench.flusher())
    assert has_work(second, bench, tape)
    await bench.drain(second)
    assert not has_work(second, bench, tape)


async def test_a_restarted_flusher_has_no_work_in_a_flushed_sale(bench: Bench, tape: Tape) -> None:
    await bench.drain(bench.flusher())
    restarted = bench.flusher()
    restarted.learn(await bench.sql.events.cursors(["s"]))
    assert not has_work(restarted, bench, tape)
    assert restarted.flushed_seq("s") == len(tape.events)


async def test_a_gap_is_filled_from_another_consumers_pending_entries(
    bench: Bench, tape: Tape
) -> None:
    living = bench.flusher()
    await living.run_once("s")
    dead = await bench.outbox.read_new("s", 25)
    assert dead[0].seq == 11
    await bench.drain(living)
    await assert_whole(bench, tape)
    assert bench.alarms == []


@pytest.mark.parametrize("size", [1, 10, 1000])
async def test_a_second_replay_of_the_stream_changes_nothing(
    bench: Bench, tape: Tape, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "BATCH", size)
    await bench.drain(bench.flusher())
    for _ in range(2):
        bench.outbox = MemoryOutbox(tape)
        await bench.outbox.ensure_group("s", 0)
        await bench.drain(bench.flusher())
        await assert_whole(bench, tape)
    assert sum(bench.flushed) == len(tape.events)


async def test_a_lost_group_is_recreated_after_the_events_in_sql(bench: Bench, tape: Tape) -> None:
    flusher = bench.flusher()
    await flusher.run_once("s")
    await flusher.run_once("s")
    bench.outbox.lose_group("s")
    with pytest.raises(ConnectionError):
        await flusher.run_once("s")
    await bench.drain(flusher)
    await assert_whole(bench, tape)


async def test_lost_entries_stop_the_sale_with_an_alarm(bench: Bench, tape: Tape) -> None:
    bench.outbox = MemoryOutbox()
    bench.outbox.add(tape.events[:20] + tape.events[25:])
    flusher = bench.flusher()
    for _ in range(20):
        bench.now += 1
        await flusher.run_once("s")
    assert (await flusher.run_once("s")).stopped
    assert await bench.sql.events.cursor("s") == (20, tape.events[19].chain)
    [(name, facts)] = bench.alarms
    assert (name, facts["sale_id"], facts["seq"]) == ("flush_gap", "s", 21)


def forged(tape: Tape, at: int, **changes: Any) -> list[Event]:
    events = list(tape.events)
    events[at] = msgspec.structs.replace(events[at], **changes)
    return events


async def test_an_edited_entry_stops_its_sale_and_no_other(bench: Bench, tape: Tape) -> None:
    other = a_busy_sale("t")
    await bench.sql.sales.register("t", "{}", 1)
    bench.outbox = MemoryOutbox(other)
    bench.outbox.add(forged(tape, 33, data="{}"))
    flusher = bench.flusher()
    for _ in range(10):
        await flusher.run_once("s")
    await bench.drain(flusher, "t")
    await assert_whole(bench, other)
    assert await bench.sql.events.cursor("s") == (33, tape.events[32].chain)
    [(name, facts)] = bench.alarms
    assert (name, facts["sale_id"], facts["seq"]) == ("flush_broken_chain", "s", 34)
    assert bench.outbox.pending("s")[0] == 34


async def test_an_impossible_event_stops_its_sale(bench: Bench) -> None:
    tape = a_busy_sale(orders=4)
    tape.move("confirmed", "s-1", "RELEASED", "CONFIRMED")
    tape.sell("after", a=1)
    bench.outbox = MemoryOutbox(tape)
    flusher = bench.flusher()
    for _ in range(5):
        await flusher.run_once("s")
    assert (await bench.sql.events.cursor("s"))[0] == 13
    assert [(name, facts["seq"]) for name, facts in bench.alarms] == [("flush_poison", 14)]
    assert bench.outbox.pending("s") == [14, 15, 16, 17]


async def test_a_redis_behind_sql_is_a_conflict_and_sql_keeps_its_rows(
    bench: Bench, tape: Tape
) -> None:
    await bench.drain(bench.flusher())
    rival = a_busy_sale(orders=30)
    rival.sell("another", a=1)
    bench.outbox = MemoryOutbox(rival)
    await bench.outbox.ensure_group("s", 91)
    flusher = bench.flusher()
    await flusher.run_once("s")
    assert (await flusher.run_once("s")).stopped
    assert await bench.sql.events.cursor("s") == (len(tape.events), tape.events[-1].chain)
    assert [(name, facts["seq"]) for name, facts in bench.alarms] == [("flush_conflict", 92)]
    # The evidence stays in Redis.
    assert bench.outbox.pending("s") == [92, 93, 94]
    assert ("trim", len(tape.events)) not in bench.outbox.calls


async def test_the_flush_of_a_repaired_sale_resumes(bench: Bench, tape: Tape) -> None:
    broken = MemoryOutbox()
    broken.add(forged(tape, 33, data="{}"))
    bench.outbox = broken
    flusher = bench.flusher()
    for _ in range(10):
        await flusher.run_once("s")
    bench.now += STOPPED_SECONDS
    assert (await flusher.run_once("s")).stopped
    assert len(bench.alarms) == 2

    broken._entries["s"] = list(tape.events)
    assert (await flusher.run_once("s")).stopped
    bench.now += STOPPED_SECONDS
    await bench.drain(flusher)
    await assert_whole(bench, tape)
    assert len(bench.alarms) == 2


async def test_a_sale_unknown_to_sql_stops_with_an_alarm(bench: Bench) -> None:
    bench.outbox = MemoryOutbox(a_busy_sale("unknown"))
    assert (await bench.flusher().run_once("unknown")).stopped
    assert [name for name, _ in bench.alarms] == ["flush_unknown_sale"]
    assert len(bench.outbox.pending("unknown")) == 10


async def test_trimming_is_batched_and_stays_behind_committed_events(
    bench: Bench, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flusher_module, "TRIM_EVENTS", 50)
    flusher = bench.flusher()
    for _ in range(19):
        await flusher.run_once("s")
        committed = (await bench.sql.events.cursor("s"))[0]
        assert all(below <= committed for _, below in bench.outbox.calls)
    assert [below for _, below in bench.outbox.calls] == [10, 60, 110, 160]
    bench.now += 1
    await flusher.run_once("s")
    assert bench.outbox.calls[-1] == ("trim", len(tape.events))
