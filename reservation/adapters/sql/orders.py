"""Orders in SQL: one order, pages of orders, units per buyer, and histories."""

from collections.abc import AsyncGenerator, Collection
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Row, Select, and_, exists, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.bulk import among
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.history import HistoryRow, timeline
from reservation.adapters.sql.order_requests import OrderRequest
from reservation.adapters.sql.paging import PAGE_MAX, cursor_of, place_of
from reservation.adapters.sql.payment_intents import IntentRow
from reservation.adapters.sql.payments import AnswerRow
from reservation.adapters.sql.refunds import RefundRecord
from reservation.adapters.sql.tables import (
    events,
    order_lines,
    order_requests,
    orders,
    payment_answers,
    payment_attempts,
    payment_intents,
    payments,
    refunds,
)
from reservation.domain.events import Event
from reservation.domain.reservation import PAID_ORDERS, Line, Reservation
from reservation.domain.states import HOLDING, LIVE, PAID, Status

__all__ = [
    "SCAN_MAX",
    "HolderRow",
    "LineRow",
    "OrderRepository",
    "OrderRow",
    "OverdueRow",
    "UnpaidRow",
    "as_reservation",
    "orders_after",
]

#: Orders of one page of a scan, where no user waits for the page.
SCAN_MAX: Final = 5_000
#: Ids read at once.
PAGE_IDS: Final = 1_000
#: Rows of each kind in one history: five attempts, polled every second at first, need far fewer.
HISTORY_MAX: Final = 2_000


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


class UnpaidRow(msgspec.Struct, frozen=True, kw_only=True):
    """A CONFIRMED order without a payment that the PG shows as done."""

    order_id: str
    seq: int
    #: The PG's status; None if SQL has no answer of it.
    payment: str | None


class OverdueRow(msgspec.Struct, frozen=True, kw_only=True):
    """An AWAITING_DEPOSIT order whose account is past its due date."""

    order_id: str
    seq: int
    due_at_ms: int


def orders_after(sale_id: str, after: str) -> tuple[ColumnElement[bool], ...]:
    """Selects a sale's orders after this one by the primary key.

    SQLite would use the index of the sale otherwise, and sort all of its orders for each page.
    """
    return (
        func.coalesce(orders.c.sale_id, "") == sale_id,
        orders.c.order_id > (after or f"{sale_id}-"),
        # An order's id begins with its sale's and a hyphen, and a full stop follows the hyphen.
        orders.c.order_id < f"{sale_id}.",
    )


