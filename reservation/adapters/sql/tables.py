"""The tables of the newest migration.

Instants are BIGINT Unix milliseconds, as in Redis and in its events: no time zone, no rounding, a
total order. The wire converts them. Amounts are integers in the currency's minor unit.

    sales 1--1 cursors                  the last event written from the outbox
    sales 1--n items                    the items on sale, each with four counters
    sales 1--n orders 1--n order_lines  the state of each order after its last event
    sales 1--n events                   every change, chained by hash
    sales 1--n stock_movements          the counter changes of each event
    payment_attempts 1--n payment_intents   written before the PG is asked for money
    payment_answers, payments, refunds      answers of the PG, their payments, refunds
    payment_checks                          payments to look up again, with a due time
    marks, processes, losses            high-water marks of Redis, and lost events
    installation                        the level of the installation
    rebuilds                            the last rebuild of each sale
    transfers                           the lends of each partition, which is a row of `sales`
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

from reservation.domain.events import EventName
from reservation.domain.states import SaleStatus, Status

__all__ = [
    "cursors",
    "events",
    "items",
    "losses",
    "marks",
    "metadata",
    "order_lines",
    "orders",
    "payment_answers",
    "payment_attempts",
    "payment_intents",
    "payments",
    "probes",
    "processes",
    "rebuilds",
    "refunds",
    "sales",
    "stock_movements",
    "transfers",
]

#: Ids compare by bytes in both databases, whatever the locale of PostgreSQL: pages have the same
#: order, and indexes use fast byte comparison.
Id = Text().with_variant(Text(collation="C"), "postgresql")

metadata = MetaData()


def _one_of(column: str, words: Iterable[str]) -> str:
    quoted = ", ".join(f"'{word}'" for word in words)
    return f"{column} IN ({quoted})"


def _required(kind: type[Text | BigInteger] | Text, *names: str) -> list[Column[Any]]:
    """Columns of one type that are never NULL."""
    return [Column(name, kind, nullable=False) for name in names]


def _only_where(name: str, *columns: str, condition: str, unique: bool = False) -> Index:
    """A partial index."""
    return Index(
        name,
        *columns,
        unique=unique,
        postgresql_where=text(condition),
        sqlite_where=text(condition),
    )


sales = Table(
    "sales",
    metadata,
    Column("sale_id", Id, nullable=False),
    Column("epoch", Text, nullable=False),
    # The operator's request that created the sale, before Redis had it.
    Column("document", Text, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    # The following columns come from events; NULL until the first one is written.
    Column("name", Text),
    Column("currency", Text),
    Column("settings", Text),
    Column("version", BigInteger, nullable=False),
    Column("switched", Text, nullable=False),
    # The time of the retirement; NULL while Redis has the sale and its orders.
    Column("retired_at_ms", BigInteger),
    PrimaryKeyConstraint("sale_id", name="pk_sales"),
    CheckConstraint("length(epoch) = 16", name="ck_sales_epoch"),
    CheckConstraint("version >= 0", name="ck_sales_version"),
    CheckConstraint(
        _one_of("switched", (SaleStatus.OPEN, SaleStatus.PAUSED, SaleStatus.CLOSED)),
        name="ck_sales_switched",
    ),
    _only_where("ix_sales_retired", "retired_at_ms", condition="retired_at_ms IS NOT NULL"),
)

# A separate table, because a batch locks its row until it commits: foreign-key checks lock the
# sale's row, and must not wait for the flusher.
cursors = Table(
    "cursors",
    metadata,
    Column("sale_id", Id, nullable=False),
    Column("flushed_seq", BigInteger, nullable=False),
    Column("flushed_chain", Text, nullable=False),
    PrimaryKeyConstraint("sale_id", name="pk_cursors"),
    ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_cursors_sale"),
    CheckConstraint("flushed_seq >= 0", name="ck_cursors_flushed_seq"),
)

items = Table(
    "items",
    metadata,
    Column("sale_id", Id, nullable=False),
    Column("sku", Id, nullable=False),
    Column("name", Text, nullable=False),
    *_required(BigInteger, "price", "limit_per_buyer", "total", "available", "held", "sold"),
    # False once an operator removed it from the sale; the row stays for the orders that name it.
    Column("listed", Boolean, nullable=False),
    PrimaryKeyConstraint("sale_id", "sku", name="pk_items"),
    ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_items_sale"),
    CheckConstraint("price >= 0", name="ck_items_price"),
    CheckConstraint("limit_per_buyer > 0", name="ck_items_limit"),
    CheckConstraint("available >= 0 AND held >= 0 AND sold >= 0", name="ck_items_counters"),
    CheckConstraint("total = available + held + sold", name="ck_items_sum"),
)

orders = Table(
    "orders",
    metadata,
    *_required(Id, "order_id", "sale_id", "buyer_id"),
    Column("status", Text, nullable=False),
    Column("amount", BigInteger, nullable=False),
    *_required(Text, "currency", "order_name", "digest"),
    *_required(BigInteger, "created_at_ms", "updated_at_ms", "expires_at_ms"),
    # The seq of the order's last event: only a higher one updates the row.
    Column("seq", BigInteger, nullable=False),
    Column("fence", BigInteger, nullable=False),
    # Of the latest attempt. Not unique: a claim may name another order's key; it is then voided.
    Column("payment_key", Text),
    Column("claimed_at_ms", BigInteger),
    Column("lease_until_ms", BigInteger),
    Column("due_at_ms", BigInteger),
    PrimaryKeyConstraint("order_id", name="pk_orders"),
    ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_orders_sale"),
    CheckConstraint(_one_of("status", Status), name="ck_orders_status"),
    CheckConstraint("amount >= 0", name="ck_orders_amount"),
    CheckConstraint("seq > 0 AND fence >= 0", name="ck_orders_seq"),
    CheckConstraint(
        "status NOT IN ('CONFIRMING', 'AWAITING_DEPOSIT', 'CONFIRMED') OR payment_key IS NOT NULL",
        name="ck_orders_paid_by_a_key",
    ),
    # No index includes the status, so that PostgreSQL can use HOT updates.
    Index("ix_orders_newest", "created_at_ms", "order_id"),
    Index("ix_orders_of_sale", "sale_id", "created_at_ms", "order_id"),
    Index("ix_orders_of_buyer", "buyer_id", "created_at_ms", "order_id"),
)

order_lines = Table(
    "order_lines",
    metadata,
    Column("order_id", Id, nullable=False),
    Column("position", Integer, nullable=False),
    Column("sku", Id, nullable=False),
    Column("quantity", BigInteger, nullable=False),
    Column("price", BigInteger, nullable=False),
    PrimaryKeyConstraint("order_id", "sku", name="pk_order_lines"),
    ForeignKeyConstraint(["order_id"], ["orders.order_id"], name="fk_order_lines_order"),
    CheckConstraint("quantity > 0", name="ck_order_lines_quantity"),
    CheckConstraint("price >= 0", name="ck_order_lines_price"),
    sqlite_with_rowid=False,
)

events = Table(
    "events",
    metadata,
    Column("sale_id", Id, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("event", Text, nullable=False),
    # Empty for the sale's own events.
    Column("order_id", Id, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("data", Text, nullable=False),
    Column("chain", Text, nullable=False),
    PrimaryKeyConstraint("sale_id", "seq", name="pk_events"),
    ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_events_sale"),
    CheckConstraint(_one_of("event", EventName), name="ck_events_event"),
    CheckConstraint("seq > 0", name="ck_events_seq"),
    CheckConstraint("length(chain) = 40", name="ck_events_chain"),
    _only_where("ix_events_of_order", "order_id", "seq", condition="order_id <> ''"),
    # REFUNDED is the only terminal state, and `prepared` is always first: an order has each of them
    # once.
    _only_where("uq_events_refunded", "order_id", condition="event = 'refunded'", unique=True),
    _only_where("uq_events_prepared", "order_id", condition="event = 'prepared'", unique=True),
    sqlite_with_rowid=False,
)

stock_movements = Table(
    "stock_movements",
    metadata,
    Column("sale_id", Id, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("sku", Id, nullable=False),
    *_required(BigInteger, "delta_available", "delta_held", "delta_sold", "delta_total"),
    PrimaryKeyConstraint("sale_id", "seq", "sku", name="pk_stock_movements"),
    CheckConstraint(
        "delta_total = delta_available + delta_held + delta_sold", name="ck_stock_movements_sum"
    ),
    sqlite_with_rowid=False,
)

payment_attempts = Table(
    "payment_attempts",
    metadata,
    *_required(Id, "payment_key", "order_id", "sale_id"),
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
    _only_where(
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
    *_required(Id, "order_id", "payment_key"),
    *_required(Text, "kind", "answer"),
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
    *_required(BigInteger, "total_amount", "balance_amount"),
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
    _only_where("ix_refunds_pending", "created_at_ms", condition="status = 'pending'"),
)

payment_checks = Table(
    "payment_checks",
    metadata,
    Column("payment_key", Id, nullable=False),
    Column("order_id", Id, nullable=False),
    *_required(BigInteger, "due_at_ms", "looks"),
    PrimaryKeyConstraint("payment_key", name="pk_payment_checks"),
    Index("ix_payment_checks_due", "due_at_ms"),
)

# No foreign keys: marks outlive their sale.
marks = Table(
    "marks",
    metadata,
    Column("process", Id, nullable=False),
    Column("sale_id", Id, nullable=False),
    Column("epoch", Text, nullable=False),
    Column("seq", BigInteger, nullable=False),
    # Empty if only the number is known.
    Column("chain", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("process", "sale_id", name="pk_marks"),
    Index("ix_marks_of_sale", "sale_id"),
)

processes = Table(
    "processes",
    metadata,
    Column("process", Id, nullable=False),
    # The run id of the server that it writes to; empty while it writes to none.
    Column("run_id", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("process", name="pk_processes"),
)

losses = Table(
    "losses",
    metadata,
    Column("sale_id", Id, nullable=False),
    *_required(Text, "epoch", "reason"),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("sale_id", "epoch", name="pk_losses"),
)

# The rebuild in progress, or the last one, of each sale.
rebuilds = Table(
    "rebuilds",
    metadata,
    Column("sale_id", Id, nullable=False),
    # The epoch that it gives the sale, and the one that lost events.
    *_required(Text, "epoch", "from_epoch", "reason"),
    # Counts up while the rebuild runs.
    Column("beat", BigInteger, nullable=False),
    # The last event that a process had seen.
    Column("acknowledged_seq", BigInteger, nullable=False),
    # The last event in SQL once it had all that survived in Redis; NULL before.
    Column("saved_seq", BigInteger),
    Column("began_at_ms", BigInteger, nullable=False),
    Column("ended_at_ms", BigInteger),
    PrimaryKeyConstraint("sale_id", name="pk_rebuilds"),
)

# One row that the readiness check writes: it detects a full disk before a buyer's request does.
probes = Table(
    "probes",
    metadata,
    Column("name", Id, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", name="pk_probes"),
)

# One row: the level.
installation = Table(
    "installation",
    metadata,
    Column("name", Text, nullable=False),
    Column("value", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", name="pk_installation"),
)

# One row per restore of a backup, oldest first. Sales open once `opened_at_ms` is set.
restores = Table(
    "restores",
    metadata,
    Column("number", BigInteger, nullable=False, autoincrement=False),
    # The instant of the backup: later changes may be missing.
    Column("taken_at_ms", BigInteger, nullable=False),
    Column("restored_at_ms", BigInteger, nullable=False),
    Column("operator", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("compared_at_ms", BigInteger),
    # Whether that comparison lacked the gateway's list, as an operator requested.
    Column("without_list", Boolean, nullable=False, server_default=false()),
    Column("opened_at_ms", BigInteger),
    Column("opened_by", Text),
    Column("opened_reason", Text),
    PrimaryKeyConstraint("number", name="pk_restores"),
    CheckConstraint("taken_at_ms <= restored_at_ms", name="ck_restores_times"),
)

# Payments that the gateway lists and that SQL lacks or has in another state.
differences = Table(
    "differences",
    metadata,
    *_required(Id, "gateway", "payment_key", "order_id"),
    *_required(Text, "kind", "ours", "theirs"),
    Column("amount", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("found_at_ms", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    PrimaryKeyConstraint("gateway", "payment_key", name="pk_differences"),
    CheckConstraint("state IN ('open', 'settled')", name="ck_differences_state"),
    _only_where("ix_differences_open", "order_id", condition="state = 'open'"),
)

# One row per purge of a retired sale; from its last event then the audit checks the chain.
purges = Table(
    "purges",
    metadata,
    Column("sale_id", Id, nullable=False),
    Column("seq", BigInteger, nullable=False),
    *(Column(name, Text, nullable=False) for name in ("chain", "operator", "reason")),
    Column("begun_at_ms", BigInteger, nullable=False),
    Column("done_at_ms", BigInteger),
    *(
        Column(name, BigInteger, nullable=False, server_default="0")
        for name in ("orders", "events", "movements", "answers")
    ),
    PrimaryKeyConstraint("sale_id", name="pk_purges"),
)

# The lends of each partition (`sale_id`), each written with its event: SQL therefore has every
# event of the donor up to it.
transfers = Table(
    "transfers",
    metadata,
    Column("sale_id", Id, nullable=False),
    # The partition that gets the units.
    Column("receiver", BigInteger, nullable=False),
    Column("sku", Id, nullable=False),
    # `up_to`: the units of all lends of these three up to this number.
    *_required(BigInteger, "number", "units", "up_to", "seq"),
    Column("operation", Text, nullable=False),
    PrimaryKeyConstraint("sale_id", "receiver", "sku", "number", name="pk_transfers"),
    ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_transfers_sale"),
    CheckConstraint("number > 0 AND units > 0 AND up_to >= units", name="ck_transfers_units"),
    sqlite_with_rowid=False,
)
