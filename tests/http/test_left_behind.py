"""Prepare / release loops: the remains of a buyer are bounded, and prepare stays open."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.service import Served, item, running_service

pytestmark = pytest.mark.system

#: The default of RESERVATION_UNPAID_ORDERS.
UNPAID_MAX = 20
#: Of one order that ended: its hash, its place in its buyer's list, and its keys.
BYTES_AN_ORDER = 1_000
SOAK_SECONDS = 1_800
#: Whether a guest with these answers stops.
IsOver = Callable[[Counter[str]], bool]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running_service(tmp_path_factory.mktemp("small"), RESERVATION_WORKERS="1") as served:
        yield served


async def sent(http: httpx.AsyncClient, path: str, **request: Any) -> httpx.Response:
    """The answer; sent again where an idle connection was closed under the request."""
    for _ in range(5):
        try:
            return await http.post(path, **request)
        except httpx.TransportError:
            continue
    raise AssertionError(f"no answer from {path}")


async def loop(
    http: httpx.AsyncClient, served: Served, sale_id: str, pause: float, is_over: IsOver
) -> Counter[str]:
    """Prepares and releases of one guest; how often each answer came."""
    counts: Counter[str] = Counter()
    number, buyer = 0, served.buyer()
    while not is_over(counts):
        number += 1
        answer = await sent(
            http,
            f"/v1/sales/{sale_id}/reservations",
            json={"items": [{"sku": "a", "quantity": 1}], "amount": 1000},
            headers={**buyer, "Idempotency-Key": str(number)},
        )
        body = answer.json()
        counts[body.get("code", "held")] += 1
        if answer.status_code == 201:
            path = f"/v1/reservations/{body['orderId']}/release"
            released = await sent(http, path, headers=buyer)
            assert released.status_code == 200, released.text
        await asyncio.sleep(pause)
    return counts


async def run_loops(served: Served, guests: int, pause: float, is_over: IsOver) -> None:
    sale_id = served.sale(items=[item("a", total=1_000)])
    with served.redis() as client:
        before = client.info("memory")["used_memory"]
    limits = httpx.Limits(max_connections=guests)
    async with httpx.AsyncClient(
        base_url=served.url, timeout=30, limits=limits, trust_env=False
    ) as http:
        found = await asyncio.gather(
            *(loop(http, served, sale_id, pause, is_over) for _ in range(guests))
        )
    held = [counts["held"] for counts in found]
    # A busy machine defers some; nothing was taken then.
    expected = {"held", "rate_limited", "too_many_orders", "unavailable"}
    assert {name for counts in found for name in counts} <= expected
    assert set(held) == {UNPAID_MAX}
    assert all(counts["too_many_orders"] for counts in found)
    with served.redis() as client:
        orders = len(list(client.scan_iter(f"rsv:{{{sale_id}}}:order:*", count=1_000)))
        grown = client.info("memory")["used_memory"] - before
    assert orders == guests * UNPAID_MAX
    assert grown < orders * BYTES_AN_ORDER + 2**20
    assert served.http.get("/health/ready").status_code == 200
    served.hold(sale_id, served.buyer())
    assert served.audit(sale_id)["ok"]


async def test_the_unpaid_limit_bounds_a_loop_of_ten_guests(small: Served) -> None:
    await run_loops(small, 10, 0.02, is_over=lambda counts: counts["too_many_orders"] >= 5)


@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS + 120)
async def test_prepare_stays_open_after_loops_by_a_hundred_guests(
    small: Served,
) -> None:
    until = time.monotonic() + SOAK_SECONDS
    await run_loops(small, 100, 1.0, is_over=lambda _: time.monotonic() >= until)
