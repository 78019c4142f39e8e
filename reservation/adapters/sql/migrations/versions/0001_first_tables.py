"""The first tables.

Instants are BIGINT Unix milliseconds; `reservation/adapters/sql/tables/` documents each table.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    _create_sales()
    _create_orders()
    _create_events()
    _create_intents()
    _create_payments()
    _create_probes()
    _bar_the_way_out_of_refunded()


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER orders_refunded_stays ON orders")
        op.execute("DROP FUNCTION refuse_change_of_refunded")
    op.drop_table("probes")
    op.drop_table("refunds")
    op.drop_table("payments")
    op.drop_table("payment_answers")
    op.drop_table("payment_intents")
    op.drop_table("payment_attempts")
    op.drop_table("stock_movements")
    op.drop_table("events")
    op.drop_table("order_lines")
    op.drop_table("orders")
    op.drop_table("items")
    op.drop_table("cursors")
    op.drop_table("sales")


def _create_sales() -> None:
    op.create_table(
        "sales",
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("epoch", sa.Text(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("currency", sa.Text()),
        sa.Column("settings", sa.Text()),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("switched", sa.Text(), nullable=False),
        sa.CheckConstraint("switched IN ('open', 'paused', 'closed')", name="ck_sales_switched"),
        sa.CheckConstraint("length(epoch) = 16", name="ck_sales_epoch"),
        sa.CheckConstraint("version >= 0", name="ck_sales_version"),
        sa.PrimaryKeyConstraint("sale_id", name="pk_sales"),
    )
    op.create_table(
        "cursors",
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("flushed_seq", sa.BigInteger(), nullable=False),
        sa.Column("flushed_chain", sa.Text(), nullable=False),
        sa.CheckConstraint("flushed_seq >= 0", name="ck_cursors_flushed_seq"),
        sa.ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_cursors_sale"),
        sa.PrimaryKeyConstraint("sale_id", name="pk_cursors"),
    )
    op.create_table(
        "items",
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("sku", _ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("price", sa.BigInteger(), nullable=False),
        sa.Column("limit_per_buyer", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
        sa.Column("available", sa.BigInteger(), nullable=False),
        sa.Column("held", sa.BigInteger(), nullable=False),
        sa.Column("sold", sa.BigInteger(), nullable=False),
        sa.Column("listed", sa.Boolean(), nullable=False),
        sa.CheckConstraint("available >= 0 AND held >= 0 AND sold >= 0", name="ck_items_counters"),
        sa.CheckConstraint("limit_per_buyer > 0", name="ck_items_limit"),
        sa.CheckConstraint("price >= 0", name="ck_items_price"),
        sa.CheckConstraint("total = available + held + sold", name="ck_items_sum"),
        sa.ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_items_sale"),
        sa.PrimaryKeyConstraint("sale_id", "sku", name="pk_items"),
    )


def _create_orders() -> None:
    op.create_table(
        "orders",
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("buyer_id", _ID, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("order_name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("payment_key", sa.Text()),
        sa.Column("claimed_at_ms", sa.BigInteger()),
        sa.Column("lease_until_ms", sa.BigInteger()),
        sa.Column("due_at_ms", sa.BigInteger()),
        sa.CheckConstraint(
            "status IN ('PREPARED', 'HELD', 'CONFIRMING', 'AWAITING_DEPOSIT', 'CONFIRMED', "
            "'RELEASED', 'EXPIRED', 'REFUNDED')",
            name="ck_orders_status",
        ),
        sa.CheckConstraint(
            "status NOT IN ('CONFIRMING', 'AWAITING_DEPOSIT', 'CONFIRMED') OR payment_key IS NOT "
            "NULL",
            name="ck_orders_paid_by_a_key",
        ),
        sa.CheckConstraint("amount >= 0", name="ck_orders_amount"),
        sa.CheckConstraint("seq > 0 AND fence >= 0", name="ck_orders_seq"),
        sa.ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_orders_sale"),
        sa.PrimaryKeyConstraint("order_id", name="pk_orders"),
    )
    op.create_index("ix_orders_newest", "orders", ["created_at_ms", "order_id"])
    op.create_index("ix_orders_of_buyer", "orders", ["buyer_id", "created_at_ms", "order_id"])
    op.create_index("ix_orders_of_sale", "orders", ["sale_id", "created_at_ms", "order_id"])
    op.create_table(
        "order_lines",
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("sku", _ID, nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("price", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("price >= 0", name="ck_order_lines_price"),
        sa.CheckConstraint("quantity > 0", name="ck_order_lines_quantity"),
        sa.ForeignKeyConstraint(["order_id"], ["orders.order_id"], name="fk_order_lines_order"),
        sa.PrimaryKeyConstraint("order_id", "sku", name="pk_order_lines"),
        sqlite_with_rowid=False,
    )


def _create_events() -> None:
    op.create_table(
        "events",
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("chain", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "event IN ('sale_put', 'sale_switched', 'restocked', 'rebuilt', 'prepared', "
            "'claimed', 'taken_over', 'confirmed', 'awaiting_deposit', 'declined', 'voided', "
            "'released', 'expired', 'refunded')",
            name="ck_events_event",
        ),
        sa.CheckConstraint("length(chain) = 40", name="ck_events_chain"),
        sa.CheckConstraint("seq > 0", name="ck_events_seq"),
        sa.ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_events_sale"),
        sa.PrimaryKeyConstraint("sale_id", "seq", name="pk_events"),
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_events_of_order",
        "events",
        ["order_id", "seq"],
        postgresql_where=sa.text("order_id <> ''"),
        sqlite_where=sa.text("order_id <> ''"),
    )
    op.create_index(
        "uq_events_prepared",
        "events",
        ["order_id"],
        unique=True,
        postgresql_where=sa.text("event = 'prepared'"),
        sqlite_where=sa.text("event = 'prepared'"),
    )
    op.create_index(
        "uq_events_refunded",
        "events",
        ["order_id"],
        unique=True,
        postgresql_where=sa.text("event = 'refunded'"),
        sqlite_where=sa.text("event = 'refunded'"),
    )
    op.create_table(
        "stock_movements",
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("sku", _ID, nullable=False),
        sa.Column("delta_available", sa.BigInteger(), nullable=False),
        sa.Column("delta_held", sa.BigInteger(), nullable=False),
        sa.Column("delta_sold", sa.BigInteger(), nullable=False),
        sa.Column("delta_total", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "delta_total = delta_available + delta_held + delta_sold", name="ck_stock_movements_sum"
        ),
        sa.PrimaryKeyConstraint("sale_id", "seq", "sku", name="pk_stock_movements"),
        sqlite_with_rowid=False,
    )


def _create_intents() -> None:
    op.create_table(
        "payment_attempts",
        sa.Column("payment_key", _ID, nullable=False),
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("payment_key", name="pk_payment_attempts"),
        sa.UniqueConstraint("payment_key", "order_id", name="uq_payment_attempts_order"),
    )
    op.create_table(
        "payment_intents",
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("payment_key", _ID),
        sa.Column("amount", sa.BigInteger()),
        sa.Column("currency", sa.Text()),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "(kind = 'void' AND payment_key IS NULL AND amount IS NULL AND currency IS NULL AND "
            "idempotency_key IS NULL) OR (kind = 'intent' AND payment_key IS NOT NULL AND amount "
            "IS NOT NULL AND amount >= 0 AND currency IS NOT NULL AND idempotency_key IS NOT "
            "NULL)",
            name="ck_payment_intents_kind",
        ),
        sa.CheckConstraint("fence > 0", name="ck_payment_intents_fence"),
        sa.ForeignKeyConstraint(
            ["payment_key", "order_id"],
            ["payment_attempts.payment_key", "payment_attempts.order_id"],
            name="fk_payment_intents_attempt",
        ),
        sa.PrimaryKeyConstraint("order_id", "fence", name="pk_payment_intents"),
    )


def _create_payments() -> None:
    op.create_table(
        "payment_answers",
        sa.Column(
            "answer_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("payment_key", _ID, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("answer_id", name="pk_payment_answers"),
    )
    op.create_index("ix_payment_answers_of_order", "payment_answers", ["order_id", "answer_id"])
    op.create_table(
        "payments",
        sa.Column("payment_key", _ID, nullable=False),
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("total_amount", sa.BigInteger(), nullable=False),
        sa.Column("balance_amount", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("method", sa.Text()),
        sa.Column("approved_at_ms", sa.BigInteger()),
        sa.Column("secret", sa.Text()),
        sa.Column("due_at_ms", sa.BigInteger()),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("total_amount >= 0 AND balance_amount >= 0", name="ck_payments_amounts"),
        sa.PrimaryKeyConstraint("payment_key", name="pk_payments"),
    )
    op.create_index("ix_payments_of_order", "payments", ["order_id"])
    op.create_table(
        "refunds",
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("idempotency_key", _ID, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("restock", sa.Boolean(), nullable=False),
        sa.Column("operator", sa.Text(), nullable=False),
        sa.Column("account_json", sa.Text()),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("code", sa.Text()),
        sa.Column("created_at_ms", sa.BigInteger(), nullable=False),
        sa.Column("updated_at_ms", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("status IN ('pending', 'done', 'refused')", name="ck_refunds_status"),
        sa.PrimaryKeyConstraint("order_id", name="pk_refunds"),
        sa.UniqueConstraint("idempotency_key", name="uq_refunds_idempotency_key"),
    )
    op.create_index(
        "ix_refunds_pending",
        "refunds",
        ["created_at_ms"],
        postgresql_where=sa.text("status = 'pending'"),
        sqlite_where=sa.text("status = 'pending'"),
    )


def _create_probes() -> None:
    op.create_table(
        "probes",
        sa.Column("name", _ID, nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_probes"),
    )


def _bar_the_way_out_of_refunded() -> None:
    """REFUNDED is the only terminal status: a trigger on `orders` refuses to change it.

    The trigger does not prevent PostgreSQL's HOT updates; on both databases the condition costs
    nothing for any other row.
    """
    if op.get_bind().dialect.name == "postgresql":
        op.execute("""
            CREATE FUNCTION refuse_change_of_refunded() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                RAISE EXCEPTION 'order % is REFUNDED and stays so', OLD.order_id
                    USING ERRCODE = 'check_violation';
            END
            $$
        """)
        op.execute("""
            CREATE TRIGGER orders_refunded_stays BEFORE UPDATE ON orders FOR EACH ROW
            WHEN (OLD.status = 'REFUNDED' AND NEW.status <> 'REFUNDED')
            EXECUTE FUNCTION refuse_change_of_refunded()
        """)
        return
    op.execute("""
        CREATE TRIGGER orders_refunded_stays BEFORE UPDATE OF status ON orders FOR EACH ROW
        WHEN OLD.status = 'REFUNDED' AND NEW.status <> 'REFUNDED'
        BEGIN
            SELECT RAISE(ABORT, 'an order that is REFUNDED stays so');
        END
    """)
