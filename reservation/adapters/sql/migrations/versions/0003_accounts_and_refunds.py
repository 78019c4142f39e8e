"""Virtual accounts of payments; leases and replaced wishes of refunds."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_OF_PAYMENTS = ("account_bank", "account_number", "account_holder")
_OF_REFUNDS = ("lease_until_ms", "unanswered", "earlier_json")


def upgrade() -> None:
    for name in _OF_PAYMENTS:
        op.add_column("payments", sa.Column(name, sa.Text()))
    for column in (
        sa.Column("lease_until_ms", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("unanswered", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("earlier_json", sa.Text(), nullable=False, server_default="[]"),
    ):
        op.add_column("refunds", column)
    # A cancel of a refund that was pending before may have left, and no row says so.
    op.execute("UPDATE refunds SET unanswered = TRUE WHERE status = 'pending'")


def downgrade() -> None:
    for name, columns in (("refunds", _OF_REFUNDS), ("payments", _OF_PAYMENTS)):
        with op.batch_alter_table(name) as table:
            for column in reversed(columns):
                table.drop_column(column)
