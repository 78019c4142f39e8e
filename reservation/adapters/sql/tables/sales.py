"""The tables of sales: their settings, counters, events and transfers of stock."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    PrimaryKeyConstraint,
    Table,
    Text,
)

from reservation.adapters.sql.tables.columns import Id, metadata, one_of, only_where, required
from reservation.domain.events import EventName
from reservation.domain.states import SaleStatus

__all__ = ["cursors", "events", "items", "purges", "sales", "stock_movements", "transfers"]

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
        one_of("switched", (SaleStatus.OPEN, SaleStatus.PAUSED, SaleStatus.CLOSED)),
        name="ck_sales_switched",
    ),
    only_where("ix_sales_retired", "retired_at_ms", condition="retired_at_ms IS NOT NULL"),
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
    *required(BigInteger, "price", "limit_per_buyer", "total", "available", "held", "sold"),
    # False once an operator removed it from the sale; the row stays for the orders that name it.
    Column("listed", Boolean, nullable=False),
    PrimaryKeyConstraint("sale_id", "sku", name="pk_items"),
    ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_items_sale"),
    CheckConstraint("price >= 0", name="ck_items_price"),
    CheckConstraint("limit_per_buyer > 0", name="ck_items_limit"),
    CheckConstraint("available >= 0 AND held >= 0 AND sold >= 0", name="ck_items_counters"),
    CheckConstraint("total = available + held + sold", name="ck_items_sum"),
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
    CheckConstraint(one_of("event", EventName), name="ck_events_event"),
    CheckConstraint("seq > 0", name="ck_events_seq"),
    CheckConstraint("length(chain) = 40", name="ck_events_chain"),
    only_where("ix_events_of_order", "order_id", "seq", condition="order_id <> ''"),
    only_where("ix_events_of_sale", "sale_id", "seq", condition="order_id = ''"),
    # REFUNDED is the only terminal state, and `prepared` is always first: an order has each of them
    # once.
    only_where("uq_events_refunded", "order_id", condition="event = 'refunded'", unique=True),
    only_where("uq_events_prepared", "order_id", condition="event = 'prepared'", unique=True),
    sqlite_with_rowid=False,
)


stock_movements = Table(
    "stock_movements",
    metadata,
    Column("sale_id", Id, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("sku", Id, nullable=False),
    *required(BigInteger, "delta_available", "delta_held", "delta_sold", "delta_total"),
    PrimaryKeyConstraint("sale_id", "seq", "sku", name="pk_stock_movements"),
    CheckConstraint(
        "delta_total = delta_available + delta_held + delta_sold", name="ck_stock_movements_sum"
    ),
    sqlite_with_rowid=False,
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
    *required(BigInteger, "number", "units", "up_to", "seq"),
    Column("operation", Text, nullable=False),
    PrimaryKeyConstraint("sale_id", "receiver", "sku", "number", name="pk_transfers"),
    ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_transfers_sale"),
    CheckConstraint("number > 0 AND units > 0 AND up_to >= units", name="ck_transfers_units"),
    sqlite_with_rowid=False,
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
