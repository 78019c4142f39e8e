"""Compares a commit with HEAD: CPU time of a hold, and CPU time, rate and latency of a purchase.

Each side is a git worktree with its own environment. The whole service runs (API, worker,
sandbox, SQLite or PostgreSQL) with a Valkey, and both sides take turns: a pair is one run of each,
one right after the other, in an order that alternates. A ratio of a pair depends little on how
busy the machine is; the median of many and its confidence interval are the result.
"""

import asyncio
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from benchmarks.support.load import Load
from benchmarks.support.purchases import Cost, Purchases, measure_purchases
from benchmarks.support.run import Run, Section
from benchmarks.support.whole_service import DATABASES, WholeService, whole_service
from tests.support.databases import PostgresServer, running_postgres

__all__ = ["PAIRS", "interval_of_median", "measure"]

#: Pairs of runs: the 95 % interval of the median is then between the fourth and the twelfth.
PAIRS: Final = 15
_PAIRS_QUICK: Final = 2

_STOCK: Final = 2_000_000
_CONFIDENCE: Final = 0.95
_ROOT: Final = Path(__file__).resolve().parents[2]
#: An environment from the lock file, with an empty cache.
_SETUP_SECONDS: Final = 900.0
#: Buyers whose payments are confirmed at the same time.
_BUYERS: Final = (16, 64)


class Plan(msgspec.Struct, frozen=True):
    """The size of one run."""

    pairs: int
    warm_up_seconds: int
    hold_seconds: int
    warm_up_payments: int
    payments: int


class Costs(msgspec.Struct, frozen=True):
    """One run of one side."""

    hold: Cost
    holds: int
    holds_per_second: float
    #: By database and buyers: `sqlite, 16`.
    purchases: dict[str, Purchases]


class Pair(msgspec.Struct, frozen=True):
    """A run of each side, one right after the other."""

    before: Costs
    after: Costs


def measure(run: Run, commit: str) -> Section:
    """Compare HEAD with an earlier commit.

    Args:
        run: this call of the benchmark.
        commit: anything that git takes for a commit.
    """
    plan = Plan(_PAIRS_QUICK, 1, 1, 5, 20) if run.quick else Plan(PAIRS, 2, 4, 100, 500)
    home = run.home / "between"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    notes: list[str] = []
    if _git("status", "--porcelain", "--untracked-files=no"):
        notes.append("The working tree has changes that are not committed; HEAD is without them.")
    before_id, after_id = _commit_id(commit), _commit_id("HEAD")
    load = Load(run.buyers)
    with (
        _checkout(home / "before", before_id, run.say) as before,
        _checkout(home / "after", after_id, run.say) as after,
        running_postgres(fsync="on", full_page_writes="on") as postgres,
    ):
        runner = _Runner(load, run, plan, postgres)
        pairs = [runner.pair((before, after), number) for number in range(plan.pairs)]
    return _section(pairs, before_id, after_id, notes)


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """The distribution-free 95 % confidence interval of a median.

    By the sign test: the k-th smallest and the k-th largest value, where k is the largest for which
    the probability of fewer than k heads in as many fair coin tosses is at most 2.5 %. With too few
    values for that it is the whole range.
    """
    ordered = sorted(values)
    count, rank, below = len(ordered), 0, 0.0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count
        if below > (1 - _CONFIDENCE) / 2:
            break
        rank += 1
    rank = max(rank, 1)
    return ordered[rank - 1], ordered[count - rank]


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _commit_id(commit: str) -> str:
    return _git("rev-parse", "--verify", f"{commit}^{{commit}}")


