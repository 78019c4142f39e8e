"""The tables of payments: attempts and intents, the gateway's responses, refunds, differences."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from reservation.adapters.sql.tables.columns import Id, metadata, only_where, required

__all__ = [
    "differences",
    "payment_answers",
    "payment_attempts",
    "payment_checks",
    "payment_intents",
    "payments",
    "refunds",
]

payment_attempts = Table(
    "payment_attempts",
    metadata,
    *required(Id, "payment_key", "order_id", "sale_id"),
    Column("created_at_ms", BigInteger, nullable=False),
    # Set before our cancel leaves, and never reset: see `payment_intents.py`.
    Column("cancel_intended_at_ms", BigInteger),
    PrimaryKeyConstraint("payment_key", name="pk_payment_attempts"),
    # Target of the intents' foreign key, so that no intent can name another order's key.
    UniqueConstraint("payment_key", "order_id", name="uq_payment_attempts_order"),
)


payment_intents = Table(
    "payment_intents",
    metadata,
    Column("order_id", Id, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("sale_id", Id, nullable=False),
    Column("kind", Text, nullable=False),
    Column("payment_key", Id),
    Column("amount", BigInteger),
    Column("currency", Text),
    Column("idempotency_key", Text),
    Column("created_at_ms", BigInteger, nullable=False),
    # The epoch in which Redis must have the intent's claim.
    Column("epoch", Text),
    # The order as JSON, to recreate an order that Redis lost before the flush.
    Column("reservation", Text),
    # When SQL received the outcome of the attempt; NULL while money may move and no order shows it.
    Column("ended_at_ms", BigInteger),
    # First writer wins: either the caller's intent or the settler's void.
    PrimaryKeyConstraint("order_id", "fence", name="pk_payment_intents"),
    ForeignKeyConstraint(
        ["payment_key", "order_id"],
        ["payment_attempts.payment_key", "payment_attempts.order_id"],
        name="fk_payment_intents_attempt",
    ),
    CheckConstraint("fence > 0", name="ck_payment_intents_fence"),
    CheckConstraint(
        "(kind = 'void' AND payment_key IS NULL AND amount IS NULL"
        " AND currency IS NULL AND idempotency_key IS NULL)"
        " OR (kind = 'intent' AND payment_key IS NOT NULL AND amount IS NOT NULL AND amount >= 0"
        " AND currency IS NOT NULL AND idempotency_key IS NOT NULL)",
        name="ck_payment_intents_kind",
    ),
    only_where(
        "ix_payment_intents_open",
        "sale_id",
        "order_id",
        condition="kind = 'intent' AND ended_at_ms IS NULL",
    ),
)


payment_answers = Table(
    "payment_answers",
    metadata,
    Column(
        "answer_id",
        BigInteger().with_variant(Integer, "sqlite"),
        nullable=False,
        autoincrement=True,
    ),
    *required(Id, "order_id", "payment_key"),
    *required(Text, "kind", "answer"),
    Column("created_at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("answer_id", name="pk_payment_answers"),
    Index("ix_payment_answers_of_order", "order_id", "answer_id"),
)


payments = Table(
    "payments",
    metadata,
    Column("payment_key", Id, nullable=False),
    Column("order_id", Id, nullable=False),
    Column("status", Text, nullable=False),
    *required(BigInteger, "total_amount", "balance_amount"),
    Column("currency", Text, nullable=False),
    Column("method", Text),
    Column("approved_at_ms", BigInteger),
    Column("secret", Text),
    Column("due_at_ms", BigInteger),
    Column("updated_at_ms", BigInteger, nullable=False),
    # The virtual account for the buyer's deposit.
    Column("account_bank", Text),
    Column("account_number", Text),
    Column("account_holder", Text),
    # The PG's status of the bank transfer of its refund.
    Column("account_refund", Text),
    PrimaryKeyConstraint("payment_key", name="pk_payments"),
    CheckConstraint("total_amount >= 0 AND balance_amount >= 0", name="ck_payments_amounts"),
    Index("ix_payments_of_order", "order_id"),
)


refunds = Table(
    "refunds",
    metadata,
    Column("order_id", Id, nullable=False),
    Column("idempotency_key", Id, nullable=False),
    Column("digest", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("restock", Boolean, nullable=False),
    Column("operator", Text, nullable=False),
    Column("account_json", Text),
    Column("status", Text, nullable=False),
    Column("code", Text),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    # End of the lease: one process at a time calls the PG.
    Column("lease_until_ms", BigInteger, nullable=False, server_default="0"),
    # Whether a cancel left that may still take effect: then the wish may not change.
    Column("unanswered", Boolean, nullable=False, server_default=false()),
    # The replaced wishes, JSON.
    Column("earlier_json", Text, nullable=False, server_default="[]"),
    PrimaryKeyConstraint("order_id", name="pk_refunds"),
    UniqueConstraint("idempotency_key", name="uq_refunds_idempotency_key"),
    CheckConstraint("status IN ('pending', 'done', 'refused')", name="ck_refunds_status"),
    only_where("ix_refunds_pending", "created_at_ms", condition="status = 'pending'"),
)


payment_checks = Table(
    "payment_checks",
    metadata,
    Column("payment_key", Id, nullable=False),
    Column("order_id", Id, nullable=False),
    *required(BigInteger, "due_at_ms", "looks"),
    PrimaryKeyConstraint("payment_key", name="pk_payment_checks"),
    Index("ix_payment_checks_due", "due_at_ms"),
)


# Payments that the gateway lists and that SQL lacks or has in another state.
differences = Table(
    "differences",
    metadata,
    *required(Id, "gateway", "payment_key", "order_id"),
    *required(Text, "kind", "ours", "theirs"),
    Column("amount", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("found_at_ms", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    PrimaryKeyConstraint("gateway", "payment_key", name="pk_differences"),
    CheckConstraint("state IN ('open', 'settled')", name="ck_differences_state"),
    only_where("ix_differences_open", "order_id", condition="state = 'open'"),
)
