"""Intended cancels: a payment is barred from being sold before its cancel reaches the PG."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("payment_attempts", sa.Column("cancel_intended_at_ms", sa.BigInteger()))


def downgrade() -> None:
    with op.batch_alter_table("payment_attempts") as table:
        table.drop_column("cancel_intended_at_ms")
