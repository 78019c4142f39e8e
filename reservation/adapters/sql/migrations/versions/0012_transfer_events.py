"""The events of transfers between the partitions of a sale."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_ID = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_EVENTS = (
    "'sale_put', 'sale_switched', 'restocked', {}'rebuilt', 'prepared', 'claimed', 'taken_over', "
    "'confirmed', 'awaiting_deposit', 'declined', 'voided', 'released', 'expired', 'refunded'"
)
_BEFORE = _EVENTS.format("")
_AFTER = _EVENTS.format("'lent', 'borrowed', ")


def upgrade() -> None:
    _allow(_AFTER)


def downgrade() -> None:
    _allow(_BEFORE)


def _allow(events: str) -> None:
    """Replace the list of event types; the rows stay."""
    if op.get_context().dialect.name != "sqlite":
        op.execute("ALTER TABLE events DROP CONSTRAINT ck_events_event")
        # The scan of the table delays the flushers; a constraint that is NOT VALID would differ
        # from that of a new installation.
        op.execute(f"ALTER TABLE events ADD CONSTRAINT ck_events_event CHECK (event IN ({events}))")
        return
    # SQLite cannot change a constraint. Nothing refers to the table.
    op.rename_table("events", "events_before")
    _create(events)
    op.execute(
        "INSERT INTO events (sale_id, seq, event, order_id, at_ms, data, chain)"
        " SELECT sale_id, seq, event, order_id, at_ms, data, chain FROM events_before"
    )
    op.drop_table("events_before")
    _create_indexes()


def _create(events: str) -> None:
    op.create_table(
        "events",
        sa.Column("sale_id", _ID, nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("order_id", _ID, nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.Text(), nullable=False),
        sa.Column("chain", sa.Text(), nullable=False),
        sa.CheckConstraint(f"event IN ({events})", name="ck_events_event"),
        sa.CheckConstraint("length(chain) = 40", name="ck_events_chain"),
        sa.CheckConstraint("seq > 0", name="ck_events_seq"),
        sa.ForeignKeyConstraint(["sale_id"], ["sales.sale_id"], name="fk_events_sale"),
        sa.PrimaryKeyConstraint("sale_id", "seq", name="pk_events"),
        sqlite_with_rowid=False,
    )


def _create_indexes() -> None:
    where = sa.text("order_id <> ''")
    op.create_index("ix_events_of_order", "events", ["order_id", "seq"], sqlite_where=where)
    for event in ("prepared", "refunded"):
        op.create_index(
            f"uq_events_{event}",
            "events",
            ["order_id"],
            unique=True,
            sqlite_where=sa.text(f"event = '{event}'"),
        )
