"""Queries of orders: one order, pages of orders, and units per buyer."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Collection
from typing import Any, Final

import msgspec
from sqlalchemy import Row, Select, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.bulk import among
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import order_lines, orders
from reservation.domain.reservation import PAID_ORDERS, Line, Reservation
from reservation.domain.states import HOLDING, PAID, Status

__all__ = [
    "PAGE_MAX",
    "REBUILD_PAGE_MAX",
    "HistoryRow",
    "HolderRow",
    "LineRow",
    "OrderRow",
    "as_reservation",
    "buyer_counts",
    "cursor_of",
    "holders",
    "list_orders",
    "live_orders",
    "order",
    "place_of",
]

#: Orders of one page.
PAGE_MAX: Final = 100
#: Orders of one page of a rebuild, where no user waits for the page.
REBUILD_PAGE_MAX: Final = 5_000


class LineRow(msgspec.Struct, frozen=True, kw_only=True):
    """Units of one item, at the price at that time."""

    sku: str
    quantity: int
    price: int


class HolderRow(msgspec.Struct, frozen=True, kw_only=True):
    """A buyer with held units of an item."""

    buyer_id: str
    quantity: int
    orders: int
    #: When the oldest of those orders began.
    since_ms: int


class OrderRow(msgspec.Struct, frozen=True):
    """An order's state after its last event."""

    order_id: str
    sale_id: str
    buyer_id: str
    status: str
    amount: int
    currency: str
    order_name: str
    digest: str
    created_at_ms: int
    updated_at_ms: int
    expires_at_ms: int
    seq: int
    fence: int
    #: Of the latest attempt.
    payment_key: str | None
    claimed_at_ms: int | None
    #: While CONFIRMING.
    lease_until_ms: int | None
    #: While AWAITING_DEPOSIT.
    due_at_ms: int | None
    lines: tuple[LineRow, ...]


class HistoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of an order's history."""

    at_ms: int
    #: event, intent, answer or refund.
    kind: str
    #: The event's name; `intent`, `void` or `cancel`; the operation that was answered; the refund's
    #: status.
    what: str
    #: A JSON object with unmasked payment keys and secrets: every view must mask them.
    facts: str


async def order(database: Database, order_id: str) -> OrderRow | None:
    """The order, or None where SQL does not have it (yet)."""
    async with database.read() as connection:
        found = await connection.execute(select(orders).where(orders.c.order_id == order_id))
        rows = await _with_lines(connection, found.all())
    return rows[0] if rows else None


async def list_orders(
    database: Database,
    *,
    sale_id: str | None,
    status: str | None,
    buyer_id: str | None,
    cursor: str | None,
    limit: int,
) -> tuple[list[OrderRow], str | None]:
    """A page, newest first, and the cursor of the next one; None at the end.

    Raises:
        ValueError: the cursor is invalid.
    """
    limit = max(1, min(limit, PAGE_MAX))
    place = (orders.c.created_at_ms, orders.c.order_id)
    wanted = select(orders).order_by(*(column.desc() for column in place)).limit(limit + 1)
    for column, value in (
        (orders.c.sale_id, sale_id),
        (orders.c.status, status),
        (orders.c.buyer_id, buyer_id),
    ):
        if value is not None:
            wanted = wanted.where(column == value)
    if cursor is not None:
        wanted = wanted.where(tuple_(*place) < tuple_(*place_of(cursor)))
    async with database.read() as connection:
        found = (await connection.execute(wanted)).all()
        rows = await _with_lines(connection, found[:limit])
    more = len(found) > limit
    return rows, cursor_of(rows[-1].created_at_ms, rows[-1].order_id) if more else None


async def live_orders(
    database: Database,
    sale_id: str,
    *,
    statuses: Collection[Status],
    after: str,
    limit: int,
) -> list[OrderRow]:
    """A sale's orders in these states, by id, after this one."""
    wanted: Select[Any] = (
        select(orders)
        .where(
            orders.c.sale_id == sale_id,
            orders.c.status.in_(sorted(statuses)),
            orders.c.order_id > after,
        )
        .order_by(orders.c.order_id)
        .limit(max(1, min(limit, REBUILD_PAGE_MAX)))
    )
    async with database.read() as connection:
        return await _with_lines(connection, (await connection.execute(wanted)).all())


