"""Write-behind and expiry: events a second into SQL, and holds a second that run out."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.support.fill import Filling
from benchmarks.support.in_process import service_alone
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.sale import SALE_ID
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.bootstrap import Service
from reservation.workers.flusher import Flusher
from reservation.workers.reaper import Reaper
from tests.support.databases import running_postgres

__all__ = ["measure"]

_BACKLOG, _BACKLOG_QUICK = 500_000, 5_000
_BESIDE_SECONDS, _BACKGROUND_SECONDS_QUICK = 10.0, 1.0
_EXPIRING, _EXPIRING_QUICK = 100_000, 2_000
#: Until a sale is larger than any of these.
_STOCK: Final = 2_000_000
_EVENTS_WANTED: Final = 10_000
_BACKLOG_SECONDS_WANTED: Final = 60.0
_EXPIRED_WANTED: Final = 30_000
_SCRIPT_MS_WANTED: Final = 10.0
#: Holds of one second have all expired after this.
_RUN_OUT_SECONDS: Final = 1.5
_LOOK_SECONDS: Final = 0.05
#: Limit for the start of a flusher alone in its process.
_START_SECONDS: Final = 60.0

_FLUSHER: Final = """
import asyncio, os, sys
from reservation.bootstrap import opened
from reservation.config.settings import Settings
from reservation.workers.flusher import Flusher

async def main():
    async with opened(Settings.load(os.environ, None)) as service:
        flusher = Flusher(service.outbox, service.sql, on_alarm=print, on_flushed=lambda _: None)
        while True:
            if not (await flusher.run_once(sys.argv[1])).flushed:
                await asyncio.sleep(0.01)

