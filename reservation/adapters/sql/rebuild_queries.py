"""Queries of a rebuild: SQL's position, the items, payment events and unmet intents."""

from collections.abc import Collection
from typing import Any, Final

import msgspec
from sqlalchemy import Select, and_, func, or_, select

from reservation.adapters.sql.bulk import among
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import (
    cursors,
    events,
    items,
    orders,
    payment_attempts,
    payment_intents,
    payments,
    refunds,
    sales,
)
from reservation.domain.events import Event, EventName
from reservation.domain.states import Status

__all__ = [
    "ItemRow",
    "SaleHead",
    "UnmetIntent",
    "UnpaidRow",
    "UnsoldRow",
    "confirmed_unpaid",
    "count_orders",
    "heads",
    "listed_items",
    "paid_unsold",
    "payment_events",
    "restocks",
    "unmet_intents",
]

#: Rows of one page. If the flusher has stopped, unmet intents are as many as payments.
UNMET_PAGE: Final = 5_000


class SaleHead(msgspec.Struct, frozen=True, kw_only=True):
    """SQL's position in a sale, and the epoch."""

    epoch: str
    seq: int
    chain: str


class ItemRow(msgspec.Struct, frozen=True, kw_only=True):
    """One item with its counters."""

    sku: str
    name: str
    price: int
    limit_per_buyer: int
    total: int
    available: int
    held: int
    sold: int


class UnmetIntent(msgspec.Struct, frozen=True, kw_only=True):
    """A payment that the PG may have been asked for, without an end in SQL."""

    order_id: str
    sale_id: str
    fence: int
    payment_key: str
    amount: int
    created_at_ms: int
    #: The epoch in which Redis had the claim; None in intents older than this column.
    epoch: str | None
    #: The order, JSON; None likewise.
    reservation: str | None


class UnpaidRow(msgspec.Struct, frozen=True, kw_only=True):
    """A CONFIRMED order without a payment that the PG shows as done."""

    order_id: str
    seq: int
    #: The PG's status; None where SQL has no answer of it.
    payment: str | None


class UnsoldRow(msgspec.Struct, frozen=True, kw_only=True):
    """A DONE payment whose order is not sold."""

    order_id: str
    payment_key: str
    #: The order's status in SQL; None where SQL has no such order.
    status: str | None


_ITEM_COLUMNS = [items.c[name] for name in ItemRow.__struct_fields__]
#: The events by which a payment attempt begins or ends.
_ATTEMPT_EVENTS = (
    EventName.CLAIMED,
    EventName.TAKEN_OVER,
    EventName.CONFIRMED,
    EventName.AWAITING_DEPOSIT,
    EventName.DECLINED,
    EventName.VOIDED,
    EventName.EXPIRED,
    EventName.REFUNDED,
)


async def heads(database: Database) -> dict[str, SaleHead]:
    """Every sale and SQL's position in it."""
    wanted = select(
        sales.c.sale_id, sales.c.epoch, cursors.c.flushed_seq, cursors.c.flushed_chain
    ).join(cursors, cursors.c.sale_id == sales.c.sale_id)
    async with database.read() as connection:
        found = await connection.execute(wanted)
        return {
            row.sale_id: SaleHead(epoch=row.epoch, seq=row.flushed_seq, chain=row.flushed_chain)
            for row in found
        }


async def listed_items(database: Database, sale_id: str) -> dict[str, ItemRow]:
    """The items on sale, by SKU."""
    async with database.read() as connection:
        found = await connection.execute(
            select(*_ITEM_COLUMNS).where(items.c.sale_id == sale_id, items.c.listed)
        )
        return {row["sku"]: ItemRow(**row) for row in found.mappings()}


async def count_orders(database: Database, sale_id: str, statuses: Collection[Status]) -> int:
    """The number of the sale's orders in these states."""
    async with database.read() as connection:
        found = await connection.execute(
            select(func.count())
            .select_from(orders)
            .where(orders.c.sale_id == sale_id, orders.c.status.in_(sorted(statuses)))
        )
        return found.scalar_one()


