"""Comparison of the contenders: each in turn, round after round, under the same load."""

from collections.abc import Callable
from statistics import median
from typing import Final

import msgspec

from benchmarks.contenders.launcher import CONTENDERS, Contender, running
from benchmarks.support.load import Load, Measured
from benchmarks.support.run import Goal, Run, Section

__all__ = ["STOCK", "Round", "Row", "measure", "measure_crowd"]

#: More than any round sells.
STOCK: Final = 10_000_000
#: Connections of a crowd: they keep two full batches of ours in progress.
_CROWD: Final = 256


class Round(msgspec.Struct, frozen=True):
    """One contender, once."""

    measured: Measured
    #: By Redis' own count; 0 for the floor, which has none.
    held: int
    server_us_per_answer: float
    redis_us_per_answer: float


class Row(msgspec.Struct, frozen=True):
    """One contender, by the median of its rounds."""

    name: str
    label: str
    per_second: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    server_us: float
    redis_us: float
    rounds: list[Round]


class Broken(Exception):
    """An invalid round."""


def measure_crowd(run: Run) -> Section:
    """The same with four times the connections."""
    return measure(msgspec.structs.replace(run, connections=_CROWD))


def measure(run: Run) -> Section:
    """Run the rounds, interleaved, so that a busy minute of the machine hits all of them."""
    seconds, warm_up, rounds = (1, 1, 1) if run.quick else (10, 2, 5)
    load = Load(run.buyers)
    wanted = [one for one in CONTENDERS if run.contenders is None or one.name in run.contenders]
    absent = {one.label: reason for one in wanted if (reason := one.missing()) is not None}
    present = [one for one in wanted if one.label not in absent]
    found: dict[str, list[Round]] = {one.name: [] for one in present}
    for number in range(rounds):
        for one in present:
            result = _round(one, load, run, seconds, warm_up)
            found[one.name].append(result)
            rate = result.measured.good_per_second
            run.say(f"round {number + 1}/{rounds}  {one.label:<26} {rate:>9,.0f}/s")
    return _section([_row(one, found[one.name]) for one in present], absent, run.connections)


def _round(one: Contender, load: Load, run: Run, seconds: int, warm_up_seconds: int) -> Round:
    crowd = run.connections
    with running(one, run.home / "compare" / one.name, stock=STOCK) as server:
        load.run(server.url, seconds=warm_up_seconds, connections=crowd)
        held, cpu, valkey = server.held(), server.server_seconds(), server.valkey_seconds()
        measured = load.run(server.url, seconds=seconds, connections=crowd)
        held = server.held() - held
        cpu, valkey = server.server_seconds() - cpu, server.valkey_seconds() - valkey
    _check(one, measured, held, crowd)
    each = 1e6 / max(1, measured.answers)
    return Round(measured, held, cpu * each, valkey * each)


def _check(one: Contender, measured: Measured, held: int, crowd: int) -> None:
    """A rate is valid only if every answer was a hold, and Redis has each hold."""
    if measured.refused or measured.broken or not measured.answers:
        raise Broken(f"{one.label}: {measured}")
    # Requests in flight at the end are held and no longer counted.
    if one.holds and not 0 <= held - measured.answers <= crowd:
        raise Broken(f"{one.label}: {measured.answers} answers, but Redis has {held} new holds")


def _row(one: Contender, rounds: list[Round]) -> Row:
    def middle(value: Callable[[Round], float]) -> float:
        return median(map(value, rounds))

    return Row(
        name=one.name,
        label=one.label,
        per_second=middle(lambda each: each.measured.good_per_second),
        p50_ms=middle(lambda each: each.measured.p50_ms),
        p99_ms=middle(lambda each: each.measured.p99_ms),
        p999_ms=middle(lambda each: each.measured.p999_ms),
        server_us=middle(lambda each: each.server_us_per_answer),
        redis_us=middle(lambda each: each.redis_us_per_answer),
        rounds=rounds,
    )


#: The service's targets, as a ratio to each contender's rate.
_WANTED: Final = {"usual": 3.5, "fastify": 1.2, "nginx": 0.9, "asgi": 0.5}


def _section(rows: list[Row], absent: dict[str, str], crowd: int) -> Section:
    ours = next((row for row in rows if row.name == "ours"), None)
    table: list[list[str]] = []
    goals: list[Goal] = []
    for row in rows:
        ratio = ours.per_second / row.per_second if ours else 0.0
        table.append(
            [
                row.label,
                f"{row.per_second:,.0f}",
                f"{ratio:.2f} x" if ours else "",
                f"{row.p50_ms:.2f}",
                f"{row.p99_ms:.1f}",
                f"{row.p999_ms:.1f}",
                f"{row.server_us:.0f}",
                f"{row.redis_us:.0f}",
            ]
        )
        if ours and row.name in _WANTED:
            wanted = _WANTED[row.name]
            goals.append(
                Goal(
                    f"holds/s to {row.label}, {crowd} connections",
                    f"{ratio:.2f} x",
                    f">= {wanted} x",
                    ratio >= wanted,
                )
            )
    return Section(
        title=f"Holds, {crowd} connections, one process each",
        columns=[
            "",
            "holds/s",
            "ours to it",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "server us",
            "Redis us",
        ],
        rows=table,
        goals=goals,
        data=rows,
        notes=[f"{label}: left out, {reason}." for label, reason in absent.items()],
    )
