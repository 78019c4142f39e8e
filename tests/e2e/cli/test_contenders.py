"""Write-behind of the benchmark's contenders: every event once, even if it is killed."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from benchmarks.support.fill import Filling
from benchmarks.support.in_process import service_alone
from benchmarks.support.sale import SALE_ID
from benchmarks.support.written import Written

ROOT = Path(__file__).resolve().parents[3]
HOLDS = 3_000
WAIT_SECONDS = 60.0

pytestmark = pytest.mark.e2e


@contextmanager
def write_behind(socket_path: Path, database: Path) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.contenders.write_behind"],
        cwd=ROOT,
        env=os.environ | {"BENCH_SOCKET": str(socket_path), "BENCH_DATABASE": str(database)},
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_for_orders(written: Written) -> None:
    give_up_at = time.monotonic() + WAIT_SECONDS
    while written.backlog() > HOLDS:
        assert time.monotonic() < give_up_at, "the write-behind writes nothing"
        time.sleep(0.01)


async def test_a_killed_write_behind_loses_and_repeats_nothing(tmp_path: Path) -> None:
    async with service_alone(tmp_path / "service", stock=2 * HOLDS) as (_, valkey):
        filling = Filling(valkey.socket_path)
        database = tmp_path / "orders.sqlite3"
        with redis.Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as client:
            written = Written(client, database, [SALE_ID])
            try:
                with write_behind(valkey.socket_path, database):
                    # The sale's own event; the tables are there.
                    await asyncio.to_thread(written.drain)
                    await asyncio.to_thread(filling.hold, 2 * HOLDS, keep_events=True)
                    await asyncio.to_thread(wait_for_orders, written)
                with write_behind(valkey.socket_path, database):
                    await asyncio.to_thread(written.drain)
            finally:
                filling.close()
            assert written.held() == 2 * HOLDS
            assert written.orders() == (2 * HOLDS, 2 * HOLDS)
