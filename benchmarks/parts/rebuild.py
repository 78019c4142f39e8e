"""Rebuild of a sale that Redis lost: by the command, and by the worker during a sale."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import msgspec

from benchmarks.contenders.launcher import BUYERS_SECRET, free_port, own_environ, served
from benchmarks.support.fill import Filling
from benchmarks.support.run import Goal, Run, Section
from benchmarks.support.sale import PRICE, SALE_ID, SKU, put_directly, token_of
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.bootstrap import opened
from reservation.config.settings import Settings
from reservation.workers.flusher import Flusher

__all__ = ["measure"]

_ORDERS, _ORDERS_QUICK = 100_000, 500
_ROUNDS, _ROUNDS_QUICK = 3, 1
_STOCK: Final = 1_000_000
_SECONDS_MAX: Final = 300.0
_POLL_SECONDS: Final = 0.05
_RATIO_WANTED: Final = 2.0


class Rebuilt(msgspec.Struct, frozen=True):
    """One round."""

    orders: int
    #: The whole run of `reservation rebuild`, without another process.
    by_command_seconds: float
    #: From the start of the empty server until the service takes a hold again.
    by_worker_seconds: float


def measure(run: Run) -> Section:
    """The same sale, lost and rebuilt several times in both ways."""
    home = run.home / "rebuild"
    shutil.rmtree(home, ignore_errors=True)
    (home / "service").mkdir(parents=True)
    valkey = EmbeddedServer(home / "redis")
    asyncio.run(valkey.start())
    orders = _ORDERS_QUICK if run.quick else _ORDERS
    found: list[Rebuilt] = []
    try:
        port = free_port()
        environ = own_environ(home / "service", port) | {
            "RESERVATION_REDIS_URL": valkey.url,
            "RESERVATION_REBUILD": "auto",
        }
        asyncio.run(_fill(valkey, Settings.load(environ, None), orders))
        for number in range(_ROUNDS_QUICK if run.quick else _ROUNDS):
            asyncio.run(_lose(valkey, home / "redis"))
            by_command = _by_command(environ)
            by_worker = _by_worker(environ, home, port, valkey, number)
            found.append(Rebuilt(orders, by_command, by_worker))
            run.say(f"rebuild  {by_command:.1f} s by the command, {by_worker:.1f} s by the worker")
    finally:
        asyncio.run(valkey.stop())
        shutil.rmtree(home, ignore_errors=True)
    return _section(found)


async def _fill(valkey: EmbeddedServer, settings: Settings, orders: int) -> None:
    """Hold this many orders, and write them to SQL."""
    await put_directly(settings, _STOCK)
    async with opened(settings) as service:
        filling = Filling(valkey.socket_path)
        try:
            await asyncio.to_thread(filling.hold, orders, keep_events=True)
        finally:
            filling.close()
        flusher = Flusher(service.outbox, service.sql, on_alarm=_alarmed, on_flushed=lambda _: None)
        while (await flusher.run_once(SALE_ID)).flushed:
            continue


async def _lose(valkey: EmbeddedServer, folder: Path) -> None:
    """The server crashes, and its disk is gone."""
    valkey.kill()
    await valkey.wait()
    await asyncio.to_thread(shutil.rmtree, folder / "valkey")
    await valkey.start()


def _by_command(environ: dict[str, str]) -> float:
    kept = {name: v for name, v in os.environ.items() if not name.startswith("RESERVATION_")}
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "api.cli", "rebuild", SALE_ID, "--operator", "benchmark"],
        env=kept | environ,
        capture_output=True,
        check=True,
        timeout=_SECONDS_MAX,
    )
    return time.perf_counter() - began


def _by_worker(
    environ: dict[str, str], home: Path, port: int, valkey: EmbeddedServer, number: int
) -> float:
    command = [sys.executable, "-m", "api.cli", "serve"]
    with (
        served(command, environ, home, port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client,
    ):
        _until_a_hold(client, f"before-{number}")
        began = time.perf_counter()
        asyncio.run(_lose(valkey, home / "redis"))
        _until_a_hold(client, f"after-{number}")
        return time.perf_counter() - began


def _until_a_hold(client: httpx.Client, buyer: str) -> None:
    headers = {
        "Authorization": f"Bearer {token_of(buyer, secret=BUYERS_SECRET)}",
        "Idempotency-Key": buyer,
    }
    body = {"items": [{"sku": SKU, "quantity": 1}], "amount": PRICE}
    give_up_at = time.monotonic() + _SECONDS_MAX
    answer: httpx.Response | None = None
    while time.monotonic() < give_up_at:
        answer = client.post(f"/v1/sales/{SALE_ID}/reservations", json=body, headers=headers)
        if answer.is_success:
            return
        if not answer.is_server_error:
            break
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"the sale does not sell: {answer.text if answer else ''}")


def _alarmed(name: str, **facts: object) -> None:
    raise RuntimeError(f"the flusher's alarm: {name} {facts}")


def _section(found: list[Rebuilt]) -> Section:
    command = median(one.by_command_seconds for one in found)
    worker = median(one.by_worker_seconds for one in found)
    ratio = worker / command
    orders = found[0].orders
    return Section(
        title="Rebuild of a sale that Redis lost",
        columns=["orders", "by the command, s", "by the worker, s", "ratio"],
        rows=[[f"{orders:,}", f"{command:.1f}", f"{worker:.1f}", f"{ratio:.2f}"]],
        goals=[
            Goal(
                f"a lost sale of {orders:,} orders sells again",
                f"{ratio:.2f} x the time of `reservation rebuild`",
                f"<= {_RATIO_WANTED:.0f} x",
                ratio <= _RATIO_WANTED,
            )
        ],
        data=found,
        notes=[
            "The command runs without another process.",
            "The worker's time is from the crash of Redis to the next hold, beside an API process.",
        ],
    )
