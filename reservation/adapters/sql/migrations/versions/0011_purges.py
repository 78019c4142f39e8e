"""The records of purges."""

from alembic import op
from sqlalchemy import BigInteger, Column, PrimaryKeyConstraint, Text

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

#: Ids compare by their bytes in both databases.
Id = Text().with_variant(Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "purges",
        Column("sale_id", Id, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("chain", Text, nullable=False),
        Column("operator", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("begun_at_ms", BigInteger, nullable=False),
        Column("done_at_ms", BigInteger),
        Column("orders", BigInteger, nullable=False, server_default="0"),
        Column("events", BigInteger, nullable=False, server_default="0"),
        Column("movements", BigInteger, nullable=False, server_default="0"),
        Column("answers", BigInteger, nullable=False, server_default="0"),
        PrimaryKeyConstraint("sale_id", name="pk_purges"),
    )


def downgrade() -> None:
    op.drop_table("purges")
