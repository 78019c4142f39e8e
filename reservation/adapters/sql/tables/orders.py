"""The tables of orders."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
)

from reservation.adapters.sql.tables.columns import Id, metadata, one_of, required
from reservation.domain.states import Status

__all__ = ["order_lines", "orders"]

orders = Table(
    "orders",
    metadata,
    *required(Id, "order_id", "sale_id", "buyer_id"),
    Column("status", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    *required(Text, "currency", "order_name", "digest"),
    *required(BigInteger, "created_at_ms", "updated_at_ms", "expires_at_ms"),
    # The seq of the order's last event: only a higher one updates the row.
    Column("seq", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    # Of the latest attempt. Not unique: a claim may name another order's key; it is then voided.
    Column("payment_key", Text),
    Column("claimed_at_ms", BigInteger),
    Column("lease_until_ms", BigInteger),
    Column("due_at_ms", BigInteger),
    PrimaryKeyConstraint("order_id", name="pk_orders"),
    ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_orders_sale"),
    CheckConstraint(one_of("status", Status), name="ck_orders_status"),
    CheckConstraint("amount >= 0", name="ck_orders_amount"),
    CheckConstraint("seq > 0 AND fence >= 0", name="ck_orders_seq"),
    CheckConstraint(
        "status NOT IN ('CONFIRMING', 'AWAITING_DEPOSIT', 'CONFIRMED') OR payment_key IS NOT NULL",
        name="ck_orders_paid_by_a_key",
    ),
    # No index includes the status, so that PostgreSQL can use HOT updates.
    Index("ix_orders_newest", "created_at_ms", "order_id"),
    Index("ix_orders_of_sale", "sale_id", "created_at_ms", "order_id"),
    Index("ix_orders_of_buyer", "buyer_id", "created_at_ms", "order_id"),
)


order_lines = Table(
    "order_lines",
    metadata,
    Column("order_id", Id, nullable=False),
    Column("position", Integer, nullable=False),
    Column("sku", Id, nullable=False),
    Column("quantity", BigInteger, nullable=False),
    Column("price", BigInteger, nullable=False),
    PrimaryKeyConstraint("order_id", "sku", name="pk_order_lines"),
    ForeignKeyConstraint(["order_id"], ["orders.order_id"], name="fk_order_lines_order"),
    CheckConstraint("quantity > 0", name="ck_order_lines_quantity"),
    CheckConstraint("price >= 0", name="ck_order_lines_price"),
    sqlite_with_rowid=False,
)