class OrderRepository:
    """Reads orders, as the written events left them."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, order_id: str) -> OrderRow | None:
        """The order after its last written event; None if SQL does not have it (yet)."""
        async with self._database.read() as connection:
            found = await connection.execute(select(orders).where(orders.c.order_id == order_id))
            rows = await _with_lines(connection, found.all())
        return rows[0] if rows else None

    async def get_many(self, order_ids: Collection[str]) -> list[OrderRow]:
        """Those of these orders that SQL has."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(orders).where(among(connection, orders.c.order_id, order_ids))
            )
            return await _with_lines(connection, found.all())

    async def list_never_claimed(self, order_ids: Collection[str]) -> list[OrderRow]:
        """Those of these orders that ended without a claim and without an intent, by event."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(orders)
                .where(
                    among(connection, orders.c.order_id, order_ids),
                    never_claimed(),
                    ~exists().where(payment_intents.c.order_id == orders.c.order_id),
                )
                .order_by(orders.c.seq)
            )
            return await _with_lines(connection, found.all())

    async def count_never_claimed(
        self, sale_id: str, *, expired_by_ms: int, after: str, limit: int
    ) -> dict[str, int]:
        """Orders that ended without a claim, by buyer, in the order of the buyers' ids.

        On PostgreSQL each call reads all orders of the sale, so that a large limit makes few calls.

        Those with an intent count as well: an intent may come or go meanwhile, and the events
        alone decide the result.

        Args:
            sale_id: their sale.
            expired_by_ms: only orders whose deadline passed by then.
            after: only buyers after this id.
            limit: of buyers.
        """
        # SQLite reads the index on buyers, as in `count_by_buyer`; PostgreSQL prefers to sort.
        of_sale = orders_after(sale_id, "")[: 1 if self._database.is_sqlite else None]
        async with self._database.read() as connection:
            found = await connection.execute(
                select(orders.c.buyer_id, func.count().label("orders"))
                .where(
                    *of_sale,
                    orders.c.buyer_id > after,
                    orders.c.expires_at_ms <= expired_by_ms,
                    never_claimed(),
                )
                .group_by(orders.c.buyer_id)
                .order_by(orders.c.buyer_id)
                .limit(limit)
            )
            return {row.buyer_id: row.orders for row in found}

    async def page(
        self,
        *,
        sale_id: str | None = None,
        status: str | None = None,
        buyer_id: str | None = None,
        cursor: str | None = None,
        limit: int = PAGE_MAX,
    ) -> tuple[list[OrderRow], str | None]:
        """A page of orders, newest first, and the cursor of the next one; None at the end.

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
        async with self._database.read() as connection:
            found = (await connection.execute(wanted)).all()
            rows = await _with_lines(connection, found[:limit])
        more = len(found) > limit
        return rows, cursor_of(rows[-1].created_at_ms, rows[-1].order_id) if more else None

    async def scan(
        self,
        sale_id: str,
        *,
        statuses: Collection[Status] = LIVE,
        after: str = "",
        limit: int = SCAN_MAX,
    ) -> list[OrderRow]:
        """A page of a sale's orders in these states, by id, after this one; empty at the end."""
        wanted: Select[Any] = (
            select(orders)
            .where(*orders_after(sale_id, after), orders.c.status.in_(sorted(statuses)))
            .order_by(orders.c.order_id)
            .limit(max(1, min(limit, SCAN_MAX)))
        )
        async with self._database.read() as connection:
            return await _with_lines(connection, (await connection.execute(wanted)).all())

    async def pages_with_buyers(self, sale_id: str) -> AsyncGenerator[list[tuple[str, str]]]:
        """The ids of all orders of a sale, each with its buyer's, a page at a time."""
        after = ""
        while True:
            wanted = (
                select(orders.c.order_id, orders.c.buyer_id)
                .where(*orders_after(sale_id, after))
                .order_by(orders.c.order_id)
                .limit(PAGE_IDS)
            )
            async with self._database.read() as connection:
                page = [(row.order_id, row.buyer_id) for row in await connection.execute(wanted)]
            if not page:
                return
            yield page
            after = page[-1][0]

    async def count(self, sale_id: str, statuses: Collection[Status]) -> int:
        """The number of the sale's orders in these states."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(func.count())
                .select_from(orders)
                .where(orders.c.sale_id == sale_id, orders.c.status.in_(sorted(statuses)))
            )
            return found.scalar_one()

    async def count_by_buyer(
        self, sale_id: str, buyer_ids: Collection[str]
    ) -> dict[str, dict[str, int]]:
        """Per buyer: item -> units that count against the buyer's limit, held or bought.

        The items of a buyer with paid orders include their number (`PAID_ORDERS`), as in Redis.
        """
        counting = sorted({*HOLDING, Status.CONFIRMED})
        # Forces the index on buyers: with a plain comparison of the sale, SQLite reads all of its
        # orders.
        of_these = (
            func.coalesce(orders.c.sale_id, "") == sale_id,
            orders.c.buyer_id.in_(buyer_ids),
        )
        async with self._database.read() as connection:
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

    async def list_holders(self, sale_id: str, sku: str, limit: int) -> list[HolderRow]:
        """The buyers with the most held units of an item, bought units not counted."""
        quantity = func.sum(order_lines.c.quantity)
        async with self._database.read() as connection:
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

    async def list_unpaid(self, sale_id: str, limit: int) -> list[UnpaidRow]:
        """CONFIRMED orders whose payment is not done in full, except those being refunded."""
        paid = and_(
            payments.c.payment_key == orders.c.payment_key,
            payments.c.order_id == orders.c.order_id,
        )
        async with self._database.read() as connection:
            found = await connection.execute(
                select(orders.c.order_id, orders.c.seq, payments.c.status.label("payment"))
                .join(payments, paid, isouter=True)
                .join(refunds, refunds.c.order_id == orders.c.order_id, isouter=True)
                .where(
                    orders.c.sale_id == sale_id,
                    orders.c.status == Status.CONFIRMED.value,
                    refunds.c.order_id.is_(None) | (refunds.c.status == "refused"),
                    payments.c.status.is_(None)
                    | (payments.c.status != "DONE")
                    | (payments.c.total_amount != orders.c.amount),
                )
                .order_by(orders.c.seq)
                .limit(limit)
            )
            return [UnpaidRow(**row) for row in found.mappings()]

    async def list_overdue(self, sale_id: str, before_ms: int, limit: int) -> list[OverdueRow]:
        """Orders that still await a deposit due before this time, the longest overdue first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(orders.c.order_id, orders.c.seq, orders.c.due_at_ms)
                .where(
                    orders.c.sale_id == sale_id,
                    orders.c.status == Status.AWAITING_DEPOSIT.value,
                    orders.c.due_at_ms < before_ms,
                )
                .order_by(orders.c.due_at_ms)
                .limit(limit)
            )
            return [OverdueRow(**row) for row in found.mappings()]

    async def history(self, order_id: str) -> list[HistoryRow]:
        """An order's events, intents, answers of the PG and refund, in time order.

        At most `HISTORY_MAX` rows of each kind; empty if SQL does not have the order.
        """
        async with self._database.snapshot() as connection:
            happened = await connection.execute(
                select(*(events.c[name] for name in Event.__struct_fields__))
                .where(events.c.order_id == order_id, events.c.order_id != "")
                .order_by(events.c.seq)
                .limit(HISTORY_MAX)
            )
            written = [Event(**row) for row in happened.mappings()]
            found = await connection.execute(
                select(*(payment_intents.c[name] for name in IntentRow.__struct_fields__))
                .where(payment_intents.c.order_id == order_id)
                .order_by(payment_intents.c.fence)
                .limit(HISTORY_MAX)
            )
            intents = [IntentRow(**row) for row in found.mappings()]
            answered = await connection.execute(
                select(*(payment_answers.c[name] for name in AnswerRow.__struct_fields__))
                .where(payment_answers.c.order_id == order_id)
                .order_by(payment_answers.c.answer_id)
                .limit(HISTORY_MAX)
            )
            answers = [AnswerRow(**row) for row in answered.mappings()]
            keys = {row.payment_key for row in [*intents, *answers] if row.payment_key}
            cancels = await _cancels(connection, keys)
            requests = await _requests(connection, order_id)
            refund = (
                (
                    await connection.execute(
                        select(*(refunds.c[name] for name in RefundRecord.__struct_fields__)).where(
                            refunds.c.order_id == order_id
                        )
                    )
                )
                .mappings()
                .one_or_none()
            )
        return timeline(
            written,
            intents,
            cancels,
            answers,
            RefundRecord(**refund) if refund is not None else None,
            requests,
        )


def never_claimed() -> ColumnElement[bool]:
    """The condition of an order that may have a tombstone: it ended, and was never claimed."""
    return and_(
        orders.c.status.in_((Status.EXPIRED.value, Status.RELEASED.value)),
        orders.c.fence == 0,
        orders.c.payment_key.is_(None),
    )


async def _requests(connection: AsyncConnection, order_id: str) -> list[OrderRequest]:
    found = await connection.execute(
        select(*(order_requests.c[name] for name in OrderRequest.__struct_fields__))
        .where(order_requests.c.order_id == order_id)
        .order_by(order_requests.c.request_id)
        .limit(HISTORY_MAX)
    )
    return [OrderRequest(**row) for row in found.mappings()]


async def _cancels(connection: AsyncConnection, keys: Collection[str]) -> list[tuple[int, str]]:
    """Those of these payments with an intended cancel: since when, and the payment key."""
    found = await connection.execute(
        select(payment_attempts.c.cancel_intended_at_ms, payment_attempts.c.payment_key).where(
            among(connection, payment_attempts.c.payment_key, keys),
            payment_attempts.c.cancel_intended_at_ms.is_not(None),
        )
    )
    return [(row.cancel_intended_at_ms, row.payment_key) for row in found]


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
