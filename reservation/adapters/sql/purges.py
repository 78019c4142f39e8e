"""Purges in SQL: removes rows that a retired sale no longer needs, in small transactions.

    removed    orders that never had a payment, with their lines and events; counter movements;
               answers of the PG, except to cancels; copies of orders in ended intents
               the sale's events in the event feed
    kept       the sale and its counters; orders with a payment, with their lines, events,
               payments, attempts, intents and refunds

So a late payment still finds its order. Each transaction takes the sale's cursor, as a change of an
order does, and the record of the purge comes first. A repeat continues.
"""

from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, and_, delete, exists, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.bulk import among, insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.event_writer import lock_cursor
from reservation.adapters.sql.orders import orders_after
from reservation.adapters.sql.tables import (
    differences,
    events,
    feed_notices,
    feed_ranges,
    losses,
    marks,
    order_lines,
    orders,
    payment_answers,
    payment_checks,
    payment_intents,
    payments,
    purges,
    refunds,
    sales,
    stock_movements,
    webhook_deliveries,
)
from reservation.domain.errors import BrokenInvariant
from reservation.domain.states import ENDED, LIVE

__all__ = ["PurgeCounts", "PurgeRepository", "PurgeRow"]

#: Orders, or numbers of events, of one transaction: the flushers of live sales wait for it.
BATCH: Final = 500
#: Answers that are kept: refused cancels determine the next idempotency key.
_KEPT_ANSWERS: Final = "cancel"

_UNPAID: Final = and_(
    orders.c.fence == 0,
    orders.c.payment_key.is_(None),
    orders.c.status.in_(sorted(ENDED)),
    ~exists().where(payments.c.order_id == orders.c.order_id),
    ~exists().where(refunds.c.order_id == orders.c.order_id),
    # A payment that the gateway had at a restore.
    ~exists().where(differences.c.order_id == orders.c.order_id),
)


class PurgeCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Removed rows."""

    orders: int = 0
    events: int = 0
    movements: int = 0
    answers: int = 0


class PurgeRow(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The record of one purge."""

    sale_id: str
    #: The sale's last event when it began; later ones are kept.
    seq: int
    chain: str
    operator: str
    reason: str
    begun_at_ms: int
    #: When all was removed.
    done_at_ms: int | None
    orders: int
    events: int
    movements: int
    answers: int


_COLUMNS = [purges.c[name] for name in PurgeRow.__struct_fields__]


class PurgeRepository:
    """Removes rows of retired sales, and records that."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, sale_id: str) -> PurgeRow | None:
        """The record of a sale's purge; None if it was never purged."""
        async with self._database.read() as connection:
            return await _row(connection, sale_id)

    async def list_due(self, retired_before_ms: int) -> list[str]:
        """Sales that were retired before this instant and are not purged yet, oldest first."""
        done = exists().where(purges.c.sale_id == sales.c.sale_id, purges.c.done_at_ms.is_not(None))
        async with self._database.read() as connection:
            found = await connection.execute(
                select(sales.c.sale_id)
                .where(sales.c.retired_at_ms < retired_before_ms, ~done)
                .order_by(sales.c.retired_at_ms, sales.c.sale_id)
            )
            return list(found.scalars())

    async def obstacle(self, sale_id: str) -> str | None:
        """Why the sale must keep all its rows now; None if it may be purged."""
        async with self._database.read() as connection:
            return await _obstacle(connection, sale_id)

    async def count(self, sale_id: str) -> PurgeCounts:
        """The rows that a purge would remove now."""
        unpaid = select(orders.c.order_id).where(orders.c.sale_id == sale_id, _UNPAID)
        of_sale = select(orders.c.order_id).where(orders.c.sale_id == sale_id)
        counts = {
            "orders": (orders, and_(orders.c.sale_id == sale_id, _UNPAID)),
            "events": (events, _events_of(unpaid)),
            "movements": (stock_movements, stock_movements.c.sale_id == sale_id),
            "answers": (payment_answers, _answers_of(payment_answers.c.order_id.in_(of_sale))),
        }
        async with self._database.snapshot() as connection:
            return PurgeCounts(
                **{
                    name: (
                        await connection.execute(
                            select(func.count()).select_from(table).where(condition)
                        )
                    ).scalar_one()
                    for name, (table, condition) in counts.items()
                }
            )

    async def begin(
        self, sale_id: str, *, retired_before_ms: int, operator: str, reason: str, now_ms: int
    ) -> str | None:
        """Record that the sale is being purged; a record that exists stays.

        Returns:
            Why it must keep all its rows; None if it may be purged.
        """
        async with self._database.write() as connection:
            cursor = await connection.run_sync(lock_cursor, sale_id)
            retired = await connection.execute(
                select(sales.c.retired_at_ms).where(sales.c.sale_id == sale_id)
            )
            retired_at_ms = retired.scalar_one_or_none()
            if cursor is None or retired_at_ms is None:
                return "the sale is not retired"
            if retired_at_ms >= retired_before_ms:
                return "the sale was retired too recently"
            if (obstacle := await _obstacle(connection, sale_id)) is not None:
                return obstacle
            row = {
                "sale_id": sale_id,
                "seq": cursor[0],
                "chain": cursor[1],
                "operator": operator,
                "reason": reason,
                "begun_at_ms": now_ms,
            }
            await connection.execute(
                insert_into(connection.dialect.name, purges).on_conflict_do_nothing(), row
            )
            return None

    async def remove_unpaid(self, sale_id: str, after: str) -> str | None:
        """Remove those of some orders without a payment, and the answers about them.

        Returns:
            The last order; None at the end.
        """
        async with self._database.write() as connection:
            record = await _begun(connection, sale_id)
            page = await _page(connection, sale_id, after)
            found = await connection.execute(
                select(orders.c.order_id).where(
                    among(connection, orders.c.order_id, page),
                    orders.c.created_at_ms < record.begun_at_ms,
                    _UNPAID,
                )
            )
            order_ids = list(found.scalars())
            if order_ids:
                removed = await connection.execute(
                    delete(events).where(
                        events.c.order_id != "", among(connection, events.c.order_id, order_ids)
                    )
                )
                # In this transaction: `remove_answers` finds answers by their orders.
                answers = await _remove_answers(connection, record, order_ids)
                for table in (order_lines, payment_intents, orders):
                    await connection.execute(
                        delete(table).where(among(connection, table.c.order_id, order_ids))
                    )
                await _add(
                    connection,
                    sale_id,
                    orders=len(order_ids),
                    events=removed.rowcount,
                    answers=answers,
                )
        return page[-1] if len(page) == BATCH else None

    async def remove_movements(self, sale_id: str, after_seq: int) -> int | None:
        """Remove the counter movements of some events; return the last number, None at the end."""
        async with self._database.write() as connection:
            record = await _begun(connection, sale_id)
            until = min(after_seq + BATCH, record.seq)
            removed = await connection.execute(
                delete(stock_movements).where(
                    stock_movements.c.sale_id == sale_id,
                    stock_movements.c.seq > after_seq,
                    stock_movements.c.seq <= until,
                )
            )
            await _add(connection, sale_id, movements=removed.rowcount)
        return until if until < record.seq else None

    async def remove_answers(self, sale_id: str, after: str) -> str | None:
        """Remove the answers about some kept orders; return the last order, None at the end."""
        async with self._database.write() as connection:
            record = await _begun(connection, sale_id)
            order_ids = await _page(connection, sale_id, after)
            if order_ids:
                answers = await _remove_answers(connection, record, order_ids)
                await connection.execute(
                    update(payment_intents)
                    .where(
                        among(connection, payment_intents.c.order_id, order_ids),
                        payment_intents.c.ended_at_ms.is_not(None),
                    )
                    .values(reservation=None)
                )
                await _add(connection, sale_id, answers=answers)
        return order_ids[-1] if len(order_ids) == BATCH else None

    async def finish(self, sale_id: str, now_ms: int) -> PurgeRow:
        """Record that all was removed."""
        async with self._database.write() as connection:
            await _begun(connection, sale_id)
            for table in (marks, losses, feed_ranges, feed_notices, webhook_deliveries):
                await connection.execute(delete(table).where(table.c.sale_id == sale_id))
            await connection.execute(
                update(purges).where(purges.c.sale_id == sale_id).values(done_at_ms=now_ms)
            )
            row = await _row(connection, sale_id)
        if row is None:
            raise BrokenInvariant(f"the purge of {sale_id} has no record")
        return row


