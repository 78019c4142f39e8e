"""The tables of the event feed."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    PrimaryKeyConstraint,
    Table,
    Text,
)

from reservation.adapters.sql.tables.columns import Id, metadata, required

__all__ = ["feed_heads", "feed_notices", "feed_positions", "feed_ranges"]

# One row: the last id. Its lock makes its holder the only process that assigns ids.
feed_heads = Table(
    "feed_heads",
    metadata,
    Column("name", Text, nullable=False),
    Column("last_id", BigInteger, nullable=False),
    PrimaryKeyConstraint("name", name="pk_feed_heads"),
)


# The ids of events, a row per batch of one sale: its event `last_seq` has the id `last_id`, and the
# events before it have the ids before that. So an event costs no row and no index entry.
feed_ranges = Table(
    "feed_ranges",
    metadata,
    Column("last_id", BigInteger, nullable=False, autoincrement=False),
    Column("sale_id", Id, nullable=False),
    *required(BigInteger, "first_seq", "last_seq"),
    # The epoch in which the events happened.
    Column("epoch", Text, nullable=False),
    PrimaryKeyConstraint("last_id", name="pk_feed_ranges"),
    CheckConstraint("first_seq > 0 AND last_seq >= first_seq", name="ck_feed_ranges_seqs"),
    Index("ix_feed_ranges_of_sale", "sale_id", "last_id"),
)


# The position of each sale in the feed.
feed_positions = Table(
    "feed_positions",
    metadata,
    Column("sale_id", Id, nullable=False),
    # The last event that has an id, and the epoch after it.
    Column("seq", BigInteger, nullable=False),
    Column("epoch", Text, nullable=False),
    # The window after that event.
    *required(BigInteger, "opens_at_ms", "closes_at_ms"),
    # The sale's status at the last notice.
    Column("phase", Text, nullable=False),
    PrimaryKeyConstraint("sale_id", name="pk_feed_positions"),
)


# Changes of a sale that no event of the outbox marks: it opened, sold out, or closed.
feed_notices = Table(
    "feed_notices",
    metadata,
    Column("id", BigInteger, nullable=False, autoincrement=False),
    Column("sale_id", Id, nullable=False),
    Column("seq", BigInteger, nullable=False),
    *required(Text, "epoch", "type"),
    Column("at_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("id", name="pk_feed_notices"),
    Index("ix_feed_notices_of_sale", "sale_id", "id"),
)
