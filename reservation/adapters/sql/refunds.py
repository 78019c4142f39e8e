"""Refunds: one an order, begun before the PG is asked, gone on with until it is through.

A refund is `pending` until it is `done`, or `refused` by the PG. A refused one is pending again
when an operator begins it anew, with another account for example; one that is done, when its order
is sold again after a rebuild.

One process at a time asks the PG for a refund: the one that holds its lease. A pending refund takes
another wish only under the lease and while no cancel may still be carried out (`unanswered`).
"""

from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, func, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.bulk import insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.orders import cursor_of, place_of
from reservation.adapters.sql.tables import orders, refunds
from reservation.domain.errors import BrokenInvariant
from reservation.domain.states import Status

__all__ = [
    "Backlog",
    "EarlierWish",
    "OtherRefund",
    "RefundRecord",
    "RefundReused",
    "RefundWish",
    "backlog",
    "begin_refund",
    "finish_refund",
    "lease_refund",
    "leave_refund",
    "list_refunds",
    "pending_refunds",
    "refund_of",
    "reopen_refunds",
    "replace_refund",
]

#: Refunds of one page.
PAGE_MAX: Final = 100
#: Earlier wishes that a refund remembers: an operator corrects one or two.
EARLIER_MAX: Final = 20


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
    #: The PG's last word that was not yet the end, or its refusal.
    code: str | None
    created_at_ms: int
    updated_at_ms: int
    lease_until_ms: int = 0
    #: A cancel left, and may still be carried out.
    unanswered: bool = False
    #: A list of `EarlierWish`, JSON.
    earlier_json: str = "[]"

    def earlier(self) -> list["EarlierWish"]:
        """The wishes that this one replaced, oldest first."""
        return msgspec.json.decode(self.earlier_json, type=list[EarlierWish])


class EarlierWish(msgspec.Struct, frozen=True, kw_only=True):
    """A wish that another one replaced."""

    operator: str
    reason: str
    restock: bool
    account_json: str | None
    #: How it stood then: pending or refused.
    status: str
    code: str | None
    created_at_ms: int
    replaced_at_ms: int


class RefundReused(msgspec.Struct, frozen=True):
    """The idempotency key asked for something else before."""

    #: The order that it was used for.
    order_id: str


class OtherRefund(msgspec.Struct, frozen=True):
    """The order has another refund, pending or done: this wish was not written down."""

    standing: RefundRecord


class Backlog(msgspec.Struct, frozen=True):
    """The refunds that are pending."""

    count: int
    #: When the oldest of them began; None without any.
    oldest_at_ms: int | None


_COLUMNS = [refunds.c[name] for name in RefundRecord.__struct_fields__]


