"""The tables of webhook endpoints and deliveries."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
)

from reservation.adapters.sql.tables.columns import Id, metadata, only_where, required

__all__ = ["webhook_deliveries", "webhook_endpoints"]

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("endpoint_id", Id, nullable=False),
    *required(Text, "url", "events_json"),
    # NULL means all sales.
    Column("sale_id", Id),
    Column("description", Text, nullable=False),
    Column("enabled", Boolean, nullable=False),
    Column("secret", Text, nullable=False),
    # Signs beside the new secret until then.
    Column("old_secret", Text),
    Column("old_secret_until_ms", BigInteger),
    Column("created_by", Text, nullable=False),
    *required(BigInteger, "created_at_ms", "updated_at_ms"),
    # Up to this id of the feed, the endpoint's deliveries exist.
    Column("position", BigInteger, nullable=False),
    # The first failure since the last success.
    Column("failing_since_ms", BigInteger),
    # Why the service disabled it.
    Column("disabled_reason", Text),
    # The process that sends to it. One at a time, which keeps the order.
    Column("lease_holder", Text),
    Column("lease_until_ms", BigInteger, nullable=False, server_default="0"),
    PrimaryKeyConstraint("endpoint_id", name="pk_webhook_endpoints"),
)


webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column(
        "delivery_id",
        BigInteger().with_variant(Integer, "sqlite"),
        nullable=False,
        autoincrement=True,
    ),
    Column("endpoint_id", Id, nullable=False),
    # 0 for a test.
    Column("event_id", BigInteger, nullable=False),
    # The header `webhook-id`: the same for every attempt, and for a resend.
    *required(Text, "message_id", "type"),
    Column("sale_id", Id, nullable=False),
    # Empty for a sale's event. Deliveries of one order wait for each other.
    Column("order_id", Id, nullable=False),
    *required(Text, "body", "status"),
    Column("attempts", BigInteger, nullable=False, server_default="0"),
    *required(BigInteger, "created_at_ms", "next_at_ms"),
    # Of the last attempt; `error` is a word, NULL after a response.
    Column("attempted_at_ms", BigInteger),
    Column("status_code", BigInteger),
    Column("error", Text),
    PrimaryKeyConstraint("delivery_id", name="pk_webhook_deliveries"),
    ForeignKeyConstraint(
        ["endpoint_id"],
        ["webhook_endpoints.endpoint_id"],
        name="fk_webhook_deliveries_endpoint",
    ),
    CheckConstraint(
        "status IN ('pending', 'delivered', 'failed')", name="ck_webhook_deliveries_status"
    ),
    Index("ix_webhook_deliveries_of_endpoint", "endpoint_id", "delivery_id"),
    only_where(
        "ix_webhook_deliveries_pending", "endpoint_id", "event_id", condition="status = 'pending'"
    ),
)
