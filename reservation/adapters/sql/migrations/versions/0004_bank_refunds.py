"""The status of the bank transfer of a payment's refund."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("payments", sa.Column("account_refund", sa.Text()))


def downgrade() -> None:
    with op.batch_alter_table("payments") as table:
        table.drop_column("account_refund")
