"""Disk: holds a second of two API processes while each sync of Redis' file takes longer."""

import asyncio
import time
from collections.abc import Sequence
from statistics import median
from typing import Final

import msgspec

from benchmarks.parts.compare import STOCK
from benchmarks.support.load import Load, Measured
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.slow_disk import ServiceOnDisk, can_slow_disks, service_on_disk

__all__ = ["measure"]

#: Added to each sync, in milliseconds: a local disk, network disks, and one on a bad day. The real
#: sync comes on top.
_DELAYS_MS: Final = (0.2, 1.0, 3.0, 10.0, 30.0)
_REFERENCE_MS: Final = 0.2
_GOAL_MS: Final = 10.0
_SHARE_WANTED: Final = 0.9
_CONNECTIONS: Final = 1_000
_SETTINGS: Final = {"RESERVATION_WORKERS": "2"}
#: Holds are counted after this: the load starts, and the batches grow.
_RAMP_SECONDS: Final = 2


class Step(msgspec.Struct, frozen=True):
    """The load at one delay."""

    delay_ms: float
    #: By Redis' own count.
    holds_per_second: float
    load: Measured


def measure(run: Run) -> Section:
    """Rounds of all delays on one running service; every second round begins with the longest."""
    title = "Disk: the whole service with two API processes and 1,000 connections"
    if not can_slow_disks():
        note = "Not measured: the slow disk is a library that needs a C compiler (cc)."
        return Section(title=title, columns=[], rows=[], goals=[], data=[], notes=[note])
    rounds = asyncio.run(_rounds(run))
    return Section(
        title=title,
        columns=["sync, ms", "holds/s", "of those at 0.2 ms", "p50, p99 ms"],
        rows=[_row(delay_ms, rounds) for delay_ms in _DELAYS_MS],
        goals=[_goal(rounds)],
        data=[step for steps in rounds for step in steps],
        notes=[],
    )


async def _rounds(run: Run) -> list[list[Step]]:
    count, seconds = (1, 3) if run.quick else (5, 6)
    rounds: list[list[Step]] = []
    async with service_on_disk(
        run.home / "disk", stock=STOCK, slowed=True, environ=_SETTINGS
    ) as service:
        load = Load(run.buyers)
        for number in range(count):
            # A sale's first minute is its fastest.
            delays = _DELAYS_MS if number % 2 else tuple(reversed(_DELAYS_MS))
            rounds.append([await _step(service, load, delay, seconds) for delay in delays])
            shown = ", ".join(
                f"{step.holds_per_second:,.0f} at {step.delay_ms} ms" for step in rounds[-1]
            )
            run.say(f"disk {number + 1}/{count}  holds/s: {shown}")
    return rounds


async def _step(service: ServiceOnDisk, load: Load, delay_ms: float, seconds: int) -> Step:
    service.delay_syncs(delay_ms / 1e3)
    process = load.start(service.url, seconds=seconds, connections=_CONNECTIONS)
    async with asyncio.TaskGroup() as tasks:
        output = tasks.create_task(asyncio.to_thread(process.communicate))
        await asyncio.sleep(_RAMP_SECONDS)
        began, before = time.perf_counter(), await service.sold()
        await asyncio.sleep(seconds - _RAMP_SECONDS)
        sold = (await service.sold() - before) / (time.perf_counter() - began)
    return Step(delay_ms, sold, load.read(*output.result()))


def _share(steps: Sequence[Step], delay_ms: float) -> float:
    """The holds of one round at this delay, as a share of those at the reference."""
    by_delay = {step.delay_ms: step.holds_per_second for step in steps}
    return by_delay[delay_ms] / by_delay[_REFERENCE_MS]


def _row(delay_ms: float, rounds: Sequence[Sequence[Step]]) -> list[str]:
    found = [step for steps in rounds for step in steps if step.delay_ms == delay_ms]
    p50, p99 = (median(getattr(step.load, name) for step in found) for name in ("p50_ms", "p99_ms"))
    return [
        f"{delay_ms:g}",
        f"{median(step.holds_per_second for step in found):,.0f}",
        f"{median(_share(steps, delay_ms) for steps in rounds):.0%}",
        f"{p50:.0f}, {p99:.0f}",
    ]


def _goal(rounds: Sequence[Sequence[Step]]) -> Goal:
    share = median(_share(steps, _GOAL_MS) for steps in rounds)
    return Goal(
        "holds/s at a sync of 10 ms, to 0.2 ms",
        f"{share:.0%}",
        f">= {_SHARE_WANTED:.0%}",
        share >= _SHARE_WANTED,
    )
