"""High-water marks, losses of Redis, and intents from which an order can be recreated."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Column, PrimaryKeyConstraint, Text

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

#: Ids compare by their bytes in both databases.
Id = Text().with_variant(Text(collation="C"), "postgresql")

_OPEN = "kind = 'intent' AND ended_at_ms IS NULL"
#: An intent has ended, as far as old rows can show, if its order in SQL is past the claim.
_ENDED = """
UPDATE payment_intents SET ended_at_ms = created_at_ms
WHERE kind = 'intent' AND EXISTS (
    SELECT 1 FROM orders
    WHERE orders.order_id = payment_intents.order_id
      AND orders.fence >= payment_intents.fence
      AND (orders.status <> 'CONFIRMING' OR orders.payment_key <> payment_intents.payment_key))
"""


def upgrade() -> None:
    op.create_table(
        "marks",
        Column("process", Id, nullable=False),
        Column("sale_id", Id, nullable=False),
        Column("epoch", Text, nullable=False),
        Column("seq", BigInteger, nullable=False),
        Column("chain", Text, nullable=False),
        Column("at_ms", BigInteger, nullable=False),
        PrimaryKeyConstraint("process", "sale_id", name="pk_marks"),
    )
    op.create_index("ix_marks_of_sale", "marks", ["sale_id"])
    op.create_table(
        "processes",
        Column("process", Id, nullable=False),
        Column("run_id", Text, nullable=False),
        Column("at_ms", BigInteger, nullable=False),
        PrimaryKeyConstraint("process", name="pk_processes"),
    )
    op.create_table(
        "losses",
        Column("sale_id", Id, nullable=False),
        Column("epoch", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("at_ms", BigInteger, nullable=False),
        PrimaryKeyConstraint("sale_id", "epoch", name="pk_losses"),
    )
    op.add_column("payment_intents", Column("epoch", Text))
    op.add_column("payment_intents", Column("reservation", Text))
    op.add_column("payment_intents", Column("ended_at_ms", BigInteger))
    op.execute(_ENDED)
    op.create_index(
        "ix_payment_intents_open",
        "payment_intents",
        ["sale_id", "order_id"],
        postgresql_where=sa.text(_OPEN),
        sqlite_where=sa.text(_OPEN),
    )


def downgrade() -> None:
    op.drop_index("ix_payment_intents_open", "payment_intents")
    with op.batch_alter_table("payment_intents") as table:
        table.drop_column("ended_at_ms")
        table.drop_column("reservation")
        table.drop_column("epoch")
    op.drop_table("losses")
    op.drop_table("processes")
    op.drop_table("marks")
