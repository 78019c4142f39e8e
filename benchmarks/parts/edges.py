"""Sold out and half load: the rate of refusals, and the latency at half the peak."""

from statistics import median
from typing import Final

import msgspec

from benchmarks.contenders.launcher import ADMIN_API_KEY, CONTENDERS, Running, running
from benchmarks.parts.compare import STOCK
from benchmarks.support import aof_rewrites
from benchmarks.support.load import Load, Measured
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.sale import restock_over_http

__all__ = ["measure"]

#: With a timetable: far more than are busy at once, so that a slow answer delays no other request.
_FREE_CONNECTIONS: Final = 256

#: The share of requests that the generator may send late before its latency means little.
_LATE_SHARE_MAX: Final = 0.01


class Edge(msgspec.Struct, frozen=True):
    """One round on one service: the peak, all sold, and with stock again half of the peak."""

    peak: Measured
    sold_out: Measured
    half: Measured
    #: The same again, with a rewrite of Redis' file in it.
    half_with_rewrite: Measured


def measure(run: Run) -> Section:
    """Measure the three in rounds, one after the other, each on a new service."""
    seconds, rounds = (1, 1) if run.quick else (10, 5)
    load = Load(run.buyers)
    edges: list[Edge] = []
    for number in range(rounds):
        edges.append(_round(load, run, seconds))
        last = edges[-1]
        run.say(
            f"edges {number + 1}/{rounds}  peak {last.peak.good_per_second:,.0f}/s, sold out "
            f"{last.sold_out.answers_per_second:,.0f}/s, half p99 {last.half.p99_ms:.1f} ms"
        )
    return _section(edges, run.connections)


def _round(load: Load, run: Run, seconds: int) -> Edge:
    ours = next(one for one in CONTENDERS if one.name == "ours")
    warm_up = 1 if run.quick else 2
    with running(ours, run.home / "edges", stock=STOCK) as server:
        load.run(server.url, seconds=warm_up)
        with aof_rewrites.none_meanwhile(server.redis):
            # Side by side: a service that has sold for half a minute more remembers more buyers,
            # and its Redis has more keys. That is not the price of being sold out.
            peak = load.run(server.url, seconds=seconds, connections=run.connections)
            left = STOCK - server.held()
            restock_over_http(server.url, ADMIN_API_KEY, -left)
            sold_out = load.run(server.url, seconds=seconds, connections=run.connections)
            restock_over_http(server.url, ADMIN_API_KEY, left)
            half = _at(peak.good_per_second / 2, load, server, seconds)
        aof_rewrites.begin(server.redis)
        half_with_rewrite = _at(peak.good_per_second / 2, load, server, seconds)
        aof_rewrites.wait(server.redis)
    return Edge(peak, sold_out, half, half_with_rewrite)


def _at(rate: float, load: Load, server: Running, seconds: int) -> Measured:
    return load.run(server.url, seconds=seconds, connections=_FREE_CONNECTIONS, rate=rate)


def _section(edges: list[Edge], crowd: int) -> Section:
    ratio = median(edge.sold_out.answers_per_second / edge.peak.good_per_second for edge in edges)
    p99 = median(edge.half.p99_ms for edge in edges)
    late = median(edge.half.late / max(1, edge.half.answers) for edge in edges)
    rows = [
        _row(f"holds, {crowd} connections", [edge.peak for edge in edges]),
        _row("sold out, as many", [edge.sold_out for edge in edges]),
        _row("holds at half the peak", [edge.half for edge in edges]),
        _row("with a rewrite of Redis' file", [edge.half_with_rewrite for edge in edges]),
    ]
    notes = [f"At half the peak {late:.1%} of the requests left late."]
    if late > _LATE_SHARE_MAX:
        notes.append("That is too many: the true latency is higher than what is shown.")
    return Section(
        title="Sold out, and half the peak",
        columns=["", "answers/s", "p50 ms", "p99 ms", "p99.9 ms"],
        rows=rows,
        goals=[
            Goal("sold-out answers to holds", f"{ratio:.2f} x", ">= 1.3 x", ratio >= 1.3),
            Goal("p99 at half the peak", f"{p99:.1f} ms", "<= 10 ms", p99 <= 10),
        ],
        data=edges,
        notes=notes,
    )


def _row(name: str, measured: list[Measured]) -> list[str]:
    return [
        name,
        f"{median(each.answers_per_second for each in measured):,.0f}",
        f"{median(each.p50_ms for each in measured):.2f}",
        f"{median(each.p99_ms for each in measured):.1f}",
        f"{median(each.p999_ms for each in measured):.1f}",
    ]
