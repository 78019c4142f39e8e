"""Beyond this machine: a million buyers in the first second, simulated with costs measured here."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

import msgspec

from benchmarks.beyond.simulation import Costs, Crowd, Fleet, Outcome, simulate
from benchmarks.contenders.launcher import ADMIN_API_KEY, CONTENDERS, Running, running
from benchmarks.parts.compare import STOCK
from benchmarks.support import aof_rewrites
from benchmarks.support.load import Load
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.sale import restock_over_http
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.prepare_queue import BASKETS_MAX

__all__ = ["measure"]

#: Connections of the calibration: batches of 32 baskets, and full batches of 128.
_FEW, _MANY = 64, 256
#: More connections than one process can serve, so that it sheds load.
_TOO_MANY: Final = 4_096
_CHECKED: Final = (16, _FEW, _MANY, 1_000)
#: Virtual seconds of a check.
_CHECK_SECONDS: Final = 3.0
_SYNCS: Final = 100
#: Between two machines of one zone.
_ROUND_TRIP: Final = 0.2e-3
_BUYERS, _BUYERS_QUICK = 1_000_000, 20_000
_STOCKS: Final = (1_000, 100_000)
#: Processes of the API (cores), and partitions, each with a Redis server of its own.
_FLEETS: Final = (
    Fleet(8, 1), Fleet(16, 1), Fleet(32, 1), Fleet(32, 2), Fleet(32, 4), Fleet(64, 4), Fleet(64, 8),
)  # fmt: skip
_FLEETS_QUICK: Final = (Fleet(8, 1), Fleet(8, 2))
#: A larger relative error shows a cost that the simulation does not model.
_ERROR_MAX: Final = 0.25


class Check(msgspec.Struct, frozen=True):
    """Holds a second of one API process and one Redis server, real and simulated."""

    connections: int
    real: float
    simulated: float


class Row(msgspec.Struct, frozen=True):
    """One sale on one fleet."""

    fleet: Fleet
    stock: int
    sold_seconds: float
    ended_seconds: float
    p50_seconds: float
    p99_seconds: float
    shed: int
    #: Share of the cores' time that was busy until the last answer.
    api_busy: float
    redis_busy: float


class Beyond(msgspec.Struct, frozen=True):
    """Costs, checks and predictions."""

    costs: Costs
    checks: list[Check]
    rows: list[Row]


def measure(run: Run) -> Section:
    """Calibrate on a real service, compare the simulation with it, then simulate larger ones."""
    load = Load(run.buyers)
    seconds, rounds = (1, 1) if run.quick else (6, 3)
    found: list[tuple[Costs, dict[int, float]]] = []
    for number in range(rounds):
        found.append(_calibrated(run, load, seconds))
        run.say(f"beyond  calibration {number + 1}/{rounds}: {_shown(found[-1][0])}")
    costs = _median_of([costs for costs, _ in found])
    checks = [
        Check(
            connections=count,
            real=median(rates[count] for _, rates in found),
            simulated=_closed_loop(costs, count),
        )
        for count in _CHECKED
    ]
    buyers, fleets = (_BUYERS_QUICK, _FLEETS_QUICK) if run.quick else (_BUYERS, _FLEETS)
    apart = msgspec.structs.replace(costs, round_trip=_ROUND_TRIP)
    rows: list[Row] = []
    for stock in _STOCKS:
        for fleet in fleets:
            rows.append(_row(apart, fleet, buyers, stock))
            run.say(
                f"beyond  {stock:,} units, {fleet.processes} processes, {fleet.servers} "
                f"partitions: all answered after {rows[-1].ended_seconds:.1f} s"
            )
    return _section(Beyond(costs, checks, rows), buyers)


def _calibrated(run: Run, load: Load, seconds: int) -> tuple[Costs, dict[int, float]]:
    """The measured costs, and the holds a second by number of connections."""
    ours = next(one for one in CONTENDERS if one.name == "ours")
    with running(ours, run.home / "beyond", stock=STOCK) as server:
        load.run(server.url, seconds=1)
        with aof_rewrites.none_meanwhile(server.redis):
            sync = _sync_seconds(server)
            spent = {count: _spent(server, load, seconds, count) for count in _CHECKED}
            crowd = _spent(server, load, seconds, _TOO_MANY)
            left = STOCK - server.held()
            restock_over_http(server.url, ADMIN_API_KEY, -left)
            refused = _spent(server, load, seconds, _MANY)
    rates = {count: one["holds"] / one["seconds"] for count, one in spent.items()}
    few, many = spent[_FEW], spent[_MANY]
    by_few, by_many = (one["redis"] / one["holds"] for one in (few, many))
    # With b per basket and c per call: by_few = b + c/32, by_many = b + c/128.
    call = max(0.0, (by_few - by_many) / (2 / _FEW - 1 / BASKETS_MAX))
    api_hold = many["api"] / many["holds"]
    shed = crowd["answers"] - crowd["holds"]
    api_shed = (crowd["api"] - crowd["holds"] * api_hold) / shed if shed else 0.0
    return Costs(
        api_hold=api_hold,
        api_refusal=refused["api"] / refused["answers"],
        api_shed=max(api_shed, 0.0),
        redis_call=call,
        redis_hold=by_many - call / BASKETS_MAX,
        redis_refusal=max(refused["redis"] / refused["answers"] - call / BASKETS_MAX, 0.0),
        sync=sync,
        round_trip=0.0,
    ), rates


def _spent(server: Running, load: Load, seconds: int, connections: int) -> Mapping[str, float]:
    """Holds, answers, and CPU seconds of the API and of Redis under one load."""
    held, api, redis = server.held(), server.server_seconds(), server.valkey_seconds()
    measured = load.run(server.url, seconds=seconds, connections=connections)
    return {
        "seconds": measured.seconds,
        "answers": measured.answers,
        "holds": server.held() - held,
        "api": server.server_seconds() - api,
        "redis": server.valkey_seconds() - redis,
    }


def _sync_seconds(server: Running) -> float:
    """Seconds of a small synced write, the median; the socket's share of it is small."""
    took: list[float] = []
    for _ in range(_SYNCS):
        began = time.perf_counter()
        server.redis.set(Keys().sync, "1", px=60_000)
        took.append(time.perf_counter() - began)
    return median(took)


