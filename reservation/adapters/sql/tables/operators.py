"""The tables of operators: their keys, and their requests that no event records."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
)

from reservation.adapters.sql.tables.columns import Id, metadata, only_where, required

__all__ = ["operator_keys", "order_requests", "sale_requests"]

# Keys are stored as their SHA-256; a revoked key keeps its row.
operator_keys = Table(
    "operator_keys",
    metadata,
    Column("key_id", Id, nullable=False),
    *required(Text, "name", "role", "digest", "hint", "created_by", "reason"),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("revoked_at_ms", BigInteger),
    Column("revoked_by", Text),
    Column("revoked_reason", Text),
    PrimaryKeyConstraint("key_id", name="pk_operator_keys"),
    UniqueConstraint("digest", name="uq_operator_keys_digest"),
    CheckConstraint("length(digest) = 64", name="ck_operator_keys_digest"),
    Index("ix_operator_keys_newest", "created_at_ms", "key_id"),
)


# No foreign key: Redis may be ahead of SQL, which does not have the order yet.
order_requests = Table(
    "order_requests",
    metadata,
    Column(
        "request_id",
        BigInteger().with_variant(Integer, "sqlite"),
        nullable=False,
        autoincrement=True,
    ),
    *required(Id, "order_id", "payment_key"),
    # `release` or `resolve`.
    Column("kind", Text, nullable=False),
    # Empty if the buyer made the request.
    Column("operator", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    # The next try; no earlier than another process's try may last.
    Column("due_at_ms", BigInteger, nullable=False),
    Column("tries", BigInteger, nullable=False, server_default="0"),
    # NULL while the request is pending.
    Column("ended_at_ms", BigInteger),
    # The order's status at that time.
    Column("status", Text),
    PrimaryKeyConstraint("request_id", name="pk_order_requests"),
    Index("ix_order_requests_of_order", "order_id", "request_id"),
    only_where("ix_order_requests_due", "due_at_ms", condition="ended_at_ms IS NULL"),
)


# Requests to archive a sale: an archived sale takes no further event.
sale_requests = Table(
    "sale_requests",
    metadata,
    Column("sale_id", Id, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    *required(Text, "kind", "operator", "reason"),
    PrimaryKeyConstraint("sale_id", "kind", name="pk_sale_requests"),
)
