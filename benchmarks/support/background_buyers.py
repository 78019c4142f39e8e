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
from reservation.verification import buyer_requests as requests
from reservation.verification.buyer_requests import Order
from reservation.verification.scenario_steps import Request

__all__ = ["BROKEN", "Answer", "BackgroundBuyers", "Payment", "at_pace"]

#: Longer than any client waits; a late answer is still an answer.
_ANSWER_SECONDS_MAX: Final = 30.0
#: Less than the service lets one idle: on one that is ended at this very moment a request is lost.
#: A browser sends it again.
_IDLE_CONNECTION_SECONDS_MAX: Final = 2.0
#: Orders and payments made at once before the measurement.
_AT_ONCE: Final = 16
_UNAVAILABLE: Final = 503
_PREPARE_TRIES: Final = 50
_PREPARE_PAUSE_SECONDS: Final = 0.2
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

    order: Order
    success_url: str


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
        token = token_of(name, secret=BUYERS_SECRET)
        request = requests.prepare(
            SALE_ID,
            {SKU: 1},
            amount=PRICE,
            key=name,
            headers={"Authorization": f"Bearer {token}"},
        )
        return await self._send(request)

    async def payments(self, count: int) -> list[Payment]:
        """Buyers who are back from the PG's page."""
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one() -> Payment:
            async with gate:
                return await self._payment()

        return await asyncio.gather(*(one() for _ in range(count)))

    async def _payment(self) -> Payment:
        order = await self._order()
        sandbox_url = requests.sandbox_of(order) or ""
        paid = await self._send(requests.authenticate_payment(sandbox_url, order))
        key = paid.raise_for_status().json()["paymentKey"]
        return Payment(order, requests.success_url(order, key))

    async def _order(self) -> Order:
        """A hold; a busy service may refuse some prepares first."""
        for _ in range(_PREPARE_TRIES):
            answer = await self.prepare()
            if answer.status_code != _UNAVAILABLE:
                return answer.raise_for_status().json()
            await asyncio.sleep(_PREPARE_PAUSE_SECONDS)
        raise RuntimeError("every prepare was answered 503")

    async def open_success_url(self, payment: Payment) -> httpx.Response:
        """The PG sends the buyer's browser back: the payment is confirmed."""
        return await self._send(requests.come_back(payment.success_url))

    async def status_of(self, payment: Payment) -> str:
        """The order's status."""
        order = payment.order
        answer = await self._send(requests.read(order["orderId"], requests.proof_of(order)))
        return answer.raise_for_status().json()["status"]

    async def _send(self, request: Request) -> httpx.Response:
        return await self.http.request(
            request.method, request.url, json=request.body, headers=request.headers
        )


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