async def _page(connection: AsyncConnection, sale_id: str, after: str) -> list[str]:
    found = await connection.execute(
        select(orders.c.order_id)
        .where(*orders_after(sale_id, after))
        .order_by(orders.c.order_id)
        .limit(BATCH)
    )
    return list(found.scalars())


async def _row(connection: AsyncConnection, sale_id: str) -> PurgeRow | None:
    found = await connection.execute(select(*_COLUMNS).where(purges.c.sale_id == sale_id))
    row = found.mappings().one_or_none()
    return PurgeRow(**row) if row else None


async def _begun(connection: AsyncConnection, sale_id: str) -> PurgeRow:
    """The record, under the sale's lock."""
    await connection.run_sync(lock_cursor, sale_id)
    row = await _row(connection, sale_id)
    if row is None:
        raise BrokenInvariant(f"the purge of {sale_id} has no record")
    return row


async def _remove_answers(
    connection: AsyncConnection, record: PurgeRow, order_ids: Collection[str]
) -> int:
    """Remove the answers about these orders that are older than the purge; their number."""
    of_them = among(connection, payment_answers.c.order_id, order_ids)
    removed = await connection.execute(
        delete(payment_answers).where(
            _answers_of(of_them), payment_answers.c.created_at_ms < record.begun_at_ms
        )
    )
    return removed.rowcount


async def _add(connection: AsyncConnection, sale_id: str, **removed: int) -> None:
    changes = {name: purges.c[name] + number for name, number in removed.items()}
    await connection.execute(update(purges).where(purges.c.sale_id == sale_id).values(changes))


async def _obstacle(connection: AsyncConnection, sale_id: str) -> str | None:
    of_sale = orders.c.sale_id == sale_id
    checks: Sequence[tuple[str, Any]] = (
        (
            "an order is in progress",
            select(orders.c.order_id).where(of_sale, orders.c.status.in_(sorted(LIVE))),
        ),
        (
            "a payment is undecided",
            select(payment_intents.c.order_id).where(
                payment_intents.c.sale_id == sale_id,
                payment_intents.c.kind == "intent",
                payment_intents.c.ended_at_ms.is_(None),
            ),
        ),
        (
            "a refund is pending",
            select(refunds.c.order_id)
            .join(orders, orders.c.order_id == refunds.c.order_id)
            .where(of_sale, refunds.c.status == "pending"),
        ),
        (
            "a payment is still checked at the PG",
            select(payment_checks.c.order_id)
            .join(orders, orders.c.order_id == payment_checks.c.order_id)
            .where(of_sale),
        ),
    )
    for reason, query in checks:
        if (await connection.execute(query.limit(1))).first() is not None:
            return reason
    return None


def _events_of(order_ids: Any) -> ColumnElement[bool]:
    return and_(events.c.order_id != "", events.c.order_id.in_(order_ids))


def _answers_of(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return and_(condition, payment_answers.c.kind != _KEPT_ANSWERS)
