"""Webhooks: unsigned notifications of changes to every registered address, retried."""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import uuid4

import msgspec
import structlog
from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector
from yarl import URL

from reservation.domain.clock import Clock, as_datetime
from reservation.sandbox.payment_format import KST, payment_view, time_text
from reservation.sandbox.state_records import PaymentRecord

__all__ = ["Webhooks"]

log = structlog.get_logger(__name__)

#: Minutes before each further try, as the PG documents them.
RETRY_MINUTES = (1, 4, 16, 64, 256, 1024, 4096)

#: The PG's time-out for the 200.
ANSWER_SECONDS = 10.0

#: Deliveries in progress or waiting for their next try. One more is dropped and counted: its
#: receiver must cope with a lost webhook anyway.
PENDING_MAX = 10_000

#: Posts at once.
POSTS_MAX = 16

#: Idle time-out of a connection, below that of common servers (5 s).
IDLE_SECONDS = 3.0

#: Times that a storm sends each webhook.
STORM_TIMES = 20

#: Statuses that are notified.
_NOTIFIED = frozenset(
    {"DONE", "ABORTED", "EXPIRED", "CANCELED", "PARTIAL_CANCELED", "WAITING_FOR_DEPOSIT"}
)


class _Delivery(msgspec.Struct, frozen=True):
    url: str
    body: bytes
    transmission_id: str


class Webhooks:
    """The sender. Undelivered webhooks die with the sandbox: a real webhook may be lost as well."""

    def __init__(self, urls: tuple[str, ...], clock: Clock, *, scale: float) -> None:
        for url in urls:
            address = URL(url)
            if address.scheme not in {"http", "https"} or not address.host:
                raise ValueError(f"{url} is not a usable webhook URL")
        self._urls = urls
        self._clock = clock
        self._scale = scale
        self._tasks: asyncio.TaskGroup | None = None
        self._deliveries: set[asyncio.Task[None]] = set()
        self._session: ClientSession | None = None
        self._posts = asyncio.Semaphore(POSTS_MAX)
        self._encode = msgspec.json.Encoder().encode
        self.counts = {"pending": 0, "delivered": 0, "retried": 0, "failed": 0, "dropped": 0}

    @asynccontextmanager
    async def sending(self) -> AsyncGenerator[None]:
        """Deliver until the block ends; pending deliveries are abandoned then."""
        session = ClientSession(
            connector=TCPConnector(limit=POSTS_MAX, keepalive_timeout=IDLE_SECONDS),
            cookie_jar=DummyCookieJar(),
            trust_env=False,
            timeout=ClientTimeout(total=ANSWER_SECONDS),
        )
        async with session:
            self._session = session
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                try:
                    yield
                finally:
                    self._tasks = None
                    for delivery in self._deliveries:
                        delivery.cancel()

    def publish(self, record: PaymentRecord) -> None:
        """Send a webhook for a payment that changed."""
        if self._urls and record.status in _NOTIFIED:
            for body in self._bodies(record):
                self._deliver(body)

    def storm(self, record: PaymentRecord) -> None:
        """Send twenty webhooks for a payment, with older states among the current ones."""
        old = [
            msgspec.structs.replace(record, status=status)
            for status in ("ABORTED", "CANCELED", "EXPIRED")
        ]
        bodies = [body for state in (record, *old) for body in self._bodies(state)]
        storm = [body for body in bodies for _ in range(STORM_TIMES)]
        random.Random(record.payment_key).shuffle(storm)  # noqa: S311 - an order, not a secret
        for body in storm:
            self._deliver(body)

    def _bodies(self, record: PaymentRecord) -> list[bytes]:
        now_ms = self._clock.now_ms()
        # Six digits and no zone: the PG's format, and a trap for parsers.
        created_at = f"{as_datetime(now_ms).astimezone(KST):%Y-%m-%dT%H:%M:%S.%f}"
        changed = {
            "eventType": "PAYMENT_STATUS_CHANGED",
            "createdAt": created_at,
            "data": payment_view(record, now_ms=now_ms),
        }
        if record.due_at_ms is None:
            return [self._encode(changed)]
        deposit = {
            "createdAt": created_at,
            "secret": record.secret,
            "status": record.status,
            "transactionKey": record.last_transaction_key,
            "orderId": record.order_id,
        }
        return [self._encode(changed), self._encode(deposit)]

    def _deliver(self, body: bytes) -> None:
        for url in self._urls:
            if self._tasks is None or self.counts["pending"] >= PENDING_MAX:
                self.counts["dropped"] += 1
                continue
            self.counts["pending"] += 1
            task = self._tasks.create_task(self._send(_Delivery(url, body, str(uuid4()))))
            self._deliveries.add(task)
            task.add_done_callback(self._deliveries.discard)

    async def _send(self, delivery: _Delivery) -> None:
        """Post until the receiver answers 200 or the tries are used up."""
        try:
            for retried, pause_minutes in enumerate((*RETRY_MINUTES, None)):
                if await self._post(delivery, retried):
                    self.counts["delivered"] += 1
                    return
                if pause_minutes is not None:
                    self.counts["retried"] += 1
                    await asyncio.sleep(pause_minutes * 60 * self._scale)
            self.counts["failed"] += 1
            log.warning("webhook_failed", url=delivery.url)
        finally:
            self.counts["pending"] -= 1

    async def _post(self, delivery: _Delivery, retried: int) -> bool:
        if self._session is None:
            return False
        headers = {
            "content-type": "application/json",
            "tosspayments-webhook-transmission-id": delivery.transmission_id,
            "tosspayments-webhook-transmission-time": time_text(self._clock.now_ms()) or "",
            "tosspayments-webhook-transmission-retried-count": str(retried),
        }
        try:
            async with (
                self._posts,
                self._session.post(
                    delivery.url, data=delivery.body, headers=headers, allow_redirects=False
                ) as response,
            ):
                return response.status == 200
        # OSError, ValueError: aiohttp passes on errors of connections and names. Unhandled, one
        # would end the task group and the whole sandbox.
        except (ClientError, OSError, ValueError) as error:
            log.debug("webhook_not_acknowledged", url=delivery.url, error=type(error).__name__)
            return False
