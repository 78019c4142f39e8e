"""Webhooks of one endpoint: deliveries made from the feed, and sent in order for each order.

    1. fan out  events after the endpoint's position become pending deliveries, in one transaction
                with the position; at most `WINDOW` are pending, the rest stays in the feed
    2. send     the first pending delivery of each order, several orders at once
    3. record   delivered, or pending until the next attempt, or failed after the last one

A later delivery of an order waits for the earlier one. The caller has the endpoint's lease, so no
other process sends to it. A crash between 2 and 3 repeats deliveries under the same `webhook-id`.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
import structlog

from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.webhook_rows import (
    DeliveryResult,
    EndpointRow,
    NewDelivery,
    PendingDelivery,
)
from reservation.adapters.webhooks.sender import Attempt, WebhookSender
from reservation.application.events.feed import EventFeed, FeedEvent
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock, as_wire
from reservation.domain.event_types import WEBHOOK_TYPES
from reservation.domain.webhooks import RETRIES, RetrySchedule, signatures
from reservation.telemetry.metrics import WEBHOOK_DELIVERIES, alarm

__all__ = ["ALL_TYPES", "EndpointDelivery", "delivery_of"]

log = structlog.get_logger(__name__)

#: Matches every type that a webhook can have.
ALL_TYPES: Final = "*"
#: Pending deliveries of one endpoint: about 1 MB in memory and in the log.
WINDOW: Final = 1_000
#: Events of one transaction.
PAGE: Final = 500
#: Attempts to one endpoint at the same time.
AT_ONCE: Final = 8
#: Results of attempts that are stored together, and how long one waits for others.
RECORD_MAX: Final = 50
RECORD_SECONDS: Final = 0.25
#: A round ends after this many failures without a success: the endpoint is down.
FAILURES_MAX: Final = 8

_TYPES: Final = frozenset(WEBHOOK_TYPES)


class EndpointDelivery:
    """Sends the webhooks of one endpoint.

    Args:
        endpoint_id: the endpoint.
        sql: the store.
        feed: of the events.
        sender: sends one webhook.
        clock: for due times.
        holder: the name under which this process has the lease.
        may_send: whether the lease lasts for another attempt.
        schedule: the pauses between attempts.
    """

    def __init__(
        self,
        endpoint_id: str,
        *,
        sql: SqlStore,
        feed: EventFeed,
        sender: WebhookSender,
        clock: Clock,
        holder: str,
        may_send: Callable[[], bool],
        schedule: RetrySchedule = RETRIES,
    ) -> None:
        self._endpoint_id = endpoint_id
        self._sql = sql
        self._feed = feed
        self._sender = sender
        self._clock = clock
        self._holder = holder
        self._may_send = may_send
        self._schedule = schedule

    async def run_once(self) -> int:
        """Fan out, and attempt the deliveries that are due; how many attempts were made."""
        endpoint = await self._sql.webhooks.get(self._endpoint_id)
        if endpoint is None or not endpoint.enabled or not self._may_send():
            return 0
        pending = await self._sql.webhooks.list_pending(self._endpoint_id, WINDOW)
        if len(pending) < WINDOW and await self._fan_out(endpoint, WINDOW - len(pending)):
            pending = await self._sql.webhooks.list_pending(self._endpoint_id, WINDOW)
        chains = _due_chains(pending, self._clock.now_ms())
        if not chains:
            return 0
        return await _Round(self._sql, self._clock, endpoint, self._attempt, chains).run()

    async def _fan_out(self, endpoint: EndpointRow, room: int) -> int:
        """Make deliveries of the next events; returns how many."""
        position, made = endpoint.position, 0
        while made < room:
            page = await self._feed.page(
                after=position, limit=min(PAGE, room - made), sale_id=endpoint.sale_id
            )
            if page.next == position:
                break
            added = [delivery_of(event) for event in page.events if _wants(endpoint, event.type)]
            if not await self._sql.webhooks.fan_out(
                endpoint.endpoint_id,
                holder=self._holder,
                position=position,
                to=page.next,
                added=added,
                now_ms=self._clock.now_ms(),
            ):
                break
            position, made = page.next, made + len(added)
        return made

    async def _attempt(
        self, endpoint: EndpointRow, delivery: PendingDelivery
    ) -> tuple[Attempt, DeliveryResult] | None:
        """One attempt; None if the lease does not last for it."""
        if not self._may_send():
            return None
        now_ms = self._clock.now_ms()
        timestamp, body = now_ms // 1000, delivery.body.encode()
        headers = {
            "webhook-id": delivery.message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signatures(
                _keys(endpoint, now_ms),
                message_id=delivery.message_id,
                timestamp=timestamp,
                body=body,
            ),
        }
        attempt = await self._sender.send(endpoint.url, headers, body)
        return attempt, self._result(delivery, attempt)

    def _result(self, delivery: PendingDelivery, attempt: Attempt) -> DeliveryResult:
        now_ms, attempts = self._clock.now_ms(), delivery.attempts + 1
        status, next_at_ms = "delivered", now_ms
        if not attempt.delivered:
            pause = self._schedule.pause(attempts, random.random())  # noqa: S311 - jitter
            status = "pending"
            if attempt.gone:
                # The endpoint is disabled; if an operator enables it, the delivery is due.
                attempts = delivery.attempts
            elif pause is None:
                status = "failed"
            else:
                next_at_ms = now_ms + round(max(pause, attempt.retry_after or 0.0) * 1000)
        WEBHOOK_DELIVERIES.labels("retried" if status == "pending" else status).inc()
        return DeliveryResult(
            delivery_id=delivery.delivery_id,
            status=status,
            attempts=attempts,
            next_at_ms=next_at_ms,
            attempted_at_ms=now_ms,
            status_code=attempt.status,
            error=attempt.error,
        )


class _Round:
    """The attempts of one round."""

    def __init__(
        self,
        sql: SqlStore,
        clock: Clock,
        endpoint: EndpointRow,
        attempt: Callable[[EndpointRow, PendingDelivery], Any],
        chains: deque[deque[PendingDelivery]],
    ) -> None:
        self._sql = sql
        self._clock = clock
        self._endpoint = endpoint
        self._attempt = attempt
        self._chains = chains
        self._failing_since_ms = endpoint.failing_since_ms
        self._results: list[DeliveryResult] = []
        self._made = 0
        self._failures = 0
        self._succeeded = False
        self._gone = False
        self._recorded = asyncio.Lock()

    async def run(self) -> int:
        """Attempt the due deliveries; the number of attempts."""
        sending = [
            asyncio.create_task(self._send()) for _ in range(min(AT_ONCE, len(self._chains)))
        ]
        try:
            await self._record_until(sending)
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
            # Also where the process ends: results that are lost are deliveries that repeat.
            await self._record()
        for task in sending:
            task.result()
        if self._gone:
            await self._disable()
        return self._made

    async def _send(self) -> None:
        while self._chains and not self._is_over():
            chain = self._chains.popleft()
            while chain and not self._is_over():
                found = await self._attempt(self._endpoint, chain.popleft())
                if found is None:
                    return
                attempt, result = found
                self._take(attempt, result)
                if result.status == "pending":
                    break

    def _is_over(self) -> bool:
        return self._gone or (self._failures >= FAILURES_MAX and not self._succeeded)

    def _take(self, attempt: Attempt, result: DeliveryResult) -> None:
        self._made += 1
        self._results.append(result)
        if attempt.delivered:
            self._succeeded, self._failing_since_ms = True, None
            return
        self._failures += 1
        self._gone = self._gone or attempt.gone
        if not self._succeeded and self._failing_since_ms is None:
            self._failing_since_ms = result.attempted_at_ms

    async def _record_until(self, sending: list[asyncio.Task[None]]) -> None:
        while not all(task.done() for task in sending):
            await asyncio.wait(sending, timeout=RECORD_SECONDS)
            await self._record()

    async def _record(self) -> None:
        async with self._recorded:
            results, self._results = self._results, []
            if not results:
                return
            try:
                await self._sql.webhooks.record(
                    self._endpoint.endpoint_id,
                    results,
                    failing_since_ms=self._failing_since_ms,
                )
            except BaseException:
                self._results = results + self._results
                raise

    async def _disable(self) -> None:
        endpoint_id = self._endpoint.endpoint_id
        await self._sql.webhooks.disable(endpoint_id, "410 Gone", self._clock.now_ms())
        alarm(Alarm.WEBHOOK_ENDPOINT_DISABLED, endpoint_id=endpoint_id)


def delivery_of(event: FeedEvent) -> NewDelivery:
    """The webhook of an event. The same event has the same bytes, for every endpoint and replay."""
    body = {
        "type": event.type,
        "timestamp": as_wire(event.at_ms),
        "id": event.id,
        "saleId": event.sale_id,
        "partition": event.partition,
        "seq": event.seq,
        "epoch": event.epoch,
        "data": event.data,
    }
    return NewDelivery(
        event_id=event.id,
        message_id=f"evt_{event.id}",
        type=event.type,
        sale_id=event.sale_id,
        order_id=event.order_id or "",
        body=msgspec.json.encode(body).decode(),
    )


def _wants(endpoint: EndpointRow, kind: str) -> bool:
    return kind in _TYPES and (ALL_TYPES in endpoint.events or kind in endpoint.events)


def _keys(endpoint: EndpointRow, now_ms: int) -> tuple[str, ...]:
    """The secrets that sign now: the new one, and for a time the one before."""
    if endpoint.old_secret and (endpoint.old_secret_until_ms or 0) > now_ms:
        return endpoint.secret, endpoint.old_secret
    return (endpoint.secret,)


def _due_chains(pending: list[PendingDelivery], now_ms: int) -> deque[deque[PendingDelivery]]:
    """The deliveries of each order whose first one is due, in order.

    A sale's events are a chain of their own, and so is each test.
    """
    chains: dict[str, deque[PendingDelivery]] = {}
    for delivery in pending:
        key = delivery.order_id or (
            f"sale {delivery.sale_id}" if delivery.event_id else delivery.message_id
        )
        chains.setdefault(key, deque()).append(delivery)
    return deque(chain for chain in chains.values() if chain[0].next_at_ms <= now_ms)