async def buyer_counts(
    database: Database, sale_id: str, buyer_ids: Collection[str]
) -> dict[str, dict[str, int]]:
    """Per buyer: item -> units that count against the buyer's limit, held or bought.

    The items of a buyer with paid orders include their number (`PAID_ORDERS`), as in Redis.
    """
    counting = sorted({*HOLDING, Status.CONFIRMED})
    # Forces the index on buyers: with a plain comparison of the sale, SQLite reads all of its
    # orders.
    of_these = (func.coalesce(orders.c.sale_id, "") == sale_id, orders.c.buyer_id.in_(buyer_ids))
    async with database.read() as connection:
        found = await connection.execute(
            select(orders.c.buyer_id, order_lines.c.sku, func.sum(order_lines.c.quantity))
            .join(order_lines, order_lines.c.order_id == orders.c.order_id)
            .where(*of_these, orders.c.status.in_(counting))
            .group_by(orders.c.buyer_id, order_lines.c.sku)
        )
        counts: dict[str, dict[str, int]] = {}
        for buyer_id, sku, quantity in found:
            counts.setdefault(buyer_id, {})[sku] = int(quantity)
        paid = await connection.execute(
            select(orders.c.buyer_id, func.count())
            .where(*of_these, orders.c.status.in_(sorted(PAID)))
            .group_by(orders.c.buyer_id)
        )
        for buyer_id, count in paid:
            counts.setdefault(buyer_id, {})[PAID_ORDERS] = int(count)
        return counts


async def holders(database: Database, sale_id: str, sku: str, limit: int) -> list[HolderRow]:
    """The buyers with the most held units of an item, bought units not counted."""
    quantity = func.sum(order_lines.c.quantity)
    async with database.read() as connection:
        found = await connection.execute(
            select(
                orders.c.buyer_id,
                quantity.label("quantity"),
                func.count().label("orders"),
                func.min(orders.c.created_at_ms).label("since_ms"),
            )
            .join(order_lines, order_lines.c.order_id == orders.c.order_id)
            .where(
                orders.c.sale_id == sale_id,
                order_lines.c.sku == sku,
                orders.c.status.in_(sorted(HOLDING)),
            )
            .group_by(orders.c.buyer_id)
            .order_by(quantity.desc(), orders.c.buyer_id)
            .limit(limit)
        )
        return [
            HolderRow(
                buyer_id=row.buyer_id,
                quantity=int(row.quantity),
                orders=row.orders,
                since_ms=row.since_ms,
            )
            for row in found
        ]


async def _with_lines(connection: AsyncConnection, found: Collection[Row[Any]]) -> list[OrderRow]:
    if not found:
        return []
    answer = await connection.execute(
        select(order_lines)
        .where(among(connection, order_lines.c.order_id, [row.order_id for row in found]))
        .order_by(order_lines.c.order_id, order_lines.c.position)
    )
    lines: dict[str, list[LineRow]] = {}
    for line in answer:
        lines.setdefault(line.order_id, []).append(
            LineRow(sku=line.sku, quantity=line.quantity, price=line.price)
        )
    return [OrderRow(*row, lines=tuple(lines.get(row.order_id, ()))) for row in found]


def cursor_of(created_at_ms: int, order_id: str) -> str:
    """The cursor of the next page."""
    return urlsafe_b64encode(msgspec.json.encode([created_at_ms, order_id])).decode()


def place_of(cursor: str) -> tuple[int, str]:
    """Decode a cursor: the time and order id at which the previous page ended.

    Raises:
        ValueError: a wrong alphabet, or wrong JSON.
    """
    return msgspec.json.decode(urlsafe_b64decode(cursor), type=tuple[int, str])


def as_reservation(row: OrderRow) -> Reservation:
    """Convert an order in SQL to a reservation."""
    return Reservation(
        order_id=row.order_id,
        sale_id=row.sale_id,
        buyer_id=row.buyer_id,
        status=Status(row.status),
        lines=tuple(
            Line(sku=line.sku, quantity=line.quantity, price=line.price) for line in row.lines
        ),
        amount=row.amount,
        currency=row.currency,
        order_name=row.order_name,
        created_at_ms=row.created_at_ms,
        updated_at_ms=row.updated_at_ms,
        expires_at_ms=row.expires_at_ms,
        seq=row.seq,
        fence=row.fence,
        payment_key=row.payment_key,
        digest=row.digest,
    )
