"""Rounds of the worker run where work is pending, and idle sales are seldom read."""

import asyncio
from collections.abc import AsyncIterator, Mapping

import msgspec
import pytest

from reservation.adapters.redis.errors import StoreUnavailable
from reservation.adapters.redis.pending_work import PendingWork
from reservation.domain.clock import LAST_MS
from reservation.workers import sale_rounds
from reservation.workers.sale_rounds import (
    LOOK_SECONDS_MAX,
    OVER_LOOK_SECONDS_MAX,
    TICK_SECONDS,
    RoundKind,
    SaleRounds,
)

IDLE = PendingWork(
    seq=1,
    outbox=1,
    deadline_ms=None,
    lease_ms=None,
    deposit_ms=None,
    hold_seconds=300,
    closes_at_ms=LAST_MS,
)
OVERDUE = msgspec.structs.replace(IDLE, deadline_ms=0)


class World:
    """Sales with pending work, and a clock that advances by hand."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self.now = 1_000.0
        self.pending: dict[str, PendingWork] = {}
        self.reads: list[str] = []
        self.full_reads: list[str] = []
        self.away = False
        self.ran: list[str] = []
        #: What the next rounds return; a round without one finds nothing.
        self.results: list[int | Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        kind = RoundKind(name="reaper", once=self._once, is_due=self._is_due, pause=0.5)
        self.rounds = SaleRounds(
            self._read, [kind], server_now_ms=lambda: int(self.now * 1000), ready=self._ready
        )

    async def _ready(self) -> None:
        await self.gate.wait()

    @staticmethod
    def _is_due(_: str, work: PendingWork, now_ms: int) -> bool:
        return work.deadline_ms is not None and work.deadline_ms <= now_ms

    async def _read(self, known: Mapping[str, PendingWork | None]) -> Mapping[str, PendingWork]:
        self.reads += known
        if self.away:
            raise StoreUnavailable("away")
        found: dict[str, PendingWork] = {}
        for sale_id, before in known.items():
            now = self.pending.get(sale_id, IDLE)
            found[sale_id] = now if before is None or before.seq != now.seq else before
            self.full_reads += [sale_id] if found[sale_id] is now and before is not now else []
        return found

    async def _once(self, sale_id: str) -> int:
        self.ran.append(sale_id)
        result = self.results.pop(0) if self.results else 0
        if isinstance(result, Exception):
            raise result
        return result

    async def pass_time(self, seconds: float) -> None:
        """Look in each tick of this time; rounds run in between."""
        for _ in range(round(seconds / TICK_SECONDS)):
            await self.rounds.look(self._group)
            for _ in range(10):
                await asyncio.sleep(0)
            self.now += TICK_SECONDS


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    async with asyncio.TaskGroup() as group:
        made = World(group)
        monkeypatch.setattr(sale_rounds, "_now", lambda: made.now)
        yield made


async def test_a_quiet_sale_is_seldom_read_and_runs_no_round(world: World) -> None:
    world.rounds.add("quiet", lively=False)
    await world.pass_time(10 * LOOK_SECONDS_MAX)
    assert 10 <= len(world.reads) <= 11
    assert world.ran == []


async def test_a_new_sale_is_read_in_each_tick_and_then_less_and_less(world: World) -> None:
    world.rounds.add("new", lively=True)
    reads: list[int] = []
    for _ in range(4):
        world.reads.clear()
        await world.pass_time(2)
        reads.append(len(world.reads))
    assert reads[0] == 20
    assert reads == sorted(reads, reverse=True)
    await world.pass_time(100)
    world.reads.clear()
    await world.pass_time(10 * LOOK_SECONDS_MAX)
    assert len(world.reads) <= 11


async def test_a_sale_that_changed_is_read_in_each_tick_again(world: World) -> None:
    world.rounds.add("sale", lively=False)
    await world.pass_time(TICK_SECONDS)
    world.pending["sale"] = msgspec.structs.replace(IDLE, seq=2)
    await world.pass_time(LOOK_SECONDS_MAX)
    world.reads.clear()
    await world.pass_time(1)
    assert len(world.reads) == 10


async def test_a_round_repeats_while_it_finds_work_and_pauses_after(world: World) -> None:
    world.pending["sale"] = OVERDUE
    world.rounds.add("sale", lively=False)
    world.results = [5, 3, 0]
    await world.pass_time(TICK_SECONDS)
    assert world.ran == ["sale"] * 3
    await world.pass_time(0.4)
    assert len(world.ran) == 3
    await world.pass_time(0.2)
    assert len(world.ran) == 4


async def test_a_deadline_between_two_looks_starts_its_round_in_time(world: World) -> None:
    world.rounds.add("sale", lively=False)
    deadline = world.now + 1.05
    world.pending["sale"] = msgspec.structs.replace(IDLE, deadline_ms=int(deadline * 1000))
    await world.pass_time(1)
    assert world.ran == []
    await world.pass_time(0.2)
    assert world.ran == ["sale"]


async def test_a_hold_shorter_than_the_pause_of_a_quiet_sale_expires_in_time(world: World) -> None:
    """It is taken right after a look."""
    world.pending["sale"] = idle = msgspec.structs.replace(IDLE, hold_seconds=1)
    world.rounds.add("sale", lively=False)
    await world.pass_time(TICK_SECONDS)
    deadline_ms = int((world.now + 1) * 1000)
    world.pending["sale"] = msgspec.structs.replace(idle, seq=2, deadline_ms=deadline_ms)
    await world.pass_time(1 + 2 * TICK_SECONDS)
    assert world.ran == ["sale"]


async def test_a_failed_round_backs_off_and_delays_no_other_sale(world: World) -> None:
    world.pending |= {"broken": OVERDUE, "sound": OVERDUE}
    world.rounds.add("broken", lively=False)
    world.results = [OSError("away"), OSError("away"), OSError("away")]
    await world.pass_time(2.8)
    assert world.ran == ["broken"] * 2  # at once and after 1 s; the next comes 2 s later
    world.rounds.add("sound", lively=False)
    world.results = []
    await world.pass_time(TICK_SECONDS)
    assert world.ran[-1] == "sound"


async def test_a_crashed_round_leaves_the_others_running(world: World) -> None:
    world.pending |= {"broken": OVERDUE, "sound": OVERDUE}
    world.rounds.add("broken", lively=False)
    world.rounds.add("sound", lively=False)
    world.results = [ZeroDivisionError("a bug"), 1]
    await world.pass_time(TICK_SECONDS)
    assert world.ran == ["broken", "sound", "sound"]


async def test_no_round_starts_before_the_server_is_vouched_for(world: World) -> None:
    world.pending["sale"] = OVERDUE
    world.rounds.add("sale", lively=False)
    world.gate.clear()
    await world.pass_time(1)
    assert world.ran == []
    world.gate.set()
    await world.pass_time(TICK_SECONDS)
    assert world.ran == ["sale"]


async def test_a_sale_runs_one_round_of_a_kind_at_a_time(world: World) -> None:
    world.pending["sale"] = OVERDUE
    world.rounds.add("sale", lively=True)
    world.gate.clear()
    await world.pass_time(1)
    world.gate.set()
    await world.pass_time(TICK_SECONDS)
    assert world.ran == ["sale"]


async def test_a_sale_without_an_event_is_read_in_full_only_every_two_minutes(world: World) -> None:
    world.rounds.add("quiet", lively=False)
    await world.pass_time(480)
    assert len(world.reads) >= 100
    assert 4 <= len(world.full_reads) <= 5


async def test_a_sale_that_is_over_is_read_every_twenty_seconds(world: World) -> None:
    world.pending["over"] = msgspec.structs.replace(IDLE, closes_at_ms=0)
    world.rounds.add("over", lively=False)
    await world.pass_time(10 * OVER_LOOK_SECONDS_MAX)
    assert len(world.reads) <= 12


async def test_an_open_account_of_a_sale_that_is_over_is_due_in_time(world: World) -> None:
    world.rounds.add("over", lively=False)
    deadline_ms = int((world.now + 10) * 1000)
    world.pending["over"] = msgspec.structs.replace(IDLE, closes_at_ms=0, deadline_ms=deadline_ms)
    await world.pass_time(10 + 2 * TICK_SECONDS)
    assert world.ran == ["over"]


async def test_sales_that_were_added_together_are_read_apart(world: World) -> None:
    for number in range(100):
        world.rounds.add(f"sale-{number}", lively=False)
    await world.pass_time(2 * LOOK_SECONDS_MAX)
    world.reads.clear()
    await world.pass_time(LOOK_SECONDS_MAX / 4)
    assert 5 <= len(world.reads) <= 50


async def test_a_failed_look_is_repeated(world: World) -> None:
    world.pending["sale"] = OVERDUE
    world.rounds.add("sale", lively=False)
    world.away = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await world.pass_time(TICK_SECONDS)
    assert world.rounds.silent_seconds == float("inf")
    world.away = False
    await world.pass_time(TICK_SECONDS)
    assert world.ran == ["sale"]
    assert world.rounds.silent_seconds < 1


async def test_a_sale_that_left_starts_no_round_and_comes_back(world: World) -> None:
    world.pending["sale"] = OVERDUE
    world.rounds.add("sale", lively=False)
    await world.pass_time(1)
    world.rounds.remove("sale")
    assert "sale" not in world.rounds
    world.ran.clear()
    await world.pass_time(5)
    assert world.ran == []
    world.rounds.add("sale", lively=False)
    await world.pass_time(1)
    assert len(world.ran) >= 1
    world.reads.clear()
    await world.pass_time(1)
    assert len(world.reads) == 10


async def test_a_round_that_always_finds_work_ends_when_its_sale_is_removed(
    world: World,
) -> None:
    world.pending["sale"] = OVERDUE
    world.rounds.add("sale", lively=False)
    world.results = [1] * 100_000
    await world.pass_time(TICK_SECONDS)
    assert world.ran
    world.rounds.remove("sale")
    await world.pass_time(TICK_SECONDS)
    ran = len(world.ran)
    await world.pass_time(1)
    assert len(world.ran) == ran
