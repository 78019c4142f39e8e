"""Metrics of the write-behind backlog, as an alert sees them, above all while SQL is down."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import REGISTRY
from sqlalchemy.exc import OperationalError

from reservation.workers import runner
from reservation.workers.runner import Worker
from tests.support.in_process import Bench, bench
from tests.support.service import START_SECONDS, STOP_SECONDS, eventually, free_port


@pytest.fixture
async def shop(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


def seen(name: str, sale_id: str) -> float | None:
    return REGISTRY.get_sample_value(f"reservation_outbox_{name}", {"sale": sale_id})


async def test_a_backlog_grows_in_length_and_age_while_sql_is_away(
    shop: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await shop.sale()
    await shop.hold(sale_id)
    worker = Worker(shop.service)
    await worker._list_sales()

    async def away(*_: Any, **__: Any) -> None:
        raise OperationalError("apply", {}, OSError("away"))

    with monkeypatch.context() as broken:
        broken.setattr(shop.service.sql.events, "apply", away)
        ages: list[float] = []
        for _ in range(2):
            with pytest.raises(OperationalError):
                await worker._flush(sale_id)
            ages.append(seen("oldest_seconds", sale_id) or 0.0)
            await asyncio.sleep(0.02)
    assert 0 < ages[0] < ages[1]
    backlog = seen("backlog_events", sale_id)
    assert backlog
    await worker._flush(sale_id)
    await worker._flush(sale_id)
    assert (seen("backlog_events", sale_id), seen("oldest_seconds", sale_id)) == (0, 0)


async def _hang(_: object) -> dict[str, int]:
    await asyncio.Event().wait()
    return {}


async def _refuse(_: object) -> dict[str, int]:
    raise ConnectionRefusedError


@pytest.mark.parametrize("cursors", [_hang, _refuse])
async def test_a_worker_adds_its_sales_while_sql_is_away(
    shop: Bench, monkeypatch: pytest.MonkeyPatch, cursors: Any
) -> None:
    """Their holds expire meanwhile."""
    sale_id = await shop.sale()
    worker = Worker(shop.service)
    monkeypatch.setattr(runner, "CURSORS_SECONDS_MAX", 0.05)
    monkeypatch.setattr(shop.service.sql.events, "cursors", cursors)
    async with asyncio.timeout(30):
        await worker._list_sales()
    assert sale_id in worker._rounds


@pytest.mark.slow
async def test_a_separate_worker_exposes_its_own_metrics(tmp_path: Path, valkey_url: str) -> None:
    port = free_port()
    async with bench(tmp_path, valkey_url) as shop:
        sale_id = await shop.sale()
        settings = msgspec.structs.replace(shop.service.settings, metrics_port=port)
        environ = {
            f"RESERVATION_{name.upper()}": str(getattr(settings, name))
            for name in ("data_dir", "redis_url", "metrics_port", "admin_api_key", "order_id_key")
        }
        environ |= {
            "RESERVATION_SIGNING_KEYS": ",".join(settings.signing_keys),
            "RESERVATION_JWT_SECRET": settings.jwt_secret,
            "RESERVATION_TOSS_API_URL": "http://127.0.0.1:1",
        }
        await asyncio.to_thread(watch_worker, environ, port, sale_id)


def watch_worker(environ: dict[str, str], port: int, sale_id: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "api.cli", "serve", "--role", "worker"],
        env={**os.environ, **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as worker:
        try:
            until_counted(port, f'reservation_outbox_oldest_seconds{{sale="{sale_id}"}} 0.0')
        finally:
            worker.terminate()
        assert worker.wait(STOP_SECONDS) == 0


def until_counted(port: int, line: str) -> None:
    def scrape() -> str:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        return ""

    eventually(scrape, lambda text: line in text.splitlines(), within=START_SECONDS)
