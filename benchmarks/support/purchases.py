"""Purchases: concurrent buyers who return from the PG's page."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Final

import aiohttp
import msgspec
from yarl import URL

from benchmarks.support.background_buyers import BackgroundBuyers, Payment
from benchmarks.support.whole_service import WholeService

__all__ = ["Cost", "Purchases", "measure_purchases"]

_OK: Final = 200
#: Answers after which the same URL is loaded again: in progress, temporarily unavailable.
_IN_PROGRESS: Final = (202, 503)
#: Tries of one confirm.
_CONFIRM_TRIES: Final = 50
_CONFIRM_PAUSE_SECONDS: Final = 0.2
#: Longer than any confirm takes.
_ANSWER_SECONDS_MAX: Final = 30.0


class Cost(msgspec.Struct, frozen=True):
    """CPU microseconds of one operation, by part."""

    api: float
    worker: float
    redis: float
    sandbox: float
    #: The database server's; 0 with SQLite, which runs inside `api` and `worker`.
    sql: float

    @property
    def total(self) -> float:
        """Without the sandbox, which a sale in production does not have."""
        return self.api + self.worker + self.redis + self.sql

    @property
    def without_redis(self) -> float:
        return self.api + self.worker + self.sql


class Purchases(msgspec.Struct, frozen=True):
    """Results of a number of paid orders: CPU until SQL has them, time until CONFIRMED."""

    cost: Cost
    per_second: float
    p50_ms: float
    p99_ms: float


async def measure_purchases(service: WholeService, count: int, *, at_once: int) -> Purchases:
    """Confirm payments; their holds and authentications are made before the clock runs.

    Args:
        service: with an open sale.
        count: payments.
        at_once: buyers whose success page loads at the same time.
    """
    buyers = BackgroundBuyers(service.url)
    try:
        payments = await buyers.payments(count)
    finally:
        await buyers.http.aclose()
    await asyncio.to_thread(service.drain)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=_ANSWER_SECONDS_MAX),
    ) as http:
        cpu, began = service.cpu(), time.perf_counter()
        waiting = iter(payments)
        latencies: list[float] = []
        await asyncio.gather(
            *(_confirm_each(http, service.url, waiting, latencies) for _ in range(at_once))
        )
        seconds = time.perf_counter() - began
    await asyncio.to_thread(service.drain)
    return Purchases(
        cost=Cost(**service.cpu_us_since(cpu, count)),
        per_second=count / seconds,
        p50_ms=median(latencies),
        p99_ms=_p99(latencies),
    )


async def _confirm_each(
    http: aiohttp.ClientSession, url: str, waiting: Iterator[Payment], latencies: list[float]
) -> None:
    for payment in waiting:
        began = time.perf_counter()
        await _confirm(http, url, payment)
        latencies.append((time.perf_counter() - began) * 1e3)


async def _confirm(http: aiohttp.ClientSession, url: str, payment: Payment) -> None:
    last = ""
    address = URL(url).join(URL(payment.success_url, encoded=True))
    for _ in range(_CONFIRM_TRIES):
        async with http.get(address, headers={"Accept": "application/json"}) as answer:
            last = f"{answer.status} {await answer.text()}"
            if answer.status == _OK and (await answer.json())["status"] == "CONFIRMED":
                return
            if answer.status not in _IN_PROGRESS:
                break
        await asyncio.sleep(_CONFIRM_PAUSE_SECONDS)
    raise RuntimeError(f"an order was not paid: {last}")


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) * 99 // 100]
