"""Compares the CPU time of a hold and of a paid order between a commit and HEAD.

Each side is a git worktree with its own environment. The whole service runs (API, worker,
sandbox, SQLite) with a Valkey, and both sides take turns: a pair is one run of each, one
right after the other, in an order that alternates. A ratio of a pair depends little on how busy
the machine is; the median of many and its confidence interval are the result.
"""

import asyncio
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import psutil
import redis

from benchmarks.contenders.launcher import ADMIN_API_KEY, free_port, own_environ, served
from benchmarks.support import sale
from benchmarks.support.background_buyers import BackgroundBuyers, Payment
from benchmarks.support.cpu import PARTS, ServiceCpu
from benchmarks.support.load import Load
from benchmarks.support.run import Run, Section
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.keys import Keys

__all__ = ["PAIRS", "interval_of_median", "measure"]

#: Pairs of runs: the 95 % interval of the median is then between the fourth and the twelfth.
PAIRS: Final = 15
_PAIRS_QUICK: Final = 2

_STOCK: Final = 2_000_000
_CONFIDENCE: Final = 0.95
_ROOT: Final = Path(__file__).resolve().parents[2]
#: An environment from the lock file, with an empty cache.
_SETUP_SECONDS: Final = 900.0
#: After a load of some seconds; the flusher of an early commit writes 4,000 events a second.
_DRAIN_SECONDS: Final = 120.0
_DRAIN_POLL_SECONDS: Final = 0.1
#: Concurrent confirms.
_BUYERS_AT_ONCE: Final = 16
_OK: Final = 200
#: Tries of one confirm that is answered "still in progress".
_CONFIRM_TRIES: Final = 50
_CONFIRM_PAUSE_SECONDS: Final = 0.2


class Plan(msgspec.Struct, frozen=True):
    """The size of one run."""

    pairs: int
    warm_up_seconds: int
    hold_seconds: int
    payments: int


class Cost(msgspec.Struct, frozen=True):
    """CPU microseconds of one operation, by part."""

    api: float
    worker: float
    redis: float

    @property
    def total(self) -> float:
        return self.api + self.worker + self.redis


class Costs(msgspec.Struct, frozen=True):
    """One run of one side."""

    hold: Cost
    paid_order: Cost
    holds: int
    holds_per_second: float
    paid_orders_per_second: float


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
    plan = Plan(_PAIRS_QUICK, 1, 1, 20) if run.quick else Plan(PAIRS, 2, 4, 500)
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
    ):
        pairs = [_pair(load, run, plan, (before, after), number) for number in range(plan.pairs)]
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


def _pair(load: Load, run: Run, plan: Plan, sides: tuple[Path, Path], number: int) -> Pair:
    # Side effects of a run (warm files, a throttled host) hit each side equally often.
    backwards = number % 2 == 1
    costs = [
        _run_of(load, run, plan, folder) for folder in (reversed(sides) if backwards else sides)
    ]
    before, after = reversed(costs) if backwards else costs
    run.say(
        f"between {number + 1}/{plan.pairs}  hold {before.hold.total:.0f} -> "
        f"{after.hold.total:.0f} us, paid order {before.paid_order.total / 1e3:.2f} -> "
        f"{after.paid_order.total / 1e3:.2f} ms"
    )
    return Pair(before, after)


def _run_of(load: Load, run: Run, plan: Plan, folder: Path) -> Costs:
    home = run.home / "between" / "run"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    valkey = EmbeddedServer(home / "redis")
    asyncio.run(valkey.start())
    try:
        port = free_port()
        environ = own_environ(home / "service", port) | {"RESERVATION_REDIS_URL": valkey.url}
        command = [str(folder / ".venv" / "bin" / "reservation"), "serve"]
        with (
            served(command, environ, home, port, folder=folder) as process,
            redis.Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as client,
        ):
            url = f"http://127.0.0.1:{port}"
            sale.put_over_http(url, ADMIN_API_KEY, _STOCK)
            load.run(url, seconds=plan.warm_up_seconds)
            _drain(client)
            side = _Side(url, psutil.Process(process.pid), valkey, client)
            holds, hold, seconds = _holds(load, side, plan)
            paid_order, rate = asyncio.run(_payments(side, plan))
    finally:
        asyncio.run(valkey.stop())
        shutil.rmtree(home, ignore_errors=True)
    return Costs(hold, paid_order, holds, holds / seconds, rate)


class _Side:
    """A running service, and the CPU time of its parts."""

    def __init__(
        self,
        url: str,
        supervisor: psutil.Process,
        valkey: EmbeddedServer,
        client: "redis.Redis",
    ) -> None:
        self.url = url
        self.client = client
        self._cpu = ServiceCpu(supervisor, valkey)

    def cpu(self) -> Mapping[str, float]:
        """Seconds of CPU time by part."""
        return self._cpu.seconds()

    def cost_since(self, before: Mapping[str, float], operations: int) -> Cost:
        """CPU microseconds of one operation since an earlier reading."""
        now = self.cpu()
        return Cost(**{role: (now[role] - before[role]) / operations * 1e6 for role in PARTS})