def _median_of(found: Sequence[Costs]) -> Costs:
    return Costs(
        **{
            name: median(getattr(costs, name) for costs in found)
            for name in Costs.__struct_fields__
        }
    )


def _closed_loop(costs: Costs, connections: int) -> float:
    """Simulated holds a second in a closed loop with this many connections."""
    crowd = Crowd(buyers=connections, stock=STOCK, replaced_until=_CHECK_SECONDS)
    outcome = simulate(costs, Fleet(1, 1), crowd)
    return outcome.held / outcome.ended_at


def _row(costs: Costs, fleet: Fleet, buyers: int, stock: int) -> Row:
    outcome: Outcome = simulate(
        costs, fleet, Crowd(buyers=buyers, arrival_seconds=1.0, stock=stock)
    )
    return Row(
        fleet=fleet,
        stock=stock,
        sold_seconds=outcome.sold_at,
        ended_seconds=outcome.ended_at,
        p50_seconds=outcome.wait(0.5),
        p99_seconds=outcome.wait(0.99),
        shed=outcome.shed,
        api_busy=outcome.api_busy / outcome.ended_at / fleet.processes,
        redis_busy=outcome.redis_busy / outcome.ended_at / fleet.servers,
    )


def _shown(costs: Costs) -> str:
    values = msgspec.structs.asdict(costs)
    return ", ".join(f"{name} {value * 1e6:.0f}" for name, value in values.items()) + " us"


def _section(found: Beyond, buyers: int) -> Section:
    worst = max(abs(one.simulated / one.real - 1) for one in found.checks)
    checks = ", ".join(
        f"{one.connections} connections {one.real:,.0f} ({one.simulated:,.0f})"
        for one in found.checks
    )
    return Section(
        title=f"Beyond this machine: {buyers:,} buyers within a second, simulated",
        columns=[
            "units", "API processes", "partitions", "sold out after, s", "all answered after, s",
            "wait p50, p99, s", "503 a buyer", "API, Redis busy",
        ],
        rows=[
            [
                f"{row.stock:,}",
                str(row.fleet.processes),
                str(row.fleet.servers),
                f"{row.sold_seconds:.2f}",
                f"{row.ended_seconds:.1f}",
                f"{row.p50_seconds:.2f}, {row.p99_seconds:.1f}",
                f"{row.shed / buyers:.1f}",
                f"{row.api_busy:.0%}, {row.redis_busy:.0%}",
            ]
            for row in found.rows
        ],
        goals=[
            Goal(
                "simulated to real holds/s, worst of the checks",
                f"{worst:.0%} off",
                f"<= {_ERROR_MAX:.0%}",
                worst <= _ERROR_MAX,
            )
        ],
        data=found,
        notes=[
            f"Costs: {_shown(found.costs)}.",
            f"Real holds/s of one process and one server (simulated): {checks}.",
            "Real: both share two cores with the load generator. Simulated: each has its own core.",
        ],
    )  # fmt: skip