asyncio.run(main())
"""


class Behind(msgspec.Struct, frozen=True):
    """One database."""

    database: str
    backlog: int
    #: Until SQL has all of the backlog, without other load.
    drain_seconds: float
    #: While a process takes holds as fast as the script does.
    beside_per_second: float
    holds_per_second: float


class Reaped(msgspec.Struct, frozen=True):
    """Expired holds."""

    holds: int
    per_second: float
    #: The slowest call of the script, by the server's own count.
    slowest_ms: float


def measure(run: Run) -> Section:
    """SQLite and PostgreSQL, each with its syncs on, then the reaper."""
    found = [asyncio.run(_flushed(run, "sqlite", ""))]
    with running_postgres(fsync="on", full_page_writes="on") as postgres:
        found.append(asyncio.run(_flushed(run, "postgresql", postgres.make_database())))
    return _section(found, asyncio.run(_reaped(run)))


async def _flushed(run: Run, name: str, database_url: str) -> Behind:
    backlog = _BACKLOG_QUICK if run.quick else _BACKLOG
    home = run.home / f"behind-{name}"
    async with service_alone(home, stock=_STOCK, database_url=database_url) as (service, valkey):
        filling = Filling(valkey.socket_path)
        try:
            await asyncio.to_thread(filling.hold, backlog, keep_events=True)
            seconds = await _drain(service)
            run.say(f"behind  {name}: {backlog:,} events in {seconds:.1f} s")
            beside = _BACKGROUND_SECONDS_QUICK if run.quick else _BESIDE_SECONDS
            with _flushing(home, valkey, database_url):
                await _until_it_flushes(filling, service)
                before, began = await _written(service), time.perf_counter()
                holds = await asyncio.to_thread(filling.hold_for, beside)
                after, passed = await _written(service), time.perf_counter() - began
        finally:
            filling.close()
    return Behind(name, backlog, seconds, (after - before) / passed, holds / passed)


async def _drain(service: Service) -> float:
    """Flush the whole outbox to SQL; returns the duration."""
    flusher = Flusher(service.outbox, service.sql, on_alarm=_alarmed, on_flushed=lambda _: None)
    started_at = time.perf_counter()
    while (await flusher.run_once(SALE_ID)).flushed:
        continue
    return time.perf_counter() - started_at


@contextmanager
def _flushing(home: Path, valkey: EmbeddedServer, database_url: str) -> Generator[None]:
    """A flusher in its own process, as the worker has it."""
    environ = {
        "PATH": os.environ["PATH"],
        "RESERVATION_DATA_DIR": str(home),
        "RESERVATION_REDIS_URL": valkey.url,
        "RESERVATION_DATABASE_URL": database_url,
    }
    process = subprocess.Popen([sys.executable, "-c", _FLUSHER, SALE_ID], env=environ)
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def _until_it_flushes(filling: Filling, service: Service) -> None:
    """Wait until it is at work: its start is not part of a rate."""
    before, give_up_at = await _written(service), time.monotonic() + _START_SECONDS
    await asyncio.to_thread(filling.hold, 1, keep_events=True)
    while await _written(service) == before:
        if time.monotonic() > give_up_at:
            raise RuntimeError("the flusher does not begin")
        await asyncio.sleep(_LOOK_SECONDS)


async def _written(service: Service) -> int:
    return (await service.sql.sales.heads())[SALE_ID].seq


async def _reaped(run: Run) -> Reaped:
    count = _EXPIRING_QUICK if run.quick else _EXPIRING
    async with service_alone(run.home / "behind-reaper", stock=_STOCK) as (service, valkey):
        command = service.connections.command
        # Shorter than an operator may make a hold, to keep the benchmark short.
        await command("HSET", service.keys.of(SALE_ID).sale, "hold_seconds", 1)
        filling = Filling(valkey.socket_path)
        try:
            await asyncio.to_thread(filling.hold, count)
        finally:
            filling.close()
        await asyncio.sleep(_RUN_OUT_SECONDS)
        await command("CONFIG", "SET", "slowlog-log-slower-than", 1_000, "slowlog-max-len", 1_000)
        reaper, expired = Reaper(service.catalog, service.store), 0
        started_at = time.perf_counter()
        while (some := await reaper.run_once(SALE_ID)) > 0:
            expired += some
        seconds = time.perf_counter() - started_at
        slow = await command("SLOWLOG", "GET", 1_000)
    if expired != count:
        raise RuntimeError(f"{expired} of {count} holds ran out")
    run.say(f"behind  {expired:,} holds ran out in {seconds:.1f} s")
    return Reaped(
        expired, expired / seconds, max((int(entry[2]) for entry in slow), default=0) / 1e3
    )


def _alarmed(name: str, **facts: object) -> None:
    raise RuntimeError(f"the flusher's alarm: {name} {facts}")


def _section(found: list[Behind], reaped: Reaped) -> Section:
    rows: list[list[str]] = []
    goals: list[Goal] = []
    for one in found:
        rate = one.backlog / one.drain_seconds
        rows.append(
            [
                f"{one.database}: a backlog of {one.backlog:,}",
                f"{one.drain_seconds:.1f} s",
                f"{rate:,.0f}",
            ]
        )
        rows.append(
            [
                f"{one.database}: beside {one.holds_per_second:,.0f} holds/s",
                "",
                f"{one.beside_per_second:,.0f}",
            ]
        )
        goals.append(
            Goal(
                f"500,000 events into {one.database}",
                f"{500_000 / rate:.0f} s",
                f"<= {_BACKLOG_SECONDS_WANTED:.0f} s",
                500_000 / rate <= _BACKLOG_SECONDS_WANTED,
            )
        )
        goals.append(
            Goal(
                f"events/s into {one.database} beside a sale",
                f"{one.beside_per_second:,.0f}",
                f">= {_EVENTS_WANTED:,}",
                one.beside_per_second >= _EVENTS_WANTED,
            )
        )
    rows.append(
        ["holds that ran out", f"{reaped.slowest_ms:.1f} ms at most", f"{reaped.per_second:,.0f}"]
    )
    goals.append(
        Goal(
            "expired holds/s",
            f"{reaped.per_second:,.0f}, {reaped.slowest_ms:.1f} ms a call at most",
            f">= {_EXPIRED_WANTED:,}, <= {_SCRIPT_MS_WANTED:.0f} ms",
            reaped.per_second >= _EXPIRED_WANTED and reaped.slowest_ms <= _SCRIPT_MS_WANTED,
        )
    )
    return Section(
        title="Behind the sale: events into SQL, and holds that run out",
        columns=["", "time", "a second"],
        rows=rows,
        goals=goals,
        data={"flushed": found, "reaped": reaped},
    )
