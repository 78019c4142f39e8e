"""World of payments: a PG, a Redis, a database, and two processes of which one may die.

The servers are real. A death is an exception at a fail point: nothing after it runs in the process
that it meets, and the other one continues.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest
import structlog
from redis.asyncio import Redis
from sqlalchemy.exc import SQLAlchemyError

from reservation import failpoints
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.toss import circuit_breaker as breaker
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.errors import ReservationError
from reservation.domain.payment_timeouts import PaymentTimeouts
from reservation.domain.reservation import Reservation
from tests.faults.payments.clock import WorldClock, scripts_by
from tests.faults.payments.matrix import NONE, Plan
from tests.faults.payments.webhook_receiver import Hooks
from tests.support.in_process import Bench, place_database
from tests.support.sandbox import RunningSandbox, address_of, listening, sandbox_process

__all__ = ["LIMITS", "AtOnce", "Story", "World", "world"]

#: A wait for the PG passes in the machine's time and is short; all else is as in production, in the
#: world's time. A confirm and its lease are 75 s apart here as there.
LIMITS: Final = PaymentTimeouts(
    confirm_seconds=0.8, look_up_seconds=3.0, lease_margin_seconds=74.2, answer_seconds=0.05
)
#: Open time of the circuit breaker before the PG, in the machine's time.
OPEN_SECONDS: Final = 0.05
#: Concurrent payments.
AT_ONCE: Final = 48
#: Far above the time of a hanging confirm.
QUIET_SECONDS: Final = 30.0

#: The errors that the settler's own loop waits out as well.
_WAITS: Final = (ReservationError, StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError)


class ProcessDied(BaseException):
    """Nothing in the service may catch this."""


class Story(msgspec.Struct):
    """One payment, and its history. Times are the world's, in ms."""

    plan: Plan
    order: Reservation
    payment_key: str
    #: The next fail point at which the first process dies; empty once it has died there.
    deaths: list[str]
    died_at: list[str] = []
    claimed_at: int = 0
    #: Set by a death until the end of the lease that it left behind is known.
    lease_left: bool = False
    free_at: int = 0
    #: The last time at which the buyer, or the PG, came back on their own.
    nudged_at: int = 0
    #: The end of the PG's outage.
    well_at: int = 0
    ended_at: int = 0
    unknown: bool = False
    #: Whether a webhook of it was answered 200.
    acknowledged: bool = False
    #: Whether the fault that was ordered for it met a call.
    met: bool = False
    status: str = ""
    #: Its status when it ended, before any operator's refund.
    ended_as: str = ""
    #: Whether its units are for sale again after an operator's refund.
    restocked: bool = True


class AtOnce:
    """Runs many coroutines with a limit on their number."""

    def __init__(self, count: int = AT_ONCE) -> None:
        self._count = count

    async def __call__(self, jobs: Iterable[Coroutine[Any, Any, Any]]) -> None:
        slots = asyncio.Semaphore(self._count)

        async def one(job: Coroutine[Any, Any, Any]) -> None:
            async with slots:
                await job

        async with asyncio.TaskGroup() as group:
            for job in jobs:
                group.create_task(one(job))


