"""The transfers between the partitions of a sale."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    PrimaryKeyConstraint,
    Text,
)

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

#: Ids compare by their bytes in both databases.
Id = Text().with_variant(Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "transfers",
        Column("sale_id", Id, nullable=False),
        Column("receiver", BigInteger, nullable=False),
        Column("sku", Id, nullable=False),
        Column("number", BigInteger, nullable=False),
        Column("units", BigInteger, nullable=False),
        Column("up_to", BigInteger, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("operation", Text, nullable=False),
        PrimaryKeyConstraint("sale_id", "receiver", "sku", "number", name="pk_transfers"),
        ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_transfers_sale"),
        CheckConstraint("number > 0 AND units > 0 AND up_to >= units", name="ck_transfers_units"),
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("transfers")
