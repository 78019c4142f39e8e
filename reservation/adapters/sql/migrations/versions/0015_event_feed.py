"""The event feed, and the webhook endpoints with their deliveries."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Integer,
    PrimaryKeyConstraint,
    Text,
    text,
)

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

#: Ids compare by their bytes in both databases.
Id = Text().with_variant(Text(collation="C"), "postgresql")


def upgrade() -> None:
    _create_feed()
    _create_webhook_endpoints()
    _create_webhook_deliveries()


def _create_feed() -> None:
    op.create_table(
        "feed_heads",
        Column("name", Text, nullable=False),
        Column("last_id", BigInteger, nullable=False),
        PrimaryKeyConstraint("name", name="pk_feed_heads"),
    )
    op.create_table(
        "feed_ranges",
        Column("last_id", BigInteger, nullable=False, autoincrement=False),
        Column("sale_id", Id, nullable=False),
        Column("first_seq", BigInteger, nullable=False),
        Column("last_seq", BigInteger, nullable=False),
        Column("epoch", Text, nullable=False),
        PrimaryKeyConstraint("last_id", name="pk_feed_ranges"),
        CheckConstraint("first_seq > 0 AND last_seq >= first_seq", name="ck_feed_ranges_seqs"),
    )
    op.create_index("ix_feed_ranges_of_sale", "feed_ranges", ["sale_id", "last_id"])
    op.create_table(
        "feed_positions",
        Column("sale_id", Id, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("epoch", Text, nullable=False),
        Column("opens_at_ms", BigInteger, nullable=False),
        Column("closes_at_ms", BigInteger, nullable=False),
        Column("phase", Text, nullable=False),
        PrimaryKeyConstraint("sale_id", name="pk_feed_positions"),
    )
    op.create_table(
        "feed_notices",
        Column("id", BigInteger, nullable=False, autoincrement=False),
        Column("sale_id", Id, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("epoch", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("at_ms", BigInteger, nullable=False),
        PrimaryKeyConstraint("id", name="pk_feed_notices"),
    )
    op.create_index("ix_feed_notices_of_sale", "feed_notices", ["sale_id", "id"])


def _create_webhook_endpoints() -> None:
    op.create_table(
        "webhook_endpoints",
        Column("endpoint_id", Id, nullable=False),
        Column("url", Text, nullable=False),
        Column("events_json", Text, nullable=False),
        Column("sale_id", Id),
        Column("description", Text, nullable=False),
        Column("enabled", Boolean, nullable=False),
        Column("secret", Text, nullable=False),
        Column("old_secret", Text),
        Column("old_secret_until_ms", BigInteger),
        Column("created_by", Text, nullable=False),
        Column("created_at_ms", BigInteger, nullable=False),
        Column("updated_at_ms", BigInteger, nullable=False),
        Column("position", BigInteger, nullable=False),
        Column("failing_since_ms", BigInteger),
        Column("disabled_reason", Text),
        Column("lease_holder", Text),
        Column("lease_until_ms", BigInteger, nullable=False, server_default="0"),
        PrimaryKeyConstraint("endpoint_id", name="pk_webhook_endpoints"),
    )


def _create_webhook_deliveries() -> None:
    op.create_table(
        "webhook_deliveries",
        Column(
            "delivery_id",
            BigInteger().with_variant(Integer, "sqlite"),
            nullable=False,
            autoincrement=True,
        ),
        Column("endpoint_id", Id, nullable=False),
        Column("event_id", BigInteger, nullable=False),
        Column("message_id", Text, nullable=False),
        Column("type", Text, nullable=False),
        Column("sale_id", Id, nullable=False),
        Column("order_id", Id, nullable=False),
        Column("body", Text, nullable=False),
        Column("status", Text, nullable=False),
        Column("attempts", BigInteger, nullable=False, server_default="0"),
        Column("created_at_ms", BigInteger, nullable=False),
        Column("next_at_ms", BigInteger, nullable=False),
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
    )
    op.create_index(
        "ix_webhook_deliveries_of_endpoint", "webhook_deliveries", ["endpoint_id", "delivery_id"]
    )
    op.create_index(
        "ix_webhook_deliveries_pending",
        "webhook_deliveries",
        ["endpoint_id", "event_id"],
        postgresql_where=text("status = 'pending'"),
        sqlite_where=text("status = 'pending'"),
    )


def downgrade() -> None:
    for table in (
        "webhook_deliveries",
        "webhook_endpoints",
        "feed_notices",
        "feed_positions",
        "feed_ranges",
        "feed_heads",
    ):
        op.drop_table(table)