async def begin_refund(
    database: Database, wish: RefundWish, *, now_ms: int
) -> RefundRecord | RefundReused | OtherRefund:
    """Write the refund down before the PG is asked; a repeat gets the one that stands.

    The same wish under another key gets the one that is pending or done as well: there is only one
    an order. Another wish is not written down, unless the PG refused the one before.
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
        if standing is None:
            raise BrokenInvariant(f"the refund of {wish.order_id} can be neither written nor read")
        if standing.status == "refused":
            return await _replace(connection, standing, wish, now_ms)
        return standing if standing.digest == wish.digest else OtherRefund(standing)


async def replace_refund(
    database: Database, held: RefundRecord, wish: RefundWish, *, now_ms: int
) -> RefundRecord | RefundReused | None:
    """Let another wish take the place of a pending one, and end the lease on it.

    Args:
        held: the pending refund, as `lease_refund` gave it out.

    Returns:
        The refund as it stands now; None where the lease is another's by now.
    """
    async with database.write() as connection:
        of_key = await _one(
            connection, refunds.c.idempotency_key == wish.idempotency_key, lock=True
        )
        if of_key is not None:
            return RefundReused(of_key.order_id)
        standing = await _one(connection, _is_held(held), lock=True)
        if standing is None or standing.unanswered:
            return None
        return await _replace(connection, standing, wish, now_ms)


async def _replace(
    connection: AsyncConnection, standing: RefundRecord, wish: RefundWish, now_ms: int
) -> RefundRecord:
    replaced = EarlierWish(
        operator=standing.operator,
        reason=standing.reason,
        restock=standing.restock,
        account_json=standing.account_json,
        status=standing.status,
        code=standing.code,
        created_at_ms=standing.created_at_ms,
        replaced_at_ms=now_ms,
    )
    values: dict[str, Any] = {
        **msgspec.structs.asdict(wish),
        "status": "pending",
        "code": None,
        "created_at_ms": now_ms,
        "updated_at_ms": now_ms,
        "lease_until_ms": 0,
        "unanswered": False,
        "earlier_json": msgspec.json.encode(
            [*standing.earlier(), replaced][-EARLIER_MAX:]
        ).decode(),
    }
    await connection.execute(
        update(refunds).where(refunds.c.order_id == wish.order_id).values(**values)
    )
    return RefundRecord(**values)


async def lease_refund(
    database: Database, record: RefundRecord, *, asks: bool, now_ms: int, until_ms: int
) -> RefundRecord | None:
    """Take the right to ask the PG for a refund until then.

    Args:
        asks: whether a cancel is going to leave; it counts as unanswered from here on.

    Returns:
        The refund under its new lease, `unanswered` as it was before; None where it has ended, has
        another wish, or another process asks.
    """
    async with database.write() as connection:
        standing = await _one(connection, refunds.c.order_id == record.order_id, lock=True)
        if (
            standing is None
            or standing.idempotency_key != record.idempotency_key
            or standing.status != "pending"
            or standing.lease_until_ms > now_ms
        ):
            return None
        await connection.execute(
            update(refunds)
            .where(refunds.c.order_id == record.order_id)
            .values(lease_until_ms=until_ms, unanswered=standing.unanswered or asks)
        )
        return msgspec.structs.replace(standing, lease_until_ms=until_ms)


async def leave_refund(
    database: Database, held: RefundRecord, *, code: str | None, unanswered: bool, now_ms: int
) -> None:
    """Give the lease back, with the PG's last word; a cancel may still come if `unanswered`."""
    async with database.write() as connection:
        await connection.execute(
            update(refunds)
            .where(_is_held(held))
            .values(lease_until_ms=0, code=code, unanswered=unanswered, updated_at_ms=now_ms)
        )


def _is_held(held: RefundRecord) -> ColumnElement[bool]:
    return (
        (refunds.c.order_id == held.order_id)
        & (refunds.c.idempotency_key == held.idempotency_key)
        & (refunds.c.status == "pending")
        & (refunds.c.lease_until_ms == held.lease_until_ms)
    )


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


async def backlog(database: Database) -> Backlog:
    """How many refunds are pending, and since when."""
    async with database.read() as connection:
        found = await connection.execute(
            select(func.count(), func.min(refunds.c.created_at_ms)).where(
                refunds.c.status == "pending"
            )
        )
        return Backlog(*found.one())


async def list_refunds(
    database: Database, *, status: str | None, cursor: str | None, limit: int
) -> tuple[list[RefundRecord], str | None]:
    """A page of refunds and the cursor of the next one: pending ones oldest first, others newest.

    Raises:
        ValueError: the cursor is none of ours.
    """
    limit = max(1, min(limit, PAGE_MAX))
    place = (refunds.c.created_at_ms, refunds.c.order_id)
    waits = status == "pending"
    wanted = select(*_COLUMNS).limit(limit + 1)
    wanted = wanted.order_by(*(column if waits else column.desc() for column in place))
    if status is not None:
        wanted = wanted.where(refunds.c.status == status)
    if cursor is not None:
        after = tuple_(*place_of(cursor))
        wanted = wanted.where(tuple_(*place) > after if waits else tuple_(*place) < after)
    async with database.read() as connection:
        found = [RefundRecord(**row) for row in (await connection.execute(wanted)).mappings()]
    page = found[:limit]
    more = len(found) > limit
    return page, cursor_of(page[-1].created_at_ms, page[-1].order_id) if more else None


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
            .values(
                status=status, code=code, updated_at_ms=now_ms, lease_until_ms=0, unanswered=False
            )
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
