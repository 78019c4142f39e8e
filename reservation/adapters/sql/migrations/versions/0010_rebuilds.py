"""Rebuilds: the rebuild in progress, or the last one, of each sale."""

from alembic import op
from sqlalchemy import BigInteger, Column, PrimaryKeyConstraint, Text

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

#: Ids compare by their bytes in both databases.
Id = Text().with_variant(Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "rebuilds",
        Column("sale_id", Id, nullable=False),
        Column("epoch", Text, nullable=False),
        Column("from_epoch", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("beat", BigInteger, nullable=False),
        Column("acknowledged_seq", BigInteger, nullable=False),
        Column("saved_seq", BigInteger),
        Column("began_at_ms", BigInteger, nullable=False),
        Column("ended_at_ms", BigInteger),
        PrimaryKeyConstraint("sale_id", name="pk_rebuilds"),
    )


def downgrade() -> None:
    op.drop_table("rebuilds")