@contextmanager
def _checkout(folder: Path, commit_id: str, say: Callable[[str], None]) -> Generator[Path]:
    """A worktree with its environment, removed at the end."""
    say(f"between: makes the environment of {commit_id[:10]}")
    _git("worktree", "add", "--detach", "--force", str(folder), commit_id)
    try:
        made = subprocess.run(
            ["make", "setup", f"PYTHON={sys.executable}"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_SETUP_SECONDS,
            check=False,
        )
        if made.returncode:
            raise RuntimeError(f"`make setup` of {commit_id} failed: {made.stderr[-2000:]}")
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


class _Runner:
    """Runs the sides of a pair."""

    def __init__(self, load: Load, run: Run, plan: Plan, postgres: PostgresServer) -> None:
        self._load = load
        self._run = run
        self._plan = plan
        self._postgres = postgres

    def pair(self, sides: tuple[Path, Path], number: int) -> Pair:
        """One run of each side."""
        # Side effects of a run (warm files, a throttled host) hit each side equally often.
        backwards = number % 2 == 1
        costs = [self._costs(folder) for folder in (reversed(sides) if backwards else sides)]
        before, after = reversed(costs) if backwards else costs
        paid = ", ".join(
            f"{before.purchases[name].cost.without_redis / 1e3:.2f} -> "
            f"{after.purchases[name].cost.without_redis / 1e3:.2f} ms ({name})"
            for name in before.purchases
        )
        self._run.say(
            f"between {number + 1}/{self._plan.pairs}  hold {before.hold.total:.0f} -> "
            f"{after.hold.total:.0f} us, paid order {paid}"
        )
        return Pair(before, after)

    def _costs(self, folder: Path) -> Costs:
        plan = self._plan
        command = [str(folder / ".venv" / "bin" / "reservation"), "serve"]
        purchases: dict[str, Purchases] = {}
        hold, holds, seconds = Cost(api=0, worker=0, redis=0, sandbox=0, sql=0), 0, 1.0
        for database in DATABASES:
            postgres = self._postgres if database == "postgresql" else None
            home = self._run.home / "between" / "run"
            with whole_service(
                home, command, stock=_STOCK, folder=folder, postgres=postgres
            ) as service:
                if postgres is None:
                    self._load.run(service.url, seconds=plan.warm_up_seconds)
                    service.drain()
                    holds, hold, seconds = _holds(self._load, service, plan)
                asyncio.run(measure_purchases(service, plan.warm_up_payments, at_once=_BUYERS[0]))
                for at_once in _BUYERS:
                    purchases[f"{database}, {at_once}"] = asyncio.run(
                        measure_purchases(service, plan.payments, at_once=at_once)
                    )
        return Costs(hold, holds, holds / seconds, purchases)


def _holds(load: Load, service: WholeService, plan: Plan) -> tuple[int, Cost, float]:
    """Holds as fast as the answers come, until SQL has the last of them."""
    held, cpu = service.held(), service.cpu()
    measured = load.run(service.url, seconds=plan.hold_seconds)
    if measured.refused or measured.broken or not measured.answers:
        raise RuntimeError(f"not every answer was a hold: {measured}")
    service.drain()
    # Requests in flight at the end were held too.
    holds = service.held() - held
    return holds, Cost(**service.cpu_us_since(cpu, holds)), measured.seconds


def _section(pairs: list[Pair], before_id: str, after_id: str, notes: list[str]) -> Section:
    rows: list[list[str]] = []
    data: dict[str, Any] = {"before": before_id, "after": after_id, "pairs": pairs, "ratios": {}}
    for name, reading, digits in _readings(list(pairs[0].after.purchases)):
        before = [reading(pair.before) for pair in pairs]
        after = [reading(pair.after) for pair in pairs]
        ratios = [new / old for new, old in zip(after, before, strict=True) if old > 0]
        if not ratios:
            continue
        middle, (low, high) = median(ratios), interval_of_median(ratios)
        rows.append(
            [
                name,
                f"{median(before):,.{digits}f}",
                f"{median(after):,.{digits}f}",
                f"{middle:.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
        )
        data["ratios"][name] = {"median": middle, "low": low, "high": high}
    notes.append(
        f"{len(pairs)} pairs; the interval of the median is that of the sign test, at least "
        f"{_CONFIDENCE:.0%}. A hold in microseconds and a purchase in milliseconds of CPU, until "
        "SQL has them; the sandbox and the generator are not in it."
    )
    return Section(
        title=f"Between {before_id[:10]} and {after_id[:10]}",
        columns=["", "before", "after", "after / before", "95 % interval"],
        rows=rows,
        goals=[],
        data=data,
        notes=notes,
    )


_Reading = Callable[[Costs], float]


def _readings(purchases: Sequence[str]) -> list[tuple[str, _Reading, int]]:
    """The rows of the table: a name, its reading and its decimals."""
    readings: list[tuple[str, _Reading, int]] = [
        ("hold, API + worker + Redis", lambda costs: costs.hold.total, 0),
        ("hold, API", lambda costs: costs.hold.api, 0),
        ("hold, worker", lambda costs: costs.hold.worker, 0),
        ("hold, Redis", lambda costs: costs.hold.redis, 0),
    ]
    for name in purchases:
        readings += [
            (f"{label} ({name})", _of(name, reading), digits)
            for label, reading, digits in _OF_PURCHASES
        ]
    return readings


_OF_PURCHASES: Final[tuple[tuple[str, Callable[[Purchases], float], int], ...]] = (
    ("purchase, API + worker + SQL", lambda one: one.cost.without_redis / 1e3, 2),
    ("purchase, API", lambda one: one.cost.api / 1e3, 2),
    ("purchase, worker", lambda one: one.cost.worker / 1e3, 2),
    ("purchase, SQL", lambda one: one.cost.sql / 1e3, 2),
    ("purchase, Redis", lambda one: one.cost.redis / 1e3, 2),
    ("purchases/s", lambda one: one.per_second, 0),
    ("p50 of the success page, ms", lambda one: one.p50_ms, 0),
)


def _of(name: str, reading: Callable[[Purchases], float]) -> _Reading:
    return lambda costs: reading(costs.purchases[name])
