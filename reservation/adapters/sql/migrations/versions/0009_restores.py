"""Restores of a backup, and payments of the gateway that SQL lacks."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    PrimaryKeyConstraint,
    Text,
    false,
    text,
)

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

#: Ids compare by their bytes in both databases.
Id = Text().with_variant(Text(collation="C"), "postgresql")

_OPEN = text("state = 'open'")


def upgrade() -> None:
    op.create_table(
        "restores",
        Column("number", BigInteger, nullable=False, autoincrement=False),
        Column("taken_at_ms", BigInteger, nullable=False),
        Column("restored_at_ms", BigInteger, nullable=False),
        Column("operator", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("compared_at_ms", BigInteger),
        Column("without_list", Boolean, nullable=False, server_default=false()),
        Column("opened_at_ms", BigInteger),
        Column("opened_by", Text),
        Column("opened_reason", Text),
        PrimaryKeyConstraint("number", name="pk_restores"),
        CheckConstraint("taken_at_ms <= restored_at_ms", name="ck_restores_times"),
    )
    op.create_table(
        "differences",
        Column("gateway", Id, nullable=False),
        Column("payment_key", Id, nullable=False),
        Column("order_id", Id, nullable=False),
        Column("kind", Text, nullable=False),
        Column("ours", Text, nullable=False),
        Column("theirs", Text, nullable=False),
        Column("amount", BigInteger, nullable=False),
        Column("currency", Text, nullable=False),
        Column("found_at_ms", BigInteger, nullable=False),
        Column("state", Text, nullable=False),
        PrimaryKeyConstraint("gateway", "payment_key", name="pk_differences"),
        CheckConstraint("state IN ('open', 'settled')", name="ck_differences_state"),
    )
    op.create_index(
        "ix_differences_open",
        "differences",
        ["order_id"],
        postgresql_where=_OPEN,
        sqlite_where=_OPEN,
    )


def downgrade() -> None:
    op.drop_table("differences")
    op.drop_table("restores")
