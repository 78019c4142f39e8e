"""Operators' keys and requests, and an index of the sales' own events."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Integer,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    text,
)

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

#: Ids compare by their bytes in both databases.
Id = Text().with_variant(Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "operator_keys",
        Column("key_id", Id, nullable=False),
        Column("name", Text, nullable=False),
        Column("role", Text, nullable=False),
        Column("digest", Text, nullable=False),
        Column("hint", Text, nullable=False),
        Column("created_by", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("created_at_ms", BigInteger, nullable=False),
        Column("revoked_at_ms", BigInteger),
        Column("revoked_by", Text),
        Column("revoked_reason", Text),
        PrimaryKeyConstraint("key_id", name="pk_operator_keys"),
        UniqueConstraint("digest", name="uq_operator_keys_digest"),
        CheckConstraint("length(digest) = 64", name="ck_operator_keys_digest"),
    )
    op.create_index("ix_operator_keys_newest", "operator_keys", ["created_at_ms", "key_id"])
    op.create_table(
        "order_requests",
        Column(
            "request_id",
            BigInteger().with_variant(Integer, "sqlite"),
            nullable=False,
            autoincrement=True,
        ),
        Column("order_id", Id, nullable=False),
        Column("payment_key", Id, nullable=False),
        Column("kind", Text, nullable=False),
        Column("operator", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("created_at_ms", BigInteger, nullable=False),
        Column("due_at_ms", BigInteger, nullable=False),
        Column("tries", BigInteger, nullable=False, server_default="0"),
        Column("ended_at_ms", BigInteger),
        Column("status", Text),
        PrimaryKeyConstraint("request_id", name="pk_order_requests"),
    )
    op.create_index("ix_order_requests_of_order", "order_requests", ["order_id", "request_id"])
    _partial("ix_order_requests_due", "order_requests", ["due_at_ms"], "ended_at_ms IS NULL")
    op.create_table(
        "sale_requests",
        Column("sale_id", Id, nullable=False),
        Column("created_at_ms", BigInteger, nullable=False),
        Column("kind", Text, nullable=False),
        Column("operator", Text, nullable=False),
        Column("reason", Text, nullable=False),
        PrimaryKeyConstraint("sale_id", "kind", name="pk_sale_requests"),
    )
    _partial("ix_events_of_sale", "events", ["sale_id", "seq"], "order_id = ''")


def _partial(name: str, table: str, columns: list[str], condition: str) -> None:
    op.create_index(
        name,
        table,
        columns,
        postgresql_where=text(condition),
        sqlite_where=text(condition),
    )


def downgrade() -> None:
    op.drop_index("ix_events_of_sale", table_name="events")
    op.drop_table("sale_requests")
    op.drop_table("order_requests")
    op.drop_table("operator_keys")
