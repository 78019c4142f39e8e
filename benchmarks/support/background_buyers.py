"""Background buyers: prepare and pay at a steady rate during a load, with timed answers."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import httpx
import msgspec

from benchmarks.contenders.launcher import BUYERS_SECRET
from benchmarks.support.sale import PRICE, SALE_ID, SKU, token_of

__all__ = ["BROKEN", "Answer", "BackgroundBuyers", "Payment", "at_pace"]

#: Longer than any client waits; a late answer is still an answer.
_ANSWER_SECONDS_MAX: Final = 30.0
#: Less than the service lets one idle: on one that is ended at this very moment a request is lost.
#: A browser sends it again.
_IDLE_CONNECTION_SECONDS_MAX: Final = 2.0
#: Orders and payments made at once before the measurement.
_AT_ONCE: Final = 16
#: No answer at all.
BROKEN: Final = 0

_numbers = itertools.count(1)


class Answer(msgspec.Struct, frozen=True):
    """One request of a bystander."""

    #: Seconds since the first of its kind left.
    sent_at: float
    #: 0 if none came.
    status: int
    ms: float


class Payment(msgspec.Struct, frozen=True):
    """A buyer who has authenticated the payment and is about to come back."""

    order_id: str
    token: str
    success_url: str
    query: dict[str, str]


class BackgroundBuyers:
    """Buyers with their own connections."""

    def __init__(self, url: str) -> None:
        self.http = httpx.AsyncClient(
            base_url=url,
            trust_env=False,
            timeout=_ANSWER_SECONDS_MAX,
            limits=httpx.Limits(
                max_connections=None, keepalive_expiry=_IDLE_CONNECTION_SECONDS_MAX
            ),
        )

    async def prepare(self) -> httpx.Response:
        """One hold of a new buyer."""
        name = f"bystander-{next(_numbers)}"
        return await self.http.post(
            f"/v1/sales/{SALE_ID}/reservations",
            json={"items": [{"sku": SKU, "quantity": 1}], "amount": PRICE},
            headers={
                "Authorization": f"Bearer {token_of(name, secret=BUYERS_SECRET)}",
                "Idempotency-Key": name,
            },
        )

    async def payments(self, count: int) -> list[Payment]:
        """Buyers who are back from the PG's page."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one() -> Payment:
            async with gate:
                return await self._payment()

        return await asyncio.gather(*(one() for _ in range(count)))

    async def _payment(self) -> Payment:
        order = (await self.prepare()).raise_for_status().json()
        sandbox = order["payment"]["checkoutUrl"].removesuffix("/checkout")
        body = {"orderId": order["orderId"], "amount": order["amount"]}
        paid = (await self.http.post(f"{sandbox}/_payments", json=body)).raise_for_status().json()
        query = {
            "paymentType": "NORMAL",
            "orderId": order["orderId"],
            "paymentKey": paid["paymentKey"],
            "amount": str(order["amount"]),
        }
        return Payment(order["orderId"], order["token"], order["payment"]["successUrl"], query)

    async def open_success_url(self, payment: Payment) -> httpx.Response:
        """The PG sends the buyer's browser back: the payment is confirmed."""
        url = httpx.URL(payment.success_url).copy_merge_params(payment.query)
        return await self.http.get(url, headers={"Accept": "application/json"})

    async def status_of(self, payment: Payment) -> str:
        """The order's status."""
        answer = await self.http.get(
            f"/v1/reservations/{payment.order_id}",
            headers={"X-Reservation-Token": payment.token},
        )
        return answer.raise_for_status().json()["status"]


async def at_pace(
    calls: Sequence[Callable[[], Awaitable[httpx.Response]]], per_second: float
) -> list[Answer]:
    """Send each at its scheduled time, regardless of those before it."""
    begun_at = time.perf_counter()
    answers: list[asyncio.Task[Answer]] = []
    for number, call in enumerate(calls):
        await asyncio.sleep(begun_at + number / per_second - time.perf_counter())
        answers.append(asyncio.create_task(_timed(call, begun_at)))
    return await asyncio.gather(*answers)


async def _timed(call: Callable[[], Awaitable[httpx.Response]], begun_at: float) -> Answer:
    sent_at = time.perf_counter()
    status = BROKEN
    try:
        answer: Any = await call()
        status = answer.status_code
    except httpx.HTTPError:
        status = BROKEN
    return Answer(sent_at - begun_at, status, (time.perf_counter() - sent_at) * 1e3)