async def payment_events(database: Database, order_ids: Collection[str]) -> dict[str, list[Event]]:
    """The payment events of these orders, in order."""
    stories: dict[str, list[Event]] = {}
    if not order_ids:
        return stories
    async with database.read() as connection:
        found = await connection.execute(
            select(*(events.c[name] for name in Event.__struct_fields__))
            .where(
                among(connection, events.c.order_id, list(order_ids)),
                events.c.order_id != "",
                events.c.event.in_(_ATTEMPT_EVENTS),
            )
            .order_by(events.c.order_id, events.c.seq)
        )
        for row in found.mappings():
            stories.setdefault(row["order_id"], []).append(Event(**row))
    return stories


async def restocks(database: Database, sale_id: str) -> list[str]:
    """The data of every restock, in order."""
    async with database.read() as connection:
        found = await connection.execute(
            select(events.c.data)
            .where(events.c.sale_id == sale_id, events.c.event == EventName.RESTOCKED)
            .order_by(events.c.seq)
        )
        return list(found.scalars())


async def unmet_intents(
    database: Database,
    sale_id: str | None = None,
    *,
    order_id: str | None = None,
    since_ms: int | None = None,
    before_ms: int | None = None,
) -> list[UnmetIntent]:
    """Intents without an end, one for each order and payment key, the latest claim first.

    Args:
        database: the database.
        sale_id: of this sale alone.
        order_id: of this order alone.
        since_ms: only intents created at or after this time.
        before_ms: only intents created before this time.
    """
    wanted = _unmet(sale_id, order_id)
    if since_ms is not None:
        wanted = wanted.where(payment_intents.c.created_at_ms >= since_ms)
    if before_ms is not None:
        wanted = wanted.where(payment_intents.c.created_at_ms < before_ms)
    latest: dict[tuple[str, str], UnmetIntent] = {}
    after = ("", 0)
    while True:
        page = await _page_after(database, wanted, after)
        # In the order of the fences: the last intent of a payment wins.
        latest |= {(intent.order_id, intent.payment_key): intent for intent in page}
        if len(page) < UNMET_PAGE:
            return sorted(latest.values(), key=lambda intent: (intent.order_id, -intent.fence))
        after = (page[-1].order_id, page[-1].fence)


def _unmet(sale_id: str | None, order_id: str | None) -> Select[Any]:
    intents = payment_intents
    wanted = select(*(intents.c[name] for name in UnmetIntent.__struct_fields__)).where(
        intents.c.kind == "intent", intents.c.ended_at_ms.is_(None)
    )
    if sale_id is not None:
        wanted = wanted.where(intents.c.sale_id == sale_id)
    if order_id is not None:
        wanted = wanted.where(intents.c.order_id == order_id)
    return wanted


async def _page_after(
    database: Database, wanted: Select[Any], after: tuple[str, int]
) -> list[UnmetIntent]:
    intents = payment_intents
    page = (
        wanted.where(
            or_(
                intents.c.order_id > after[0],
                and_(intents.c.order_id == after[0], intents.c.fence > after[1]),
            )
        )
        .order_by(intents.c.order_id, intents.c.fence)
        .limit(UNMET_PAGE)
    )
    async with database.read() as connection:
        found = await connection.execute(page)
        return [UnmetIntent(**row) for row in found.mappings()]


async def confirmed_unpaid(database: Database, sale_id: str, limit: int) -> list[UnpaidRow]:
    """CONFIRMED orders whose payment is not done in full, except those being refunded."""
    paid = and_(
        payments.c.payment_key == orders.c.payment_key,
        payments.c.order_id == orders.c.order_id,
    )
    async with database.read() as connection:
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


async def paid_unsold(database: Database, sale_id: str, limit: int) -> list[UnsoldRow]:
    """DONE payments of the sale whose order in SQL is neither sold nor refunded."""
    attempts = payment_attempts
    async with database.read() as connection:
        found = await connection.execute(
            select(payments.c.order_id, payments.c.payment_key, orders.c.status)
            .join(attempts, attempts.c.payment_key == payments.c.payment_key)
            .join(orders, orders.c.order_id == payments.c.order_id, isouter=True)
            .where(
                attempts.c.sale_id == sale_id,
                payments.c.status == "DONE",
                orders.c.status.is_(None)
                | orders.c.status.not_in([Status.CONFIRMED.value, Status.REFUNDED.value])
                | (orders.c.payment_key != payments.c.payment_key),
            )
            .order_by(payments.c.order_id)
            .limit(limit)
        )
        return [UnsoldRow(**row) for row in found.mappings()]
