"""The tables of the installation: marks, processes, losses, rebuilds, restores, level."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    PrimaryKeyConstraint,
    Table,
    Text,
    false,
)

from reservation.adapters.sql.tables.columns import Id, metadata, required

__all__ = ["installation", "losses", "marks", "probes", "processes", "rebuilds", "restores"]

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
    *required(Text, "epoch", "reason"),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("sale_id", "epoch", name="pk_losses"),
)


# The rebuild in progress, or the last one, of each sale.
rebuilds = Table(
    "rebuilds",
    metadata,
    Column("sale_id", Id, nullable=False),
    # The epoch that it gives the sale, and the one that lost events.
    *required(Text, "epoch", "from_epoch", "reason"),
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
