"""Holds a second with a thousand and with a million open holds: what grows must not slow down."""

from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from benchmarks import rewrites
from benchmarks.compare import STOCK
from benchmarks.contenders import CONTENDERS, Running, running
from benchmarks.filling import Filling, ScriptRate
from benchmarks.load import Load, Measured
from benchmarks.run import Goal, Run, Section

__all__ = ["measure"]

_FEW: Final = 1_000
_MANY: Final = 1_000_000
_MANY_QUICK: Final = 20_000
_SHARE_WANTED: Final = 0.85
#: For the script's own rate.
_BATCH: Final = 32
_HOLDS, _CALLS = 60_000, 2_000
_HOLDS_QUICK, _CALLS_QUICK = 2_000, 50


class Grown(msgspec.Struct, frozen=True):
    """One size of the sale."""

    open_holds: int
    measured: list[Measured]
    script: ScriptRate


def measure(run: Run) -> Section:
    """The large sale stands all the time; the small one is made anew for each round."""
    many = _MANY_QUICK if run.quick else _MANY
    seconds, rounds = (1, 1) if run.quick else (6, 5)
    home = run.home / "growth"
    load = Load(run.buyers)
    ours = next(one for one in CONTENDERS if one.name == "ours")
    few_runs: list[Measured] = []
    many_runs: list[Measured] = []
    few_scripts: list[ScriptRate] = []
    with running(ours, home / "many", stock=STOCK) as large:
        _fill(large, many)
        run.say(f"growth  {large.held():,} holds are open")
        load.run(large.url, seconds=1)
        # Its file is a gigabyte long, and grows by as much meanwhile.
        with rewrites.none_meanwhile(large.redis):
            for number in range(rounds):
                few, few_script = _few(home / "few", load, seconds, run)
                few_runs.append(few)
                many_runs.append(load.run(large.url, seconds=seconds))
                run.say(
                    f"growth {number + 1}/{rounds}  {few.good_per_second:,.0f}/s with few, "
                    f"{many_runs[-1].good_per_second:,.0f}/s with many"
                )
                few_scripts.append(few_script)
            many_script = _script(large, run)
    middle = sorted(few_scripts, key=lambda rate: rate.holds_per_second)[rounds // 2]
    return _section(Grown(_FEW, few_runs, middle), Grown(many, many_runs, many_script))


def _few(home: Path, load: Load, seconds: int, run: Run) -> tuple[Measured, ScriptRate]:
    ours = next(one for one in CONTENDERS if one.name == "ours")
    with running(ours, home, stock=STOCK) as small:
        _fill(small, _FEW)
        load.run(small.url, seconds=1)
        measured = load.run(small.url, seconds=seconds)
        return measured, _script(small, run)


def _fill(server: Running, count: int) -> None:
    filling = Filling(server.socket_path)
    # No flusher runs here, and the service stops a sale whose unwritten events are gone.
    filling.hold(count, keep_events=True)
    filling.close()


def _script(server: Running, run: Run) -> ScriptRate:
    filling = Filling(server.socket_path)
    # Once for the warm-up.
    filling.rate(_BATCH, holds=_HOLDS_QUICK, calls=_CALLS_QUICK)
    holds, calls = (_HOLDS_QUICK, _CALLS_QUICK) if run.quick else (_HOLDS, _CALLS)
    rate = filling.rate(_BATCH, holds=holds, calls=calls)
    filling.close()
    return rate


def _section(few: Grown, many: Grown) -> Section:
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
                f"{size.open_holds:,}",
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
        data=[few, many],
    )
