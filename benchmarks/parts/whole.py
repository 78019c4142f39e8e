"""The whole service with its worker, and the contenders with and without a write-behind."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Final

import msgspec

from benchmarks.contenders.launcher import (
    ADMIN_API_KEY,
    CONTENDERS,
    Contender,
    Running,
    Variant,
    running,
)
from benchmarks.parts.compare import STOCK, Broken
from benchmarks.support import aof_rewrites
from benchmarks.support.load import Load, Measured
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.sale import SALE_ID, restock_over_http
from benchmarks.support.written import Written

__all__ = ["measure"]

_CROWDS, _CROWDS_QUICK = (64, 256), (64,)
#: Numbers of API processes of this service, besides one.
_WORKERS, _WORKERS_QUICK = (2, 4), (2,)
_SALES, _SALES_QUICK = 1_000, 20

#: The rows that the goals are about.
_WHOLE: Final = "ours+sql"
_ALONE: Final = "ours"
_GIN: Final = "gin"
_GIN_WHOLE: Final = "gin+sql"
_MANY: Final = ", many sales"
#: The least ratio of the first row to the second, in holds a second.
_WANTED: Final = ((_WHOLE, _GIN, 1.0), (_WHOLE, _GIN_WHOLE, 1.5), (_ALONE, _GIN, 1.15))
_SOLD_OUT_WANTED: Final = 2.5


class Subject(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str
    label: str
    contender: Contender
    variant: Variant

    @property
    def sells_out(self) -> bool:
        """Whether sold-out answers are also measured."""
        return self.name == _WHOLE


class Phase(msgspec.Struct, frozen=True):
    """One subject with one number of connections, in one round."""

    measured: Measured
    #: Holds, as counted by Redis.
    held: int
    server_us: float
    redis_us: float
    #: CPU time per hold of the worker and of SQL; 0 without a write-behind.
    behind_us: float
    #: Events that SQL lacked when the load ended.
    backlog: int
    drain_seconds: float
    #: Orders in SQL at the end, earlier phases included; None without a write-behind.
    orders: int | None
    held_in_all: int
    sold_out: Measured | None

    @property
    def through_per_second(self) -> float:
        """Holds a second, counted until SQL had all of them."""
        return self.held / (self.measured.seconds + self.drain_seconds)


class Row(msgspec.Struct, frozen=True):
    """One subject with one number of connections, in all rounds."""

    name: str
    label: str
    connections: int
    phases: list[Phase]

    def middle(self, value: Callable[[Phase], float]) -> float:
        """The median of a value over the rounds."""
        return median(map(value, self.phases))

    def ratio_to(self, other: "Row") -> float:
        """The ratio of its holds a second to those of another row; the median over the rounds."""
        return median(
            one.measured.good_per_second / its.measured.good_per_second
            for one, its in zip(self.phases, other.phases, strict=True)
        )


def measure(run: Run) -> Section:
    """Measure all subjects in interleaved rounds, each with every number of connections."""
    load = Load(run.buyers)
    wanted = [one for one in CONTENDERS if one.holds]
    wanted = [one for one in wanted if run.contenders is None or one.name in run.contenders]
    absent = {one.label: reason for one in wanted if (reason := one.missing()) is not None}
    subjects = list(_subjects([one for one in wanted if one.label not in absent], quick=run.quick))
    rows = {
        (one.name, crowd): Row(one.name, one.label, crowd, [])
        for crowd in _crowds(run)
        for one in subjects
    }
    rounds = 1 if run.quick else 5
    for number in range(rounds):
        for one in subjects:
            for crowd, phase in _phases(one, load, run):
                rows[one.name, crowd].phases.append(phase)
                run.say(
                    f"whole {number + 1}/{rounds}  {one.label:<34} {crowd:>4} "
                    f"{phase.measured.good_per_second:>9,.0f}/s, backlog {phase.backlog:,}"
                )
    return _section(list(rows.values()), absent)


def _crowds(run: Run) -> tuple[int, ...]:
    return _CROWDS_QUICK if run.quick else _CROWDS


def _subjects(contenders: Sequence[Contender], *, quick: bool) -> Iterator[Subject]:
    """Each contender without and with its write-behind, with many sales, and with more processes.

    Args:
        contenders: those that are installed.
        quick: fewer sales and processes.
    """
    sales = _SALES_QUICK if quick else _SALES
    for one in contenders:
        ours = one.name == "ours"
        added = "worker" if ours else "SQL"
        whole = f"{one.name}+sql"
        yield Subject(one.name, one.label, one, Variant())
        yield Subject(whole, f"{one.label} + {added}", one, Variant(write_behind=True))
        if one.many_sales:
            many = Variant(write_behind=True, others=sales - 1)
            yield Subject(f"{whole}{_MANY}", f"    with {sales:,} open sales", one, many)
        for count in (_WORKERS_QUICK if quick else _WORKERS) if ours else ():
            more = Variant(write_behind=True, workers=count)
            yield Subject(f"{whole}, {count} processes", f"    {count} API processes", one, more)


def _phases(one: Subject, load: Load, run: Run) -> Iterator[tuple[int, Phase]]:
    seconds, warm_up_seconds = (1, 1) if run.quick else (10, 2)
    others = one.variant.others
    sale_ids = [SALE_ID, *(f"idle-{number:05d}" for number in range(others))]
    home = run.home / "whole" / one.contender.name
    with running(one.contender, home, stock=STOCK, variant=one.variant) as server:
        written = Written(server.redis, server.database, sale_ids)
        with aof_rewrites.none_meanwhile(server.redis):
            load.run(server.url, seconds=warm_up_seconds, others=others)
            _settle(server, written, one)
            for crowd in _crowds(run):
                phase = _phase(one, load, server, written, seconds=seconds, crowd=crowd)
                yield crowd, phase


def _phase(
    one: Subject, load: Load, server: Running, written: Written, *, seconds: int, crowd: int
) -> Phase:
    behind = one.variant.write_behind
    before, held = _cpu(server), written.held()
    measured = load.run(server.url, seconds=seconds, connections=crowd, others=one.variant.others)
    backlog = written.backlog() if behind else 0
    drain_seconds = _settle(server, written, one)
    held_in_all = written.held()
    held = held_in_all - held
    used = [now - then for now, then in zip(_cpu(server), before, strict=True)]
    _check(one, measured, held, crowd)
    server_us, redis_us, behind_us = (1e6 * seconds / max(1, held) for seconds in used)
    return Phase(
        measured=measured,
        held=held,
        server_us=server_us,
        redis_us=redis_us,
        behind_us=behind_us,
        backlog=backlog,
        drain_seconds=drain_seconds,
        orders=_orders(one, written, held_in_all) if behind else None,
        held_in_all=held_in_all,
        sold_out=_sold_out(load, server, written, seconds, crowd) if one.sells_out else None,
    )


def _settle(server: Running, written: Written, one: Subject) -> float:
    """Wait until no request is in flight and SQL has every event; returns the seconds of SQL."""
    seconds = written.drain() if one.variant.write_behind else 0.0
    server.held()
    if one.variant.write_behind:
        # The events of the requests that were still in flight.
        written.drain()
    return seconds


def _cpu(server: Running) -> tuple[float, float, float]:
    return server.server_seconds(), server.valkey_seconds(), server.behind_seconds()


def _check(one: Subject, measured: Measured, held: int, crowd: int) -> None:
    """A rate is valid only if every answer was a hold, and Redis has each hold."""
    if measured.refused or measured.broken or not measured.answers:
        raise Broken(f"{one.label}: {measured}")
    # Requests in flight at the end of the load are held but not counted as answers.
    if not 0 <= held - measured.answers <= crowd:
        raise Broken(f"{one.label}: {measured.answers} answers, but Redis has {held} new holds")


def _orders(one: Subject, written: Written, held: int) -> int:
    """The number of orders in SQL, after a check that each hold has its order and line."""
    orders, lines = written.orders()
    if not orders == lines == held:
        raise Broken(f"{one.label}: {held} holds, but SQL has {orders} orders and {lines} lines")
    return orders


def _sold_out(load: Load, server: Running, written: Written, seconds: int, crowd: int) -> Measured:
    left = STOCK - written.held()
    restock_over_http(server.url, ADMIN_API_KEY, -left)
    measured = load.run(server.url, seconds=seconds, connections=crowd)
    restock_over_http(server.url, ADMIN_API_KEY, left)
    written.drain()
    return measured


def _section(rows: Sequence[Row], absent: dict[str, str]) -> Section:
    by_name = {(row.name, row.connections): row for row in rows}
    table: list[list[str]] = []
    for row in rows:
        table.append(_shown(row, by_name))
        if any(phase.sold_out for phase in row.phases):
            table.append(_shown_sold_out(row))
    return Section(
        title="The whole service, and contenders with the same write-behind",
        columns=[
            "",
            "conns",
            "a second",
            "ours to it",
            "us: server + Redis + SQL",
            "backlog",
            "in SQL/s",
        ],
        rows=table,
        goals=list(_goals(by_name)),
        data=rows,
        notes=[
            "Ours to it: our row of the same kind (sales, write-behind) divided by this one.",
            "Of many open sales, one gets nine tenths of the requests; the others share the rest.",
            "Backlog: events not in SQL at the end of the load. In SQL/s: until SQL had all.",
            "Sold out: measured after the backlog, with the worker running.",
            *(f"{label}: omitted, {reason}." for label, reason in absent.items()),
        ],
    )


def _shown(row: Row, by_name: dict[tuple[str, int], Row]) -> list[str]:
    written = row.phases[0].orders is not None
    costs: list[Callable[[Phase], float]] = [
        lambda phase: phase.server_us,
        lambda phase: phase.redis_us,
    ]
    if written:
        costs.append(lambda phase: phase.behind_us)
    alike = _ALONE if not written else _WHOLE + _MANY if row.name.endswith(_MANY) else _WHOLE
    ours = by_name.get((alike, row.connections))
    return [
        row.label,
        str(row.connections),
        f"{row.middle(lambda phase: phase.measured.good_per_second):,.0f}",
        f"{ours.ratio_to(row):.2f} x" if ours else "",
        " + ".join(f"{row.middle(value):.0f}" for value in costs),
        f"{row.middle(lambda phase: phase.backlog):,.0f}" if written else "",
        f"{row.middle(lambda phase: phase.through_per_second):,.0f}" if written else "",
    ]


def _shown_sold_out(row: Row) -> list[str]:
    rates = [phase.sold_out.answers_per_second for phase in row.phases if phase.sold_out]
    label, crowd = "    sold out", str(row.connections)
    return [label, crowd, f"{median(rates):,.0f}", "", "", "", ""]


def _goals(by_name: dict[tuple[str, int], Row]) -> Iterator[Goal]:
    for crowd in sorted({crowd for _, crowd in by_name}):
        for name, other, wanted in _WANTED:
            row, its = by_name.get((name, crowd)), by_name.get((other, crowd))
            if row and its:
                label = f"{row.label} to {its.label}, {crowd} connections"
                ratio = row.ratio_to(its)
                yield Goal(label, f"{ratio:.2f} x", f">= {wanted} x", ratio >= wanted)
        if whole := by_name.get((_WHOLE, crowd)):
            ratio = median(
                phase.sold_out.answers_per_second / phase.measured.good_per_second
                for phase in whole.phases
                if phase.sold_out
            )
            yield Goal(
                f"sold-out answers to holds with the worker, {crowd} connections",
                f"{ratio:.2f} x",
                f">= {_SOLD_OUT_WANTED} x",
                ratio >= _SOLD_OUT_WANTED,
            )
