"""Rows of webhook endpoints and deliveries."""

import msgspec

__all__ = [
    "DeliveryResult",
    "DeliveryRow",
    "EndpointChange",
    "EndpointRow",
    "NewDelivery",
    "PendingDelivery",
]


class EndpointChange(msgspec.Struct, frozen=True, kw_only=True):
    """The members of an endpoint that an operator sets."""

    url: str
    #: Public types, or `*` alone for all of them.
    events: tuple[str, ...]
    sale_id: str | None
    description: str
    enabled: bool


class EndpointRow(EndpointChange, frozen=True, kw_only=True):
    """A webhook endpoint."""

    endpoint_id: str
    secret: str
    #: Signs too, until that instant.
    old_secret: str | None
    old_secret_until_ms: int | None
    created_by: str
    created_at_ms: int
    updated_at_ms: int
    position: int
    failing_since_ms: int | None
    disabled_reason: str | None


class NewDelivery(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery to add."""

    event_id: int
    message_id: str
    type: str
    sale_id: str
    order_id: str
    body: str


class PendingDelivery(NewDelivery, frozen=True, kw_only=True):
    """A delivery to attempt."""

    delivery_id: int
    attempts: int
    next_at_ms: int


class DeliveryRow(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery in the log."""

    delivery_id: int
    endpoint_id: str
    event_id: int
    message_id: str
    type: str
    sale_id: str
    order_id: str
    status: str
    attempts: int
    created_at_ms: int
    next_at_ms: int
    attempted_at_ms: int | None
    status_code: int | None
    error: str | None


class DeliveryResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an attempt."""

    delivery_id: int
    #: pending, delivered or failed.
    status: str
    attempts: int
    next_at_ms: int
    attempted_at_ms: int
    status_code: int | None
    error: str | None