def _holds(load: Load, side: _Side, plan: Plan) -> tuple[int, Cost, float]:
    """Holds as fast as the answers come, until SQL has the last of them."""
    held, cpu = _held(side.client), side.cpu()
    measured = load.run(side.url, seconds=plan.hold_seconds)
    if measured.refused or measured.broken or not measured.answers:
        raise RuntimeError(f"not every answer was a hold: {measured}")
    _drain(side.client)
    # Requests in flight at the end were held too.
    holds = _held(side.client) - held
    return holds, side.cost_since(cpu, holds), measured.seconds


def _held(client: "redis.Redis") -> int:
    return int(str(client.hget(Keys().of(sale.SALE_ID).stock(sale.SKU), "held") or 0))


def _drain(client: "redis.Redis") -> None:
    """Wait until SQL has every event of the sale."""
    give_up_at = time.monotonic() + _DRAIN_SECONDS
    outbox = Keys().of(sale.SALE_ID).outbox
    while time.monotonic() < give_up_at:
        last = client.xinfo_stream(outbox)["last-generated-id"]
        groups: Any = client.xinfo_groups(outbox)
        if all(group["pending"] == 0 and group["last-delivered-id"] == last for group in groups):
            return
        time.sleep(_DRAIN_POLL_SECONDS)
    raise RuntimeError("the worker did not write the sale's events to SQL in time")


async def _payments(side: _Side, plan: Plan) -> tuple[Cost, float]:
    """Buyers returning from the payment page; their holds are made before the clock runs."""
    buyers = BackgroundBuyers(side.url)
    try:
        payments = await buyers.payments(plan.payments)
        await asyncio.to_thread(_drain, side.client)
        cpu, began = side.cpu(), time.perf_counter()
        slots = asyncio.Semaphore(_BUYERS_AT_ONCE)
        await asyncio.gather(*(_confirm(buyers, payment, slots) for payment in payments))
        seconds = time.perf_counter() - began
        await asyncio.to_thread(_drain, side.client)
        return side.cost_since(cpu, plan.payments), plan.payments / seconds
    finally:
        await buyers.http.aclose()


async def _confirm(buyers: BackgroundBuyers, payment: Payment, slots: asyncio.Semaphore) -> None:
    last = ""
    async with slots:
        for _ in range(_CONFIRM_TRIES):
            answer = await buyers.open_success_url(payment)
            if answer.status_code == _OK and answer.json()["status"] == "CONFIRMED":
                return
            last = f"{answer.status_code} {answer.text}"
            await asyncio.sleep(_CONFIRM_PAUSE_SECONDS)
    raise RuntimeError(f"an order was not paid: {last}")


def _section(pairs: list[Pair], before_id: str, after_id: str, notes: list[str]) -> Section:
    operations: dict[str, Callable[[Costs], Cost]] = {
        "hold": lambda costs: costs.hold,
        "paid order": lambda costs: costs.paid_order,
    }
    readings: dict[str, Callable[[Cost], float]] = {
        "API + worker + Redis": lambda cost: cost.total,
        "API": lambda cost: cost.api,
        "worker": lambda cost: cost.worker,
        "Redis": lambda cost: cost.redis,
    }
    rows: list[list[str]] = []
    data: dict[str, Any] = {"before": before_id, "after": after_id, "pairs": pairs, "ratios": {}}
    for operation, cost_of in operations.items():
        for name, reading in readings.items():
            before = [reading(cost_of(pair.before)) for pair in pairs]
            after = [reading(cost_of(pair.after)) for pair in pairs]
            ratios = [new / old for new, old in zip(after, before, strict=True) if old > 0]
            if not ratios:
                continue
            middle, (low, high) = median(ratios), interval_of_median(ratios)
            rows.append(
                [
                    f"{operation}, {name}",
                    f"{median(before):,.0f}",
                    f"{median(after):,.0f}",
                    f"{middle:.3f}",
                    f"{low:.3f} to {high:.3f}",
                ]
            )
            data["ratios"][f"{operation}, {name}"] = {"median": middle, "low": low, "high": high}
    notes.append(
        f"{len(pairs)} pairs; the interval of the median is that of the sign test, at least "
        f"{_CONFIDENCE:.0%}. Holds until SQL has them; the sandbox and the generator are not in it."
    )
    return Section(
        title=f"CPU time between {before_id[:10]} and {after_id[:10]}",
        columns=["", "before us", "after us", "after / before", "95 % interval"],
        rows=rows,
        goals=[],
        data=data,
        notes=notes,
    )
