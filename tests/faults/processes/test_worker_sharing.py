"""Workers in processes of their own share the sales; the others replace a lost one."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.processes.worker_with_clock import CLOCK_FILE
from tests.support.in_process import Bench, bench
from tests.support.service import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SALES = 100
#: The documented limit is five seconds. A busy machine gets more, and the test prints the time.
PATIENCE_SECONDS = 40.0


class WorkerProcess:
    """One worker, with its metrics and its clock."""

    def __init__(self, shop: Bench, folder: Path, name: str) -> None:
        self._port = free_port()
        self._clock = folder / f"{name}.clock"
        self.log = folder / f"{name}.log"
        settings = shop.service.settings
        environ = {
            f"RESERVATION_{field.upper()}": str(getattr(settings, field))
            for field in (
                "data_dir",
                "redis_url",
                "database_url",
                "admin_api_key",
                "order_id_key",
                "jwt_secret",
            )
        }
        environ |= {
            "RESERVATION_SIGNING_KEYS": ",".join(settings.signing_keys),
            "RESERVATION_TOSS_API_URL": "http://127.0.0.1:1",
            "RESERVATION_METRICS_PORT": str(self._port),
            CLOCK_FILE: str(self._clock),
        }
        command = [sys.executable, "-m", "api.server.entrypoints", "worker"]
        command += ["--parent", str(os.getpid())]
        command += ["--entry", "tests.faults.processes.worker_with_clock:run"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environ}, stdout=log, stderr=log
            )

    def set_clock(self, seconds: float) -> None:
        """Shift its wall clock by these seconds."""
        self._clock.write_text(str(seconds))

    def sales(self) -> int:
        """The sales that it serves; -1 before it runs."""
        with suppress(httpx.TransportError):
            text = httpx.get(f"http://127.0.0.1:{self._port}/metrics", trust_env=False).text
            for line in text.splitlines():
                if line.startswith("reservation_worker_sales "):
                    return int(float(line.split()[1]))
        return -1

    def end(self) -> None:
        """SIGKILL, and wait."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
async def shop(
    tmp_path: Path, own_server: EmbeddedServer, database_url: str
) -> AsyncIterator[Bench]:
    # SQLite is the default.
    address = "" if database_url.startswith("sqlite") else database_url
    async with bench(tmp_path, own_server.url, RESERVATION_DATABASE_URL=address) as made:
        yield made


class Pair:
    """Two workers that share the sales, and the orders of the test."""

    def __init__(self, shop: Bench, folder: Path, sale_ids: list[str]) -> None:
        self.shop = shop
        self.sale_ids = sale_ids
        self.workers = [WorkerProcess(shop, folder, name) for name in ("first", "second")]
        self._buyers = iter(range(1_000_000))

    async def until(self, condition: Callable[[list[int]], bool]) -> None:
        """Wait for the numbers of sales that the workers serve."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                counts = [await asyncio.to_thread(worker.sales) for worker in self.workers]
                if condition(counts):
                    return
                await asyncio.sleep(0.05)

    async def hold_in_each(self) -> list[Reservation]:
        return [
            await self.shop.hold(sale_id, f"buyer-{next(self._buyers)}")
            for sale_id in self.sale_ids
        ]

    async def until_ended(self, orders: list[Reservation]) -> None:
        """Wait until each of these has expired, and SQL has it."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            for order in orders:
                while True:
                    found = await self.shop.service.sql.orders.get(order.order_id)
                    if found is not None and found.status == Status.EXPIRED:
                        break
                    await asyncio.sleep(0.05)


@pytest.fixture
async def pair(shop: Bench, tmp_path: Path) -> AsyncIterator[Pair]:
    sale_ids = [await shop.sale(hold_seconds=1) for _ in range(SALES)]
    made = Pair(shop, tmp_path, sale_ids)
    try:
        await made.until(lambda counts: sum(counts) == SALES and min(counts) >= 30)
        yield made
    finally:
        for worker in made.workers:
            worker.end()


def halved(counts: list[int]) -> bool:
    return sum(counts) == SALES and min(counts) >= 30


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_sales_of_a_lost_worker_move_to_the_other(
    pair: Pair, number: signal.Signals
) -> None:
    await pair.until_ended(await pair.hold_in_each())
    lost, other = pair.workers
    began = time.monotonic()
    lost.process.send_signal(number)
    orders = await pair.hold_in_each()
    pair.workers = [other]
    await pair.until(lambda counts: counts == [SALES])
    moved = time.monotonic() - began
    await pair.until_ended(orders)
    sys.stdout.write(f"{number.name}: all sales moved after {moved:.1f} s\n")
    if number is signal.SIGSTOP:
        pair.workers = [lost, other]
        lost.process.send_signal(signal.SIGCONT)
        await pair.until(halved)
        await pair.until_ended(await pair.hold_in_each())
    pair.workers = [lost, other]


async def test_a_worker_that_ends_hands_its_sales_over_at_once(pair: Pair) -> None:
    ended, other = pair.workers
    ended.process.terminate()
    assert await asyncio.to_thread(ended.process.wait, PATIENCE_SECONDS) == 0
    listed = await pair.shop.service.connections.command("HKEYS", pair.shop.service.keys.workers)
    assert len(listed) == 1
    pair.workers = [other]
    await pair.until(lambda counts: counts == [SALES])
    pair.workers = [ended, other]


async def test_the_holds_of_a_worker_with_a_wrong_clock_are_expired_by_the_other(
    pair: Pair,
) -> None:
    wrong, _ = pair.workers
    keys = pair.shop.service.keys
    began = time.monotonic()
    wrong.set_clock(-3600)
    orders = await pair.hold_in_each()
    await pair.until_ended(orders)
    sys.stdout.write(f"all holds expired after {time.monotonic() - began:.1f} s\n")
    assert b"worker_clock" in wrong.log.read_bytes()
    name = f"{os.uname().nodename}-{wrong.process.pid}"
    unable = await pair.shop.service.connections.command("HGET", keys.process(name), "unable")
    assert "expire" in unable
    wrong.set_clock(0)
    await pair.until(halved)
