"""Script alone, by batch size: the rate of holds in Redis without any other load.

A rewrite of the append-only file is such a load: the fork, and a copy of each page that is written
while its child works. So its calls are a separate row.
"""

import asyncio
from typing import Final

from benchmarks.support.fill import Filling, ScriptRate
from benchmarks.support.in_process import service_alone
from benchmarks.support.run import Goal, Run, Section

__all__ = ["measure"]

_STOCK: Final = 10_000_000
_BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BATCHES_QUICK: Final = (1, 32, 256)
_HOLDS: Final = 60_000
#: p99.9 needs more than a thousand.
_CALLS: Final = 2_000
#: Limit for a batch of 32, in ms.
_BATCH_OF_GOAL: Final = 32
_P999_MS_MAX: Final = 2.0


def measure(run: Run) -> Section:
    """One batch size after the other on one server, each on a sale that the last one left."""
    return asyncio.run(_measure(run))


async def _measure(run: Run) -> Section:
    async with service_alone(run.home / "script", stock=_STOCK) as (_, valkey):
        rates, beside = await asyncio.to_thread(_rates, run, Filling(valkey.socket_path))
    goal = next(rate for rate in rates if rate.batch == _BATCH_OF_GOAL)
    return Section(
        title="The script alone, by baskets in a call",
        columns=["baskets", "holds/s", "script p50 ms", "p99.9 ms", "longest ms"],
        rows=[
            [
                str(rate.batch),
                f"{rate.holds_per_second:,.0f}",
                f"{rate.p50_ms:.2f}",
                f"{rate.p999_ms:.2f}",
                f"{rate.max_ms:.2f}",
            ]
            for rate in rates
        ]
        + [
            [
                f"{_BATCH_OF_GOAL}, beside a rewrite",
                "",
                f"{beside[len(beside) // 2]:.2f}",
                "",
                f"{beside[-1]:.2f}",
            ]
        ],
        goals=[
            Goal(
                f"script p99.9, {goal.batch} baskets",
                f"{goal.p999_ms:.2f} ms",
                f"<= {_P999_MS_MAX:g} ms",
                goal.p999_ms <= _P999_MS_MAX,
            )
        ],
        data={"rates": rates, "beside_rewrite_ms": beside},
    )


def _rates(run: Run, filling: Filling) -> tuple[list[ScriptRate], list[float]]:
    rates: list[ScriptRate] = []
    for batch in _BATCHES_QUICK if run.quick else _BATCHES:
        holds, calls = (max(500, batch * 4), 50) if run.quick else (_HOLDS, _CALLS)
        rates.append(filling.rate(batch, holds=holds, calls=calls))
        run.say(f"script  {batch:>3} baskets  {rates[-1].holds_per_second:>9,.0f} holds/s")
    beside = filling.beside_rewrite(_BATCH_OF_GOAL)
    filling.close()
    return rates, beside
