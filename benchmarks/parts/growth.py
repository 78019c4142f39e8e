"""Growth: holds a second with a thousand and with a million open holds must be equal.

A hold is three keys, and Redis' table of keys doubles where 7 x 2^n are in it: until all of them
are moved, each command moves a few. Near a million holds that is at 1.22 million, so the loads end
before, and the cost of the rehash is reported separately.
"""

from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from benchmarks.contenders.launcher import CONTENDERS, Running, running
from benchmarks.parts.compare import STOCK
from benchmarks.support import aof_rewrites
from benchmarks.support.fill import Filling, ScriptRate
from benchmarks.support.load import Load, Measured
from benchmarks.support.run import Goal, Run, Section

__all__ = ["measure"]

_FEW: Final = 1_000
#: The large sale's holds before the script and the loads add theirs, to centre them on a million.
_MANY: Final = 830_000
_MANY_QUICK: Final = 18_000
_SHARE_WANTED: Final = 0.85
#: For the script's own rate.
_BATCH: Final = 32
_HOLDS, _CALLS = 40_000, 1_000
_HOLDS_QUICK, _CALLS_QUICK = 2_000, 50
#: For the rehash: its target, and the calls averaged in one figure.
_MOVED: Final = 1_300_000
_MOVED_QUICK: Final = 25_000
_CALLS_A_FIGURE: Final = 250


class Grown(msgspec.Struct, frozen=True):
    """One size of the sale."""

    #: Before the loads and after.
    open_holds: tuple[int, int]
    measured: list[Measured]
    script: ScriptRate


class Moving(msgspec.Struct, frozen=True):
    """The script's time a hold, in microseconds, from the last load until the rehash is done."""

    usual_us: float
    worst_us: float
    #: Holds that took half as long again.
    slow_holds: int


def measure(run: Run) -> Section:
    """The large sale exists all the time; the small one is made anew for each round."""
    seconds, rounds = (1, 1) if run.quick else (3, 5)
    ours = next(one for one in CONTENDERS if one.name == "ours")
    few, many = list[Measured](), list[Measured]()
    few_scripts: list[ScriptRate] = []
    # No buyer of the large sale comes twice. The small ones are others each time.
    few_load, many_load = Load(run.buyers), Load(run.buyers)
    with running(ours, run.home / "growth" / "many", stock=STOCK) as large:
        _fill(large, _MANY_QUICK if run.quick else _MANY)
        # The append-only file has a gigabyte, and doubles during the run.
        with aof_rewrites.none_meanwhile(large.redis):
            many_script = _script(large, run)
            many_load.run(large.url, seconds=1)
            at_first = large.held()
            run.say(f"growth  {at_first:,} holds are open")
            for number in range(rounds):
                measured, script = _few(run.home / "growth" / "few", few_load, seconds, run)
                few.append(measured)
                few_scripts.append(script)
                many.append(many_load.run(large.url, seconds=seconds))
                run.say(
                    f"growth {number + 1}/{rounds}  {few[-1].good_per_second:,.0f}/s with few, "
                    f"{many[-1].good_per_second:,.0f}/s with many"
                )
            grown = Grown((at_first, large.held()), many, many_script)
            moving = _moving(large, _MOVED_QUICK if run.quick else _MOVED)
    middle = sorted(few_scripts, key=lambda rate: rate.holds_per_second)[rounds // 2]
    return _section(Grown((_FEW, _FEW + few[-1].answers), few, middle), grown, moving)


def _few(home: Path, load: Load, seconds: int, run: Run) -> tuple[Measured, ScriptRate]:
    ours = next(one for one in CONTENDERS if one.name == "ours")
    with running(ours, home, stock=STOCK) as small:
        _fill(small, _FEW)
        # Once for the warm-up.
        _script(small, run)
        script = _script(small, run)
        load.run(small.url, seconds=1)
        return load.run(small.url, seconds=seconds), script


def _fill(server: Running, count: int) -> None:
    filling = Filling(server.socket_path)
    # No flusher runs here, and the service stops a sale whose unflushed events are lost.
    filling.hold(count, keep_events=True)
    filling.close()


def _script(server: Running, run: Run) -> ScriptRate:
    filling = Filling(server.socket_path)
    holds, calls = (_HOLDS_QUICK, _CALLS_QUICK) if run.quick else (_HOLDS, _CALLS)
    rate = filling.rate(_BATCH, holds=holds, calls=calls, keep_events=True)
    filling.close()
    return rate


def _moving(server: Running, until: int) -> Moving:
    filling = Filling(server.socket_path)
    calls = max(1, (until - server.held()) // (_CALLS_A_FIGURE * _BATCH)) * _CALLS_A_FIGURE
    times = list(filling.call_times(_BATCH, calls))
    filling.close()
    figures = [times[at : at + _CALLS_A_FIGURE] for at in range(0, calls, _CALLS_A_FIGURE)]
    costs = [sum(figure) / len(figure) / _BATCH for figure in figures]
    slow = sum(cost > 1.5 * median(costs) for cost in costs)
    return Moving(median(costs), max(costs), slow * _CALLS_A_FIGURE * _BATCH)


def _section(few: Grown, many: Grown, moving: Moving) -> Section:
    ratio = median(
        after.good_per_second / before.good_per_second
        for before, after in zip(few.measured, many.measured, strict=True)
    )
    script = many.script.holds_per_second / few.script.holds_per_second
    return Section(
        title="Holds a second by how many are open",
        columns=["open holds", "holds/s", "p99 ms", "script alone/s", "script p99.9 ms"],
        rows=[
            [
                " to ".join(f"{count:,}" for count in size.open_holds),
                f"{median(each.good_per_second for each in size.measured):,.0f}",
                f"{median(each.p99_ms for each in size.measured):.1f}",
                f"{size.script.holds_per_second:,.0f}",
                f"{size.script.p999_ms:.2f}",
            ]
            for size in (few, many)
        ],
        goals=[
            Goal("holds/s, many open to few", f"{ratio:.0%}", ">= 85 %", ratio >= _SHARE_WANTED),
            Goal("script, many open to few", f"{script:.0%}", ">= 85 %", script >= _SHARE_WANTED),
        ],
        data={"few": few, "many": many, "moving": moving},
        notes=[_movement_note(moving)],
    )


def _movement_note(moving: Moving) -> str:
    if not moving.slow_holds:
        # It began while the rounds went on, which a fast machine fills the table with.
        return "Redis moved its table of keys before this was looked for, or did not."
    return (
        f"While Redis moves its table of keys a hold's script takes {moving.worst_us:.0f} us "
        f"instead of {moving.usual_us:.0f}, for about {moving.slow_holds:,} holds."
    )
