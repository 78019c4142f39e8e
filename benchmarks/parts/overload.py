"""Overload at five times the service's capacity: goodput, refusals, confirms, and recovery.

Twice over. Where the processor is the limit, nothing on the same machine can send five times the
service's rate: the load is as much as the generator can send over thousands of connections. Where
the disk below Redis is the limit, the timetable is kept, and five times the peak does come.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from math import inf
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import msgspec

from benchmarks.parts.compare import STOCK
from benchmarks.support.background_buyers import Answer, BackgroundBuyers, Payment, at_pace
from benchmarks.support.load import Load, Measured
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.slow_disk import ServiceOnDisk, can_slow_disks, service_on_disk

__all__ = ["measure"]

#: Times the peak.
_SURGE: Final = 5
#: Each has one request in progress. As many as the server's queue of new connections holds.
_SURGE_CONNECTIONS: Final = 4_096
#: The background_buyers' prepares and payments a second, during the peak as well.
_PREPARES: Final = 20
_PAYMENTS: Final = 20
#: Goodput is measured after this: the load starts, and the queue fills.
_RAMP_SECONDS: Final = 2
#: Time of observation after the surge.
_AFTER_SECONDS: Final = 7
#: Recovered: this many prepares in a row are as fast as without load.
_WELL_IN_A_ROW: Final = 20
#: Payments whose outcome was unknown at first get this long to be settled.
_SETTLED_SECONDS: Final = 60.0
_SAMPLE_SECONDS: Final = 0.5

_REFUSALS: Final = (429, 503)
_REFUSAL_MS_MAX: Final = 50.0
_GOODPUT_WANTED: Final = 0.9
_CONFIRMED_WANTED: Final = 0.999
_RECOVERY_SECONDS_MAX: Final = 5.0


class Limit(msgspec.Struct, frozen=True):
    """The bottleneck of the peak."""

    name: str
    #: Connections of the peak: as many as it needs.
    connections: int
    #: Limit for a held prepare without a crowd.
    well_ms: float
    #: Added latency of each sync of Redis' file, in seconds.
    sync_delay: float = 0.0
    #: Whether the generator can send the surge: else the latency of a refusal is unknown.
    can_be_sent: bool = False


PROCESSOR: Final = Limit("processor-bound", 256, well_ms=50.0)
#: A network disk on a bad day. A prepare may wait for a sync in progress, and others' writes.
DISK: Final = Limit("disk-bound", 640, well_ms=200.0, sync_delay=0.03, can_be_sent=True)


class Phase(msgspec.Struct, frozen=True):
    """One load, and the measurements during it."""

    #: Holds a second, by Redis' own count.
    sold_per_second: float
    load: Measured
    prepares: list[Answer]
    confirms: list[Answer]
    confirmed: int


class Overload(msgspec.Struct, frozen=True):
    """The peak, the surge, and the peak again."""

    limit: str
    peak: Phase
    surge: Phase
    #: A sale grows and the machine's speed varies, so the surge is compared with both sides of it.
    again: Phase
    #: Seconds from the surge's end; None if it did not recover in time.
    well_after: float | None

    @property
    def goodput(self) -> float:
        """The goodput of the surge, as a share of the peaks around it."""
        peak = (self.peak.sold_per_second + self.again.sold_per_second) / 2
        return self.surge.sold_per_second / peak


def measure(run: Run) -> Section:
    """Rounds on the whole service, with its worker, its sandbox and one API process."""
    limits = [PROCESSOR]
    notes: list[str] = []
    if can_slow_disks():
        limits.append(DISK)
    else:
        notes.append("No slow disk: it is made by a library that needs a C compiler (cc).")
    found = {limit: _rounds(run, limit) for limit in limits}
    return Section(
        title="Overload: the whole service, its worker and sandbox on the same cores",
        columns=[
            "",
            "holds/s",
            "answers/s",
            "late",
            "refused",
            "refusal p50, p99 ms",
            "confirm p99",
        ],
        rows=[row for limit, rounds in found.items() for row in _rows(limit, rounds)],
        goals=[goal for limit, rounds in found.items() for goal in _goals(limit, rounds)],
        data=[one for rounds in found.values() for one in rounds],
        notes=notes,
    )


def _rounds(run: Run, limit: Limit) -> list[Overload]:
    count = 1 if run.quick else 5
    found: list[Overload] = []
    for number in range(count):
        found.append(asyncio.run(_round(run, limit)))
        phases = (found[-1].peak, found[-1].surge, found[-1].again)
        sold = ", ".join(f"{phase.sold_per_second:,.0f}" for phase in phases)
        run.say(f"overload, {limit.name} {number + 1}/{count}  peak, surge, peak {sold} holds/s")
    return found


class Scene:
    """The whole service, the load and the background buyers."""

    def __init__(self, service: ServiceOnDisk, load: Load) -> None:
        self.url = service.url
        self.sold = service.sold
        self.load = load
        self.background_buyers = BackgroundBuyers(service.url)


async def _round(run: Run, limit: Limit) -> Overload:
    warm_up_seconds, seconds, after_seconds = (2, 3, 3) if run.quick else (40, 20, _AFTER_SECONDS)
    async with _scene(run.home / "overload", run.buyers, limit) as scene:
        # The first half minute of a sale is the fastest, because its files and tables are small. It
        # is therefore not a reference for later minutes. For the same reason, all three phases have
        # the same length: a longer phase sells a few per cent less a second.
        await asyncio.to_thread(
            scene.load.run, scene.url, seconds=warm_up_seconds, connections=limit.connections
        )
        peak, _ = await _phase(scene, seconds, connections=limit.connections)
        surge, after = await _phase(
            scene,
            seconds,
            connections=_SURGE_CONNECTIONS,
            rate=_SURGE * peak.sold_per_second,
            after_seconds=after_seconds,
        )
        again, _ = await _phase(scene, seconds, connections=limit.connections)
    return Overload(limit.name, peak, surge, again, _well_after(after, seconds, limit))


@asynccontextmanager
async def _scene(home: Path, buyers: Path, limit: Limit) -> AsyncGenerator[Scene]:
    slowed = limit.sync_delay > 0
    async with service_on_disk(home, stock=STOCK, slowed=slowed) as service:
        if slowed:
            service.delay_syncs(limit.sync_delay)
        scene = Scene(service, Load(buyers))
        try:
            yield scene
        finally:
            await scene.background_buyers.http.aclose()


async def _phase(
    scene: Scene,
    seconds: int,
    *,
    connections: int,
    rate: float | None = None,
    after_seconds: int = 0,
) -> tuple[Phase, list[Answer]]:
    """The phase, and the answers to buyers who prepared after its load had ended."""
    payments = await scene.background_buyers.payments(_PAYMENTS * seconds)
    prepares = [scene.background_buyers.prepare] * (_PREPARES * (seconds + after_seconds))
    comings = [_coming(scene.background_buyers, payment) for payment in payments]
    process = scene.load.start(scene.url, seconds=seconds, connections=connections, rate=rate)
    async with asyncio.TaskGroup() as tasks:
        output = tasks.create_task(asyncio.to_thread(process.communicate))
        probes = tasks.create_task(at_pace(prepares, _PREPARES))
        confirms = tasks.create_task(at_pace(comings, _PAYMENTS))
        await asyncio.sleep(_RAMP_SECONDS)
        counted_at, before = time.perf_counter(), await scene.sold()
        await asyncio.sleep(seconds - _RAMP_SECONDS)
        sold = (await scene.sold() - before) / (time.perf_counter() - counted_at)
    during = [answer for answer in probes.result() if answer.sent_at < seconds]
    confirmed = await _confirmed(scene.background_buyers, payments)
    phase = Phase(sold, scene.load.read(*output.result()), during, confirms.result(), confirmed)
    return phase, probes.result()[len(during) :]


def _coming(
    background_buyers: BackgroundBuyers, payment: Payment
) -> Callable[[], Awaitable[httpx.Response]]:
    return lambda: background_buyers.open_success_url(payment)


async def _confirmed(background_buyers: BackgroundBuyers, payments: Sequence[Payment]) -> int:
    """The number of payments confirmed, once unknown outcomes are settled."""
    left, give_up_at = list(payments), time.perf_counter() + _SETTLED_SECONDS
    while True:
        left = [one for one in left if await background_buyers.status_of(one) != "CONFIRMED"]
        if not left or time.perf_counter() > give_up_at:
            return len(payments) - len(left)
        await asyncio.sleep(_SAMPLE_SECONDS)


def _well_after(probes: Sequence[Answer], ended_at: float, limit: Limit) -> float | None:
    """Seconds from the end of the load to the first of enough good answers in a row."""
    row: list[Answer] = []
    for answer in probes:
        well = answer.status == HTTPStatus.CREATED and answer.ms <= limit.well_ms
        row = [*row, answer] if well else []
        if len(row) == _WELL_IN_A_ROW:
            return row[0].sent_at - ended_at
    return None


def _rows(limit: Limit, found: Sequence[Overload]) -> list[list[str]]:
    return [
        _row(f"{limit.name}, peak", [one.peak for one in found]),
        _row(f"{limit.name}, {_SURGE} times it", [one.surge for one in found]),
        _row(f"{limit.name}, peak again", [one.again for one in found]),
    ]


def _row(name: str, phases: Sequence[Phase]) -> list[str]:
    refused = _refusals(phases)
    half, nearly_all = _quantile(refused, 0.5), _quantile(refused, 0.99)
    return [
        name,
        f"{median(one.sold_per_second for one in phases):,.0f}",
        f"{median(one.load.answers_per_second for one in phases):,.0f}",
        f"{sum(one.load.late for one in phases) / sum(one.load.answers for one in phases):.0%}",
        f"{len(refused)} of {sum(len(one.prepares) for one in phases)}",
        f"{half:,.0f}, {nearly_all:,.0f}" if refused else "",
        f"{median(_p99(one.confirms) for one in phases):,.0f}",
    ]


def _refusals(phases: Sequence[Phase]) -> list[float]:
    """Milliseconds of each, in order."""
    answers = [answer for one in phases for answer in one.prepares]
    return sorted(answer.ms for answer in answers if answer.status in _REFUSALS)


def _goals(limit: Limit, found: Sequence[Overload]) -> list[Goal]:
    share = median(one.goodput for one in found)
    refused = _quantile(_refusals([one.surge for one in found]), 0.99)
    paid = sum(len(one.surge.confirms) for one in found)
    confirmed = sum(one.surge.confirmed for one in found)
    slowest = max(inf if one.well_after is None else one.well_after for one in found)
    refusals = Goal(
        f"a refusal's p99, {limit.name}",
        f"{refused:.0f} ms",
        f"<= {_REFUSAL_MS_MAX:.0f} ms",
        0 < refused <= _REFUSAL_MS_MAX,
    )
    return [
        Goal(f"goodput, {limit.name}", f"{share:.0%}", ">= 90 %", share >= _GOODPUT_WANTED),
        *([refusals] if limit.can_be_sent else []),
        Goal(
            f"confirmed, {limit.name}",
            f"{confirmed} of {paid}",
            ">= 99.9 %",
            paid > 0 and confirmed >= _CONFIRMED_WANTED * paid,
        ),
        Goal(
            f"well again, the slowest, {limit.name}",
            f"{slowest:.1f} s" if slowest < inf else "not in time",
            f"<= {_RECOVERY_SECONDS_MAX:.0f} s",
            slowest <= _RECOVERY_SECONDS_MAX,
        ),
    ]


def _p99(answers: Sequence[Answer]) -> float:
    return _quantile(sorted(answer.ms for answer in answers), 0.99)


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The value at this share; 0 if there is none."""
    return ordered[int(len(ordered) * share)] if ordered else 0.0
