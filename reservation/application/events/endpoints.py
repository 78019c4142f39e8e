"""Operators' use cases of webhook endpoints."""

import secrets
from typing import Any, Final

import msgspec
import structlog

from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.webhook_rows import (
    DeliveryRow,
    EndpointChange,
    EndpointRow,
    NewDelivery,
)
from reservation.adapters.webhooks.addresses import RefusedAddress
from reservation.adapters.webhooks.sender import WebhookSender
from reservation.application.events.delivery import ALL_TYPES
from reservation.domain.clock import Clock, as_wire
from reservation.domain.errors import (
    InvalidWebhookEndpoint,
    WebhookDeliveryNotFound,
    WebhookEndpointDisabled,
    WebhookEndpointNotFound,
)
from reservation.domain.event_types import WEBHOOK_TYPES
from reservation.domain.webhooks import new_secret

__all__ = ["WebhookEndpoints"]

log = structlog.get_logger(__name__)

#: Endpoints of an installation: each has a task, and up to 1,000 pending deliveries.
ENDPOINTS_MAX: Final = 50
#: How long the secret before a rotation signs too.
ROTATION_SECONDS: Final = 24 * 3_600.0
_ID_BYTES: Final = 12
_TEST: Final = "webhook.test"


class WebhookEndpoints:
    """Creates, changes and tests endpoints, and repeats their deliveries."""

    def __init__(self, sql: SqlStore, sender: WebhookSender, *, clock: Clock) -> None:
        self._sql = sql
        self._sender = sender
        self._clock = clock

    async def create(self, change: EndpointChange, operator: str) -> EndpointRow:
        """Add an endpoint; it receives the events that happen from now on.

        Raises:
            InvalidWebhookEndpoint: the URL or a type is not allowed, or there are too many.
        """
        self._check(change)
        if len(await self._sql.webhooks.list_all()) >= ENDPOINTS_MAX:
            raise InvalidWebhookEndpoint(f"There are {ENDPOINTS_MAX} webhook endpoints already.")
        now_ms = self._clock.now_ms()
        row = EndpointRow(
            **msgspec.structs.asdict(change),
            endpoint_id=f"we_{secrets.token_hex(_ID_BYTES)}",
            secret=new_secret(),
            old_secret=None,
            old_secret_until_ms=None,
            created_by=operator,
            created_at_ms=now_ms,
            updated_at_ms=now_ms,
            position=await self._sql.feed.last_id(),
            failing_since_ms=None,
            disabled_reason=None,
        )
        await self._sql.webhooks.add(row)
        log.info("webhook_endpoint_created", endpoint_id=row.endpoint_id, operator=operator)
        return row

    async def get(self, endpoint_id: str) -> EndpointRow:
        """The endpoint.

        Raises:
            WebhookEndpointNotFound: there is none.
        """
        row = await self._sql.webhooks.get(endpoint_id)
        if row is None:
            raise WebhookEndpointNotFound
        return row

    async def change(self, endpoint_id: str, change: EndpointChange, operator: str) -> EndpointRow:
        """Replace the members that an operator sets.

        Raises:
            InvalidWebhookEndpoint, WebhookEndpointNotFound: nothing was changed.
        """
        self._check(change)
        if not await self._sql.webhooks.change(endpoint_id, change, self._clock.now_ms()):
            raise WebhookEndpointNotFound
        log.info("webhook_endpoint_changed", endpoint_id=endpoint_id, operator=operator)
        return await self.get(endpoint_id)

    async def remove(self, endpoint_id: str, operator: str) -> None:
        """Remove an endpoint with the log of its deliveries.

        Raises:
            WebhookEndpointNotFound: there is none.
        """
        if not await self._sql.webhooks.remove(endpoint_id):
            raise WebhookEndpointNotFound
        log.info("webhook_endpoint_removed", endpoint_id=endpoint_id, operator=operator)

    async def rotate(self, endpoint_id: str, operator: str) -> EndpointRow:
        """Replace the secret; the old one signs too for 24 hours.

        Raises:
            WebhookEndpointNotFound: there is none.
        """
        now_ms = self._clock.now_ms()
        until_ms = now_ms + round(ROTATION_SECONDS * 1000)
        if not await self._sql.webhooks.rotate(
            endpoint_id, secret=new_secret(), until_ms=until_ms, now_ms=now_ms
        ):
            raise WebhookEndpointNotFound
        log.info("webhook_secret_rotated", endpoint_id=endpoint_id, operator=operator)
        return await self.get(endpoint_id)

    async def test(self, endpoint_id: str, operator: str) -> DeliveryRow:
        """Send a webhook of the type `webhook.test`.

        Raises:
            WebhookEndpointNotFound, WebhookEndpointDisabled: nothing is sent.
        """
        await self._enabled(endpoint_id)
        now_ms = self._clock.now_ms()
        message_id = f"test_{secrets.token_hex(_ID_BYTES)}"
        body: dict[str, Any] = {
            "type": _TEST,
            "timestamp": as_wire(now_ms),
            "id": 0,
            "saleId": None,
            "partition": 0,
            "seq": 0,
            "epoch": None,
            "data": {},
        }
        added = NewDelivery(
            event_id=0,
            message_id=message_id,
            type=_TEST,
            sale_id="",
            order_id="",
            body=msgspec.json.encode(body).decode(),
        )
        log.info("webhook_test", endpoint_id=endpoint_id, operator=operator)
        return await self._sql.webhooks.add_test(endpoint_id, added, now_ms)

    async def replay(self, endpoint_id: str, after: int, operator: str) -> EndpointRow:
        """Deliver all events after this id again, those in the log included.

        Raises:
            WebhookEndpointNotFound: there is none.
        """
        if not await self._sql.webhooks.replay(endpoint_id, after):
            raise WebhookEndpointNotFound
        log.info("webhook_replay", endpoint_id=endpoint_id, after=after, operator=operator)
        return await self.get(endpoint_id)

    async def resend(self, delivery_id: int, operator: str) -> DeliveryRow:
        """Deliver once more, with all attempts, under the same `webhook-id`.

        Raises:
            WebhookDeliveryNotFound: the log does not have it.
            WebhookEndpointDisabled: its endpoint is disabled.
        """
        row = await self._sql.webhooks.delivery(delivery_id)
        if row is None:
            raise WebhookDeliveryNotFound
        await self._enabled(row.endpoint_id)
        log.info("webhook_resend", delivery_id=delivery_id, operator=operator)
        row = await self._sql.webhooks.resend(delivery_id, self._clock.now_ms())
        if row is None:
            raise WebhookDeliveryNotFound
        return row

    async def _enabled(self, endpoint_id: str) -> None:
        if not (await self.get(endpoint_id)).enabled:
            raise WebhookEndpointDisabled

    def _check(self, change: EndpointChange) -> None:
        try:
            self._sender.check(change.url)
        except RefusedAddress as error:
            raise InvalidWebhookEndpoint(str(error)) from error
        if ALL_TYPES in change.events and len(change.events) > 1:
            raise InvalidWebhookEndpoint("`*` stands for all types: name it alone.")
        known = {ALL_TYPES, *WEBHOOK_TYPES}
        unknown = [kind for kind in change.events if kind not in known]
        if unknown or not change.events or len(set(change.events)) != len(change.events):
            raise InvalidWebhookEndpoint(
                f"events must be `*`, or different ones of {', '.join(WEBHOOK_TYPES)}."
            )
