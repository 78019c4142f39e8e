"""Scheduled payment checks."""

from alembic import op
from sqlalchemy import BigInteger, Column, PrimaryKeyConstraint, Text

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

#: Ids compare by their bytes in both databases.
Id = Text().with_variant(Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "payment_checks",
        Column("payment_key", Id, nullable=False),
        Column("order_id", Id, nullable=False),
        Column("due_at_ms", BigInteger, nullable=False),
        Column("looks", BigInteger, nullable=False),
        PrimaryKeyConstraint("payment_key", name="pk_payment_checks"),
    )
    op.create_index("ix_payment_checks_due", "payment_checks", ["due_at_ms"])


def downgrade() -> None:
    op.drop_table("payment_checks")
