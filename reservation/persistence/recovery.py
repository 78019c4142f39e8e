"""What a rebuild reads: how far SQL is, the items, and what the events say of payments."""

from collections.abc import Collection, Sequence
from typing import Final

import msgspec
from sqlalchemy import and_, func, or_, select

from reservation.domain.events import Event, EventName
from reservation.domain.states import Status
from reservation.persistence.bulk import among
from reservation.persistence.database import Database
from reservation.persistence.tables import (
    cursors,
    events,
    items,
    orders,
    payment_intents,
    payments,
    refunds,
    sales,
)

__all__ = [
    "ItemRow",
    "SaleHead",
    "UnmetIntent",
    "UnpaidRow",
    "confirmed_unpaid",
    "count_orders",
    "heads",
    "listed_items",
    "payment_events",
    "restocks",
    "unmet_intents",
]

#: Orders of one page. Where the flusher has stood still, unmet intents are as many as payments.
UNMET_PAGE: Final = 5_000


class SaleHead(msgspec.Struct, frozen=True, kw_only=True):
    """How far SQL is with a sale, and in which epoch."""

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
    """A payment that may have been asked for under a claim that SQL never got."""

    order_id: str
    fence: int
    payment_key: str
    amount: int
    #: Whether SQL has the order itself.
    known: bool


class UnpaidRow(msgspec.Struct, frozen=True, kw_only=True):
    """A CONFIRMED order without a payment that the PG shows as done."""

    order_id: str
    seq: int
    #: The PG's word; None where SQL has no answer of it.
    payment: str | None


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
    """Every sale and how far SQL is with it."""
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
    """What is on sale, by SKU."""
    async with database.read() as connection:
        found = await connection.execute(
            select(*_ITEM_COLUMNS).where(items.c.sale_id == sale_id, items.c.listed)
        )
        return {row["sku"]: ItemRow(**row) for row in found.mappings()}


async def count_orders(database: Database, sale_id: str, statuses: Collection[Status]) -> int:
    """How many orders of the sale are in these states."""
    async with database.read() as connection:
        found = await connection.execute(
            select(func.count())
            .select_from(orders)
            .where(orders.c.sale_id == sale_id, orders.c.status.in_(sorted(statuses)))
        )
        return found.scalar_one()


async def payment_events(database: Database, order_ids: Collection[str]) -> dict[str, list[Event]]:
    """What befell the payments of these orders, in order."""
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


async def unmet_intents(database: Database, sale_id: str) -> Sequence[UnmetIntent]:
    """Intents under a fence that the order in SQL has not reached; the latest of each order."""
    latest: dict[str, UnmetIntent] = {}
    after = ("", 0)
    while True:
        page = await _unmet_after(database, sale_id, *after)
        # In the order of the fences: of an order that two pages share the later one stays.
        latest |= {intent.order_id: intent for intent in page}
        if len(page) < UNMET_PAGE:
            return list(latest.values())
        after = (page[-1].order_id, page[-1].fence)


async def _unmet_after(
    database: Database, sale_id: str, order_id: str, fence: int
) -> list[UnmetIntent]:
    intents = payment_intents
    async with database.read() as connection:
        found = await connection.execute(
            select(
                intents.c.order_id,
                intents.c.fence,
                intents.c.payment_key,
                intents.c.amount,
                orders.c.order_id.is_not(None).label("known"),
            )
            .join(orders, orders.c.order_id == intents.c.order_id, isouter=True)
            .where(
                and_(intents.c.sale_id == sale_id, intents.c.kind == "intent"),
                or_(orders.c.order_id.is_(None), orders.c.fence < intents.c.fence),
                or_(
                    intents.c.order_id > order_id,
                    and_(intents.c.order_id == order_id, intents.c.fence > fence),
                ),
            )
            .order_by(intents.c.order_id, intents.c.fence)
            .limit(UNMET_PAGE)
        )
        return [UnmetIntent(**row) for row in found.mappings()]


async def confirmed_unpaid(database: Database, sale_id: str, limit: int) -> list[UnpaidRow]:
    """CONFIRMED orders whose payment is not done in full, but for those being refunded."""
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
