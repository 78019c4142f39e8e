"""Wire schemas of webhook endpoints and deliveries."""

from typing import Annotated, Any

from msgspec import Meta

from api.http.schemas.base import WORDS, RequestModel, ResponseModel
from reservation.adapters.sql.webhook_rows import DeliveryRow, EndpointChange, EndpointRow
from reservation.domain.clock import as_wire
from reservation.domain.ids import SALE_ID

__all__ = [
    "DeliveriesAnswer",
    "DeliveryAnswer",
    "EndpointAnswer",
    "EndpointRequest",
    "EndpointsAnswer",
    "ReplayRequest",
    "SecretEndpointAnswer",
]

_ID_MAX = 2**53 - 1


class EndpointRequest(RequestModel, frozen=True, kw_only=True):
    """A webhook endpoint as an operator wants it."""

    url: Annotated[str, Meta(min_length=1, max_length=2_000)]
    events: Annotated[
        list[str], Meta(min_length=1, max_length=20, description="Types, or `*` for all of them.")
    ]
    #: Only events of this sale.
    sale_id: Annotated[str, Meta(pattern=SALE_ID)] | None = None
    description: Annotated[str, Meta(max_length=200, pattern=f"(?:{WORDS})|^$")] = ""
    enabled: bool = True

    def change(self) -> EndpointChange:
        """The members for the use case."""
        return EndpointChange(
            url=self.url,
            events=tuple(self.events),
            sale_id=self.sale_id,
            description=self.description,
            enabled=self.enabled,
        )


class ReplayRequest(RequestModel, frozen=True, kw_only=True):
    """Deliver the events after this id again."""

    after: Annotated[int, Meta(ge=0, le=_ID_MAX)]


class EndpointAnswer(ResponseModel, frozen=True, kw_only=True):
    """A webhook endpoint, without its secret."""

    id: str
    url: str
    events: list[str]
    sale_id: str | None
    description: str
    enabled: bool
    #: Why the service disabled it; null otherwise.
    disabled_reason: str | None
    #: The first failure since the last success; null if the last attempt succeeded.
    failing_since: str | None
    #: Up to this id of the event feed, deliveries exist.
    position: int
    created_by: str
    created_at: str
    updated_at: str

    @classmethod
    def of(cls, row: EndpointRow) -> "EndpointAnswer":
        """The endpoint on the wire."""
        return cls(**_members(row))


class SecretEndpointAnswer(EndpointAnswer, frozen=True, kw_only=True):
    """A new endpoint, or one with a new secret: the only response that has the secret."""

    secret: str
    #: Until then the secret before signs too; null for a new endpoint.
    old_secret_until: str | None

    @classmethod
    def of(cls, row: EndpointRow) -> "SecretEndpointAnswer":
        """The endpoint on the wire, with its secret."""
        return cls(
            **_members(row), secret=row.secret, old_secret_until=_wire(row.old_secret_until_ms)
        )


class EndpointsAnswer(ResponseModel, frozen=True, kw_only=True):
    """All webhook endpoints, oldest first."""

    endpoints: list[EndpointAnswer]


class DeliveryAnswer(ResponseModel, frozen=True, kw_only=True):
    """One delivery of the log."""

    id: int
    endpoint_id: str
    #: 0 for a test.
    event_id: int
    #: The header `webhook-id`.
    webhook_id: str
    type: str
    sale_id: str | None
    order_id: str | None
    #: pending, delivered or failed.
    status: str
    attempts: int
    created_at: str
    #: While pending.
    next_attempt_at: str | None
    last_attempt_at: str | None
    #: Of the last response.
    status_code: int | None
    #: timeout, refused_address, connection or closed; null after a response.
    error: str | None

    @classmethod
    def of(cls, row: DeliveryRow) -> "DeliveryAnswer":
        """The delivery on the wire."""
        return cls(
            id=row.delivery_id,
            endpoint_id=row.endpoint_id,
            event_id=row.event_id,
            webhook_id=row.message_id,
            type=row.type,
            sale_id=row.sale_id or None,
            order_id=row.order_id or None,
            status=row.status,
            attempts=row.attempts,
            created_at=as_wire(row.created_at_ms),
            next_attempt_at=_wire(row.next_at_ms) if row.status == "pending" else None,
            last_attempt_at=_wire(row.attempted_at_ms),
            status_code=row.status_code,
            error=row.error,
        )


class DeliveriesAnswer(ResponseModel, frozen=True, kw_only=True):
    """A page of deliveries, newest first."""

    deliveries: list[DeliveryAnswer]
    next_cursor: str | None


def _wire(ms: int | None) -> str | None:
    return None if ms is None else as_wire(ms)


def _members(row: EndpointRow) -> dict[str, Any]:
    return {
        "id": row.endpoint_id,
        "url": row.url,
        "events": list(row.events),
        "sale_id": row.sale_id,
        "description": row.description,
        "enabled": row.enabled,
        "disabled_reason": row.disabled_reason,
        "failing_since": _wire(row.failing_since_ms),
        "position": row.position,
        "created_by": row.created_by,
        "created_at": as_wire(row.created_at_ms),
        "updated_at": as_wire(row.updated_at_ms),
    }
