"""Idle sales: their CPU time, the start and the list of sales, and the flush of a busy sale."""

import asyncio
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import msgspec
import psutil

from benchmarks.contenders.launcher import free_port, own_environ, served
from benchmarks.support.cpu import PARTS, ServiceCpu
from benchmarks.support.fill import Filling
from benchmarks.support.many_sales import fill
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.sale import SALE_ID
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.bootstrap import opened
from reservation.config.settings import Settings

__all__ = ["measure"]

_COUNTS, _COUNTS_QUICK = (1, 100, 1_000, 10_000), (1, 5, 10, 20)
#: Of the service without a request, after its start has settled.
_IDLE_SECONDS, _IDLE_SECONDS_QUICK = 20.0, 1.0
_SETTLE_SECONDS, _SETTLE_SECONDS_QUICK = 10.0, 1.0
_HOT_SECONDS, _HOT_SECONDS_QUICK = 4.0, 0.5
_LISTS, _LISTS_QUICK = 200, 5
#: Between two lists: a snapshot is a second old at most, so several of them are read anew.
_LIST_PAUSE_SECONDS: Final = 0.05
_STOCK: Final = 50_000_000
_FLUSH_SECONDS_MAX: Final = 300.0
#: Percent of a core with 1,000 idle sales in release 0.1.0, worker and Redis.
_RELEASE_PERCENT: Final = 44.0


class Idle(msgspec.Struct, frozen=True):
    """The service with this many sales."""

    sales: int
    #: Percent of a core, by part, without any request.
    cpu: dict[str, float]
    start_seconds: float
    #: Of `GET /v1/sales`.
    list_ms: float
    list_p99_ms: float
    #: Events of one busy sale into SQL, in a second.
    flushed_per_second: float

    @property
    def percent(self) -> float:
        """All parts."""
        return sum(self.cpu.values())


def measure(run: Run) -> Section:
    """One installation that gets more and more sales; its service starts anew for each count."""
    home = run.home / "sales"
    shutil.rmtree(home, ignore_errors=True)
    (home / "service").mkdir(parents=True)
    valkey = EmbeddedServer(home / "redis")
    asyncio.run(valkey.start())
    found: list[Idle] = []
    try:
        for count in _COUNTS_QUICK if run.quick else _COUNTS:
            found.append(_measured(run, home, valkey, count))
            run.say(f"sales  {count:,}: {found[-1].percent:.2f} % of a core")
    finally:
        asyncio.run(valkey.stop())
        shutil.rmtree(home, ignore_errors=True)
    return _section(found)


def _measured(run: Run, home: Path, valkey: EmbeddedServer, count: int) -> Idle:
    port = free_port()
    environ = own_environ(home / "service", port) | {"RESERVATION_REDIS_URL": valkey.url}
    asyncio.run(fill(Settings.load(environ, None), count, stock=_STOCK))
    command = [sys.executable, "-m", "api.cli", "serve"]
    began = time.perf_counter()
    with served(command, environ, home, port) as process:
        started = time.perf_counter() - began
        time.sleep(_SETTLE_SECONDS_QUICK if run.quick else _SETTLE_SECONDS)
        cpu = ServiceCpu(psutil.Process(process.pid), valkey)
        before, began = cpu.seconds(), time.perf_counter()
        time.sleep(_IDLE_SECONDS_QUICK if run.quick else _IDLE_SECONDS)
        after, passed = cpu.seconds(), time.perf_counter() - began
        lists = _list_times(f"http://127.0.0.1:{port}", _LISTS_QUICK if run.quick else _LISTS)
        rate = asyncio.run(_hot_rate(run, valkey, Settings.load(environ, None)))
    return Idle(
        sales=count,
        cpu={part: 100 * (after[part] - before[part]) / passed for part in PARTS},
        start_seconds=started,
        list_ms=1e3 * median(lists),
        list_p99_ms=1e3 * lists[int(len(lists) * 0.99)],
        flushed_per_second=rate,
    )


def _list_times(url: str, count: int) -> list[float]:
    """Seconds of each list, sorted; the first one, which fills the snapshot, is not among them."""
    times: list[float] = []
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        for _ in range(1 + count):
            began = time.perf_counter()
            client.get("/v1/sales").raise_for_status()
            times.append(time.perf_counter() - began)
            time.sleep(_LIST_PAUSE_SECONDS)
    return sorted(times[1:])


async def _hot_rate(run: Run, valkey: EmbeddedServer, settings: Settings) -> float:
    """Events a second that the service's worker writes of one sale, as fast as they come."""
    async with opened(settings) as service:
        filling = Filling(valkey.socket_path)
        try:
            before, _ = await service.sql.events.cursor(SALE_ID)
            began = time.perf_counter()
            seconds = _HOT_SECONDS_QUICK if run.quick else _HOT_SECONDS
            held = await asyncio.to_thread(filling.hold_for, seconds)
            give_up_at = began + seconds + _FLUSH_SECONDS_MAX
            while (await service.sql.events.cursor(SALE_ID))[0] < before + held:
                if time.perf_counter() > give_up_at:
                    raise RuntimeError("the worker did not write the sale's events to SQL in time")
                await asyncio.sleep(0.1)
            return held / (time.perf_counter() - began)
        finally:
            filling.close()


def _section(found: Sequence[Idle]) -> Section:
    rows = [
        [
            f"{one.sales:,}",
            *(f"{one.cpu[part]:.2f}" for part in PARTS),
            f"{one.percent:.2f}",
            f"{one.start_seconds:.1f}",
            f"{one.list_ms:.1f}",
            f"{one.list_p99_ms:.1f}",
            f"{one.flushed_per_second:,.0f}",
        ]
        for one in found
    ]
    columns = [
        "sales",
        *(f"{part}, %" for part in PARTS),
        "all, %",
        "start, s",
        "list, ms",
        "p99, ms",
        "flushed a second",
    ]
    return Section(
        title="Idle sales: percent of a core, start, GET /v1/sales, flush of one busy sale",
        columns=columns,
        rows=rows,
        goals=list(_goals(*found)),
        data=found,
        notes=[
            "Beside the idle sales one sale takes holds as fast as its script does.",
            "The idle sales are copies of one in both stores.",
        ],
    )


def _goals(one: Idle, few: Idle, many: Idle, most: Idle) -> Iterator[Goal]:
    ratio = many.percent / max(one.percent, 0.01)
    yield Goal(f"{many.sales:,} idle sales to one", f"{ratio:.1f} x", "<= 2 x", ratio <= 2)
    background = many.cpu["worker"] + many.cpu["redis"]
    yield Goal(
        f"worker and Redis with {many.sales:,} idle sales",
        f"{background:.2f} %",
        f"<= {_RELEASE_PERCENT / 20:.1f} %",
        background <= _RELEASE_PERCENT / 20,
    )
    rate = many.flushed_per_second / one.flushed_per_second
    yield Goal(
        f"flush of a busy sale beside {many.sales:,}", f"{rate:.2f} x", ">= 0.9 x", rate >= 0.9
    )
    listed = most.list_ms / few.list_ms
    yield Goal(
        f"list with {most.sales:,} sales to {few.sales:,}",
        f"{listed:.1f} x",
        "<= 2 x",
        listed <= 2,
    )
    start = most.start_seconds / one.start_seconds
    yield Goal(f"start with {most.sales:,} sales to one", f"{start:.1f} x", "<= 3 x", start <= 3)