class World:
    """The first process may die at any fail point; the second one lives."""

    def __init__(
        self,
        first: Service,
        second: Service,
        sandbox: RunningSandbox,
        pg: httpx.AsyncClient,
        clock: WorldClock,
        hooks: Hooks,
    ) -> None:
        self.first = first
        self.second = second
        self.sandbox = sandbox
        self.pg = pg
        self.clock = clock
        self.hooks = hooks
        self.bench = Bench(second)
        self.stories: dict[str, Story] = {}
        self._in_first: ContextVar[bool] = ContextVar("in_first", default=False)
        for point in failpoints.POINTS:
            failpoints.arm(point, lambda order_id, point=point: self._reach(point, order_id))

    def _reach(self, point: str, order_id: str) -> None:
        story = self.stories.get(order_id)
        if story is None or not self._in_first.get() or story.deaths[:1] != [point]:
            return
        story.deaths.pop(0)
        story.died_at.append(point)
        story.lease_left = True
        raise ProcessDied(point)

    async def in_first(self, story: Story, step: Coroutine[Any, Any, Any]) -> None:
        """Run this in the first process; it may die of it."""
        token = self._in_first.set(True)
        try:
            with suppress(ProcessDied):
                await self._waiting(step)
        finally:
            self._in_first.reset(token)

    async def in_second(self, step: Coroutine[Any, Any, Any]) -> None:
        """Run this in the second process."""
        await self._waiting(step)

    async def open_success_url(self, service: Service, story: Story) -> None:
        """The buyer's browser loads the success URL, with a valid token and amount."""
        order = await service.queries.find(story.order.order_id)
        assert order is not None
        story.claimed_at = story.claimed_at or self.clock.now_ms()
        await service.confirmation.confirm(order, payment_key=story.payment_key, may_claim=True)

    async def deliver_webhook(self, order_id: str, payment_key: str | None) -> bool:
        """A webhook reaches the second process; false where the PG has to send it again."""
        try:
            await self.second.notifications.receive(order_id, payment_key)
        except _WAITS:
            return False
        return True

    async def quiet(self) -> None:
        """Wait until no payment is in progress: the clock is turned between the calls."""
        async with asyncio.timeout(QUIET_SECONDS):
            while self._busy():  # noqa: ASYNC110 - the condition has no event
                await asyncio.sleep(0.005)

    def _busy(self) -> bool:
        confirms = (self.first.confirmation, self.second.confirmation)
        return any(confirm._under_way for confirm in confirms) or self.hooks.under_way > 0

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One call of the sandbox's own."""
        answer = await self.pg.post(path, json=body)
        return answer.raise_for_status().json()

    async def approve(self, payment_key: str, order: Reservation) -> bool:
        """Confirm a payment at the PG, past the service; whether it took the money."""
        body = {"paymentKey": payment_key, "orderId": order.order_id, "amount": order.amount}
        auth = (self.sandbox.secret_key, "")
        return (await self.pg.post("/v1/payments/confirm", json=body, auth=auth)).is_success

    @staticmethod
    async def _waiting(step: Coroutine[Any, Any, Any]) -> None:
        try:
            await step
        except _WAITS:
            # Refused, or to be retried: the order's state is read afterwards.
            return


@contextmanager
def silence() -> Iterator[None]:
    """No log: ten thousand payments would write half a million lines."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


@asynccontextmanager
async def world(folder: Path, redis_url: str, patch: pytest.MonkeyPatch) -> AsyncGenerator[World]:
    """Everything started, and ended in the reverse order."""
    patch.setattr(breaker, "OPEN_SECONDS", OPEN_SECONDS)
    hooks = Hooks()
    async with AsyncExitStack() as stack:
        stack.enter_context(silence())
        stack.callback(failpoints.disarm)
        stack.enter_context(scripts_by(folder, patch))
        listener = stack.enter_context(listening())
        process = stack.enter_context(
            sandbox_process(folder, webhook_urls=[address_of(listener)], webhook_scale=0.001)
        )
        sandbox = process.sandbox
        pg = await stack.enter_async_context(
            httpx.AsyncClient(base_url=sandbox.url, timeout=30, trust_env=False)
        )
        redis = await stack.enter_async_context(Redis.from_url(redis_url))
        clock = WorldClock(redis, sandbox)
        await clock.start()
        settings = Settings.load(
            {
                "RESERVATION_DATA_DIR": str(folder),
                "RESERVATION_REDIS_URL": redis_url,
                "RESERVATION_TOSS_API_URL": sandbox.url,
            },
            None,
        )
        place_database(settings)
        first, second = [
            await stack.enter_async_context(opened(settings, clock=clock, limits=LIMITS))
            for _ in range(2)
        ]
        made = World(first, second, sandbox, pg, clock, hooks)
        await stack.enter_async_context(hooks.listening(listener, made.deliver_webhook))
        yield made


def deaths_of(plan: Plan) -> list[str]:
    """The fail points at which the first process dies, in order."""
    return [point for point in (plan.first_death, plan.cell.moment) if point != NONE]
