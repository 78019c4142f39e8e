"""The event feed in SQL: ids in commit order, and pages of events by id.

    1. a flusher commits events and the sale's cursor
    2. one process, by the lock of the row in `feed_heads`, assigns the next ids to all events up to
       the cursors, and commits
    3. readers see only events that have an id

So an event with a lower id never appears after one with a higher id was read. The flusher does
nothing for it: the ids of a batch are one row of `feed_ranges`.

A restored database lacks ids that were assigned after its backup. Ids after a restore begin at
another multiple of `RESTORE_IDS`, so that no id is used twice.
"""

from collections.abc import Collection
from typing import Any, Final

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    select,
)

from reservation.adapters.sql.bulk import among
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.feed_ids import (
    HEAD,
    add_notices,
    assign,
    changed_phases,
    unassigned,
)
from reservation.adapters.sql.tables import (
    events,
    feed_heads,
    feed_notices,
    feed_ranges,
    order_lines,
    orders,
)

__all__ = ["FeedRepository", "FeedRow", "OrderFacts"]


class FeedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One event with its id."""

    id: int
    #: The sale, or the partition's lane.
    sale_id: str
    seq: int
    epoch: str
    #: The outbox event's name; empty for a notice.
    event: str
    #: The notice's public type; empty for an outbox event.
    notice: str
    #: Empty for a sale's event.
    order_id: str
    at_ms: int
    #: JSON as the script wrote it.
    data: str


class OrderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The members of an order that never change."""

    order_id: str
    sale_id: str
    buyer_id: str
    amount: int
    currency: str
    order_name: str
    created_at_ms: int
    expires_at_ms: int
    #: (sku, quantity, price), in the buyer's order.
    lines: tuple[tuple[str, int, int], ...] = ()


_FACTS: Final = [orders.c[name] for name in OrderFacts.__struct_fields__[:-1]]


class FeedRepository:
    """Assigns ids to events, and reads pages of them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def assign(self) -> int:
        """Assign the next ids to committed events; how many, 0 also while another process does."""
        batches = await self._database.run_read(unassigned)
        if not batches:
            return 0
        return await self._database.run_write(lambda connection: assign(connection, batches))

    async def add_notices(self, now_ms: int) -> int:
        """Add a notice for each sale that has opened, sold out or closed since; how many."""
        changed = await self._database.run_read(
            lambda connection: changed_phases(connection, now_ms)
        )
        if not changed:
            return 0
        return await self._database.run_write(
            lambda connection: add_notices(connection, changed, now_ms)
        )

    async def last_id(self) -> int:
        """The highest assigned id; 0 before the first one."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(feed_heads.c.last_id).where(feed_heads.c.name == HEAD)
            )
            return found.scalar_one_or_none() or 0

    async def page(
        self, *, after: int, limit: int, sale_id: str | None = None
    ) -> tuple[list[FeedRow], int]:
        """Events with a higher id, in the order of their ids.

        Args:
            after: the id.
            limit: of the events.
            sale_id: the sale, with all its partitions; None for all sales.

        Returns:
            The events, and the id to continue after. It rises even for a page without events while
            later events may exist.
        """
        return await self._database.run_read(
            lambda connection: _page(connection, after, limit, sale_id)
        )

    async def list_orders(self, order_ids: Collection[str]) -> dict[str, OrderFacts]:
        """The unchanging members of these orders, by id; purged orders are left out."""
        if not order_ids:
            return {}
        return await self._database.run_read(lambda connection: _orders(connection, order_ids))


