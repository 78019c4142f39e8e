"""Retired sales: the time of each retirement."""

from alembic import op
from sqlalchemy import BigInteger, Column, text

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_RETIRED = text("retired_at_ms IS NOT NULL")


def upgrade() -> None:
    op.add_column("sales", Column("retired_at_ms", BigInteger()))
    op.create_index(
        "ix_sales_retired",
        "sales",
        ["retired_at_ms"],
        postgresql_where=_RETIRED,
        sqlite_where=_RETIRED,
    )


def downgrade() -> None:
    op.drop_index("ix_sales_retired", "sales")
    op.drop_column("sales", "retired_at_ms")
