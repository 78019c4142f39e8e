"""Webhooks: leases endpoints and runs their deliveries, each endpoint in its own task."""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.sql.errors import reason_of
from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.webhook_rows import EndpointRow
from reservation.adapters.webhooks.sender import ATTEMPT_SECONDS, WebhookSender
from reservation.application.events.delivery import EndpointDelivery
from reservation.application.events.feed import EventFeed
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.webhooks import RETRIES, RetrySchedule
from reservation.telemetry.metrics import alarm
from reservation.workers.loops import forever

__all__ = ["Webhooks"]

log = structlog.get_logger(__name__)

#: An attempt begins only if the lease outlasts it by the difference that clocks may have.
LEASE_SECONDS: Final = 45.0
SPARE_SECONDS: Final = ATTEMPT_SECONDS + 5.0
#: Pause of an endpoint without a due delivery.
PAUSE_SECONDS: Final = 0.5
#: An endpoint that has failed for this long raises an alarm, repeated at this interval.
FAILING_SECONDS: Final = 3_600.0
ALARM_SECONDS: Final = 600.0
#: The log of deliveries: their age and their number per endpoint.
LOG_SECONDS: Final = 30 * 86_400.0
LOG_MAX: Final = 10_000
PRUNE_SECONDS: Final = 60.0
#: Removals of one prune: together more than an endpoint gets in a minute.
PRUNES_MAX: Final = 100


class _Running(msgspec.Struct):
    """An endpoint that this process sends to."""

    task: asyncio.Task[None] | None
    #: The end of the lease by the monotonic clock, which starts before the lease was requested.
    lease_until: float
    pruned_at: float = 0.0
    alarmed_at: float = float("-inf")


class Webhooks:
    """Sends webhooks to the endpoints of this worker's share.

    Args:
        sql: the store.
        feed: of the events.
        sender: sends one webhook.
        clock: for leases and due times.
        name: this worker's name, the holder of its leases.
        has: whether an endpoint is in this worker's share.
        schedule: the pauses between attempts.
    """

    def __init__(
        self,
        sql: SqlStore,
        feed: EventFeed,
        sender: WebhookSender,
        *,
        clock: Clock,
        name: str,
        has: Callable[[str], bool],
        schedule: RetrySchedule = RETRIES,
    ) -> None:
        self._sql = sql
        self._feed = feed
        self._sender = sender
        self._clock = clock
        self._name = name
        self._has = has
        self._schedule = schedule
        self._running: dict[str, _Running] = {}

    async def run_once(self) -> int:
        """Take, renew and give up leases; start and stop the endpoints' tasks. Always 0."""
        endpoints = {
            row.endpoint_id: row
            for row in await self._sql.webhooks.list_all()
            if row.enabled and self._has(row.endpoint_id)
        }
        await self._lease(endpoints)
        for endpoint_id, row in endpoints.items():
            running = self._running.get(endpoint_id)
            if running is not None:
                self._warn(row, running)
                await self._prune(endpoint_id, running)
        return 0

    async def aclose(self) -> None:
        """Stop sending, and give up the leases."""
        held = list(self._running)
        await self._stop(held)
        try:
            await self._sql.webhooks.release(held, holder=self._name)
        except (SQLAlchemyError, OSError) as error:
            log.debug("webhook_leases_not_released", reason=reason_of(error))

    async def _lease(self, endpoints: Collection[str]) -> None:
        began, now_ms = time.monotonic(), self._clock.now_ms()
        held = await self._sql.webhooks.lease(
            endpoints,
            holder=self._name,
            now_ms=now_ms,
            until_ms=now_ms + round(LEASE_SECONDS * 1000),
        )
        lost = [endpoint_id for endpoint_id in self._running if endpoint_id not in held]
        await self._stop(lost)
        if lost:
            await self._sql.webhooks.release(lost, holder=self._name)
        for endpoint_id in held:
            running = self._running.get(endpoint_id)
            if running is not None:
                running.lease_until = began + LEASE_SECONDS
                continue
            running = self._running[endpoint_id] = _Running(None, began + LEASE_SECONDS)
            running.task = asyncio.create_task(self._send(endpoint_id, running))

    async def _send(self, endpoint_id: str, running: _Running) -> None:
        delivery = EndpointDelivery(
            endpoint_id,
            sql=self._sql,
            feed=self._feed,
            sender=self._sender,
            clock=self._clock,
            holder=self._name,
            may_send=lambda: time.monotonic() + SPARE_SECONDS < running.lease_until,
            schedule=self._schedule,
        )
        await forever("webhooks", delivery.run_once, PAUSE_SECONDS)

    async def _stop(self, endpoint_ids: Collection[str]) -> None:
        stopped = [self._running.pop(endpoint_id) for endpoint_id in endpoint_ids]
        tasks = [running.task for running in stopped if running.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _warn(self, row: EndpointRow, running: _Running) -> None:
        since_ms, now = row.failing_since_ms, time.monotonic()
        if since_ms is None or now - running.alarmed_at < ALARM_SECONDS:
            return
        seconds = (self._clock.now_ms() - since_ms) / 1000
        if seconds >= FAILING_SECONDS:
            running.alarmed_at = now
            alarm(
                Alarm.WEBHOOK_ENDPOINT_FAILING,
                endpoint_id=row.endpoint_id,
                minutes=round(seconds / 60),
            )

    async def _prune(self, endpoint_id: str, running: _Running) -> None:
        now = time.monotonic()
        if now - running.pruned_at < PRUNE_SECONDS:
            return
        running.pruned_at = now
        before_ms = self._clock.now_ms() - round(LOG_SECONDS * 1000)
        for _ in range(PRUNES_MAX):
            if not await self._sql.webhooks.prune(endpoint_id, before_ms=before_ms, keep=LOG_MAX):
                break
