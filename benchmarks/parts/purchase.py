"""Purchase: paid orders a second, latency of the success page, and CPU time by part."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from benchmarks.support.purchases import Purchases, measure_purchases
from benchmarks.support.run import Run, Section
from benchmarks.support.whole_service import DATABASES, whole_service
from tests.support.databases import running_postgres

__all__ = ["measure"]

_BUYERS: Final = (4, 16, 64, 256)
_BUYERS_QUICK: Final = (4, 16)
_ROUNDS, _ROUNDS_QUICK = 5, 1
# The system counts CPU time in hundredths of a second.
_PAYMENTS, _PAYMENTS_QUICK = 600, 60
#: First payments of a process cost more: statements are built, connections are made.
_WARM_UP, _WARM_UP_QUICK = 100, 5
_STOCK: Final = 100_000
_ROOT: Final = Path(__file__).resolve().parents[2]
_COMMAND: Final = (sys.executable, "-m", "api.cli", "serve")


class Row(msgspec.Struct, frozen=True):
    """All rounds of one database and one number of buyers."""

    database: str
    buyers: int
    rounds: list[Purchases]


def measure(run: Run) -> Section:
    """Each database in turn, each with all numbers of buyers on one running service."""
    buyers = _BUYERS_QUICK if run.quick else _BUYERS
    rows = [Row(database, count, []) for database in DATABASES for count in buyers]
    with ExitStack() as stack:
        postgres = stack.enter_context(running_postgres(fsync="on", full_page_writes="on"))
        for number in range(_ROUNDS_QUICK if run.quick else _ROUNDS):
            for database in DATABASES:
                of_database = [row for row in rows if row.database == database]
                with whole_service(
                    run.home / "purchase",
                    _COMMAND,
                    stock=_STOCK,
                    folder=_ROOT,
                    postgres=postgres if database == "postgresql" else None,
                ) as service:
                    warm_up = _WARM_UP_QUICK if run.quick else _WARM_UP
                    asyncio.run(measure_purchases(service, warm_up, at_once=16))
                    for row in of_database:
                        payments = _PAYMENTS_QUICK if run.quick else _PAYMENTS
                        found = asyncio.run(
                            measure_purchases(service, payments, at_once=row.buyers)
                        )
                        row.rounds.append(found)
                        run.say(
                            f"purchase {number + 1}  {database}, {row.buyers} buyers: "
                            f"{found.per_second:.0f}/s, {found.cost.without_redis / 1e3:.2f} ms CPU"
                        )
    return _section(rows)


def _section(rows: Sequence[Row]) -> Section:
    shown: list[list[str]] = []
    for row in rows:
        costs = [one.cost for one in row.rounds]
        parts = ("api", "worker", "sql", "redis", "sandbox")
        shown.append(
            [
                row.database,
                str(row.buyers),
                f"{median(one.per_second for one in row.rounds):.0f}",
                f"{median(one.p50_ms for one in row.rounds):.0f}",
                f"{median(one.p99_ms for one in row.rounds):.0f}",
                f"{median(cost.without_redis for cost in costs) / 1e3:.2f}",
                *(f"{median(getattr(cost, part) for cost in costs) / 1e3:.2f}" for part in parts),
            ]
        )
    return Section(
        title="Purchases",
        columns=[
            "database",
            "buyers",
            "paid/s",
            "p50 ms",
            "p99 ms",
            "API+worker+SQL ms",
            "API",
            "worker",
            "SQL",
            "Redis",
            "sandbox",
        ],
        rows=shown,
        goals=[],
        data=rows,
        notes=["CPU of one paid order in ms, until SQL has it; medians. All share the machine."],
    )