def _page(
    connection: Connection, after: int, limit: int, sale_id: str | None
) -> tuple[list[FeedRow], int]:
    # First: all ids up to it are committed, and later ones are left to the next page.
    until = _head_of(connection)
    ranges = connection.execute(
        select(feed_ranges.c.last_id)
        .where(
            feed_ranges.c.last_id > after,
            feed_ranges.c.last_id <= until,
            _of_sale(feed_ranges.c.sale_id, sale_id),
        )
        .order_by(feed_ranges.c.last_id)
        .limit(limit)
    )
    ends = list(ranges.scalars())
    if len(ends) == limit:
        until = ends[-1]
    rows = _events(connection, after, until, limit, sale_id) if ends else []
    if len(rows) == limit:
        until = rows[-1].id
    rows += _notices(connection, after, until, limit, sale_id)
    rows.sort(key=lambda row: row.id)
    if len(rows) > limit:
        rows = rows[:limit]
        until = rows[-1].id
    return rows, max(after, until)


def _events(
    connection: Connection, after: int, until: int, limit: int, sale_id: str | None
) -> list[FeedRow]:
    ranges = (
        select(feed_ranges)
        .where(
            feed_ranges.c.last_id > after,
            feed_ranges.c.last_id <= until,
            _of_sale(feed_ranges.c.sale_id, sale_id),
        )
        .subquery("ranges")
    )
    own_id = ranges.c.last_id - ranges.c.last_seq + events.c.seq
    found = connection.execute(
        select(
            own_id.label("id"),
            events.c.sale_id,
            events.c.seq,
            ranges.c.epoch,
            events.c.event,
            events.c.order_id,
            events.c.at_ms,
            events.c.data,
        )
        .join(
            ranges,
            and_(
                events.c.sale_id == ranges.c.sale_id,
                events.c.seq >= ranges.c.first_seq,
                events.c.seq <= ranges.c.last_seq,
            ),
        )
        .where(own_id > after)
        .order_by(ranges.c.last_id, events.c.seq)
        .limit(limit)
    )
    return [FeedRow(**row, notice="") for row in found.mappings()]


def _notices(
    connection: Connection, after: int, until: int, limit: int, sale_id: str | None
) -> list[FeedRow]:
    found = connection.execute(
        select(feed_notices)
        .where(
            feed_notices.c.id > after,
            feed_notices.c.id <= until,
            _of_sale(feed_notices.c.sale_id, sale_id),
        )
        .order_by(feed_notices.c.id)
        .limit(limit)
    )
    return [
        FeedRow(
            id=row.id,
            sale_id=row.sale_id,
            seq=row.seq,
            epoch=row.epoch,
            event="",
            notice=row.type,
            order_id="",
            at_ms=row.at_ms,
            data="{}",
        )
        for row in found
    ]


def _orders(connection: Connection, order_ids: Collection[str]) -> dict[str, OrderFacts]:
    lines: dict[str, tuple[tuple[str, int, int], ...]] = {}
    found = connection.execute(
        select(
            order_lines.c.order_id,
            order_lines.c.sku,
            order_lines.c.quantity,
            order_lines.c.price,
        )
        .where(_among(connection, order_lines.c.order_id, order_ids))
        .order_by(order_lines.c.order_id, order_lines.c.position)
    )
    for order_id, *line in found:
        lines[order_id] = (*lines.get(order_id, ()), (line[0], line[1], line[2]))
    rows = connection.execute(
        select(*_FACTS).where(_among(connection, orders.c.order_id, order_ids))
    ).mappings()
    return {
        row["order_id"]: OrderFacts(**row, lines=lines.get(row["order_id"], ())) for row in rows
    }


def _among(connection: Connection, column: Any, values: Collection[str]) -> ColumnElement[bool]:
    return among(connection, column, list(values))


def _head_of(connection: Connection) -> int:
    found = connection.execute(select(feed_heads.c.last_id).where(feed_heads.c.name == HEAD))
    return found.scalar_one_or_none() or 0


def _of_sale(column: Any, sale_id: str | None) -> ColumnElement[bool]:
    if sale_id is None:
        return column.is_not(None)
    # The lanes of its partitions, which have a number after a full stop; "/" follows ".".
    return (column == sale_id) | and_(column > f"{sale_id}.", column < f"{sale_id}/")
