"""Refunds: one an order, begun before the PG is asked, gone on with until it is through.

A refund is `pending` until it is `done`, or `refused` by the PG. A refused one is pending again
when an operator begins it anew, with another account for example; one that is done, when its order
is sold again after a rebuild.
"""

from typing import Any

import msgspec
from sqlalchemy import ColumnElement, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.domain.states import Status
from reservation.persistence.bulk import insert_into
from reservation.persistence.database import Database
from reservation.persistence.tables import orders, refunds

__all__ = [
    "RefundRecord",
    "RefundReused",
    "RefundWish",
    "begin_refund",
    "finish_refund",
    "pending_refunds",
    "refund_of",
    "reopen_refunds",
]


class RefundWish(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator asked for."""

    order_id: str
    idempotency_key: str
    #: Of everything that was asked for, the order included.
    digest: str
    reason: str
    restock: bool
    operator: str
    #: Where a deposit goes back to, JSON.
    account_json: str | None


class RefundRecord(RefundWish, frozen=True, kw_only=True):
    """A refund that stands."""

    #: pending, done or refused.
    status: str
    #: The PG's, where it refused.
    code: str | None
    created_at_ms: int
    updated_at_ms: int


class RefundReused(msgspec.Struct, frozen=True):
    """The idempotency key asked for something else before."""

    #: The order that it was used for.
    order_id: str


_COLUMNS = [refunds.c[name] for name in RefundRecord.__struct_fields__]


async def begin_refund(
    database: Database, wish: RefundWish, *, now_ms: int
) -> RefundRecord | RefundReused:
    """Write the refund down before the PG is asked; a repeat gets the one that stands.

    Another key for an order whose refund is pending or done gets that one as well: there is only
    one. A refused one is begun again by another key.
    """
    values: dict[str, Any] = {
        **msgspec.structs.asdict(wish),
        "status": "pending",
        "code": None,
        "created_at_ms": now_ms,
        "updated_at_ms": now_ms,
    }
    async with database.write() as connection:
        await connection.execute(insert_into(connection, refunds).on_conflict_do_nothing(), values)
        of_key = await _one(
            connection, refunds.c.idempotency_key == wish.idempotency_key, lock=True
        )
        if of_key is not None:
            return of_key if of_key.digest == wish.digest else RefundReused(of_key.order_id)
        standing = await _one(connection, refunds.c.order_id == wish.order_id, lock=True)
        if standing is not None and standing.status != "refused":
            return standing
        await connection.execute(
            update(refunds).where(refunds.c.order_id == wish.order_id).values(**values)
        )
        return RefundRecord(**values)


async def pending_refunds(database: Database, limit: int) -> list[RefundRecord]:
    """Refunds that nobody has finished, oldest first."""
    async with database.read() as connection:
        found = await connection.execute(
            select(*_COLUMNS)
            .where(refunds.c.status == "pending")
            .order_by(refunds.c.created_at_ms, refunds.c.order_id)
            .limit(limit)
        )
        return [RefundRecord(**row) for row in found.mappings()]


async def reopen_refunds(database: Database, sale_id: str) -> None:
    """Make those pending again that are done while their order is sold.

    Only after a rebuild from SQL: Redis was lost before SQL had the order's last event.
    """
    sold = select(orders.c.order_id).where(
        orders.c.sale_id == sale_id, orders.c.status == Status.CONFIRMED.value
    )
    async with database.write() as connection:
        await connection.execute(
            update(refunds)
            .where(refunds.c.status == "done", refunds.c.order_id.in_(sold))
            .values(status="pending")
        )


async def finish_refund(
    database: Database, record: RefundRecord, *, status: str, code: str | None, now_ms: int
) -> None:
    """Write down how a refund ended, `done` or `refused`.

    One that is done stays so, and one that was begun anew meanwhile goes on.
    """
    async with database.write() as connection:
        await connection.execute(
            update(refunds)
            .where(
                refunds.c.order_id == record.order_id,
                refunds.c.idempotency_key == record.idempotency_key,
                refunds.c.status != "done",
            )
            .values(status=status, code=code, updated_at_ms=now_ms)
        )


async def refund_of(database: Database, order_id: str) -> RefundRecord | None:
    """The order's refund, or None."""
    async with database.read() as connection:
        return await _one(connection, refunds.c.order_id == order_id, lock=False)


async def _one(
    connection: AsyncConnection, condition: ColumnElement[bool], *, lock: bool
) -> RefundRecord | None:
    wanted = select(*_COLUMNS).where(condition)
    found = await connection.execute(wanted.with_for_update() if lock else wanted)
    row = found.mappings().one_or_none()
    return RefundRecord(**row) if row else None
