"""Refunds in SQL: one per order, recorded before the PG is called and retried until it is final.

A refund is `pending` until it is `done`, or `refused` by the PG. A refused one is pending again
when an operator begins it again, with another account for example; one that is done, when its order
is sold again after a rebuild.

One process at a time calls the PG for a refund: the one that holds its lease. The request of a
pending refund is replaced only under the lease, and only if no cancel may still take effect
(`unanswered`). Only the holder records the outcome, because a rebuild may have ended its lease:

    holder     the PG has cancelled, and Redis has the order as REFUNDED
    Redis      loses that event before SQL has it
    rebuild    restores the order as CONFIRMED, and ends the lease
    holder     `done` is not recorded; the refund continues
"""

from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, func, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.bulk import insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.paging import PAGE_MAX, cursor_of, place_of
from reservation.adapters.sql.tables import orders, payments, refunds
from reservation.domain.errors import BrokenInvariant
from reservation.domain.payment_gateway import PaymentStatus
from reservation.domain.states import Status

__all__ = [
    "Backlog",
    "EarlierWish",
    "OtherRefund",
    "RefundRecord",
    "RefundRepository",
    "RefundReused",
    "RefundWish",
    "SoldRefund",
]

#: Earlier wishes kept per refund: an operator corrects one or two.
EARLIER_MAX: Final = 20


class RefundWish(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's request for a refund."""

    order_id: str
    idempotency_key: str
    #: Digest of the whole request, including the order.
    digest: str
    reason: str
    restock: bool
    operator: str
    #: The bank account for the refund of a deposit, JSON.
    account_json: str | None


class RefundRecord(RefundWish, frozen=True, kw_only=True):
    """A recorded refund."""

    #: pending, done or refused.
    status: str
    #: The PG's last code: an intermediate one, or its refusal.
    code: str | None
    created_at_ms: int
    updated_at_ms: int
    lease_until_ms: int = 0
    #: A cancel left, and may still take effect.
    unanswered: bool = False
    #: A list of `EarlierWish`, JSON.
    earlier_json: str = "[]"

    def earlier(self) -> list["EarlierWish"]:
        """The replaced wishes, oldest first."""
        return msgspec.json.decode(self.earlier_json, type=list[EarlierWish])


class EarlierWish(msgspec.Struct, frozen=True, kw_only=True):
    """A replaced wish."""

    operator: str
    reason: str
    restock: bool
    account_json: str | None
    #: Its status at that time: pending or refused.
    status: str
    code: str | None
    created_at_ms: int
    replaced_at_ms: int


class RefundReused(msgspec.Struct, frozen=True):
    """The idempotency key was used for another request."""

    #: The order that it was used for.
    order_id: str


class OtherRefund(msgspec.Struct, frozen=True):
    """The order has another refund, pending or done: this wish was not recorded."""

    existing: RefundRecord


class SoldRefund(msgspec.Struct, frozen=True, kw_only=True):
    """A CONFIRMED order whose refund is done."""

    order_id: str
    #: The order's last event in SQL.
    seq: int


class Backlog(msgspec.Struct, frozen=True):
    """The refunds that are pending."""

    count: int
    #: When the oldest one began; None without any.
    oldest_at_ms: int | None


_COLUMNS = [refunds.c[name] for name in RefundRecord.__struct_fields__]


class RefundRepository:
    """Stores refunds, their leases and their outcomes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(
        self, wish: RefundWish, *, now_ms: int
    ) -> RefundRecord | RefundReused | OtherRefund:
        """Record the refund before the request to the PG; a repeat gets the existing one.

        The same wish under another key also gets the pending or done one: there is only one per
        order. A different wish is not recorded, unless the PG refused the previous one.
        """
        values: dict[str, Any] = {
            **msgspec.structs.asdict(wish),
            "status": "pending",
            "code": None,
            "created_at_ms": now_ms,
            "updated_at_ms": now_ms,
        }
        async with self._database.write() as connection:
            await connection.execute(
                insert_into(connection.dialect.name, refunds).on_conflict_do_nothing(), values
            )
            of_key = await _one(
                connection, refunds.c.idempotency_key == wish.idempotency_key, lock=True
            )
            if of_key is not None:
                return of_key if of_key.digest == wish.digest else RefundReused(of_key.order_id)
            existing = await _one(connection, refunds.c.order_id == wish.order_id, lock=True)
            if existing is None:
                raise BrokenInvariant(
                    f"the refund of {wish.order_id} could be neither inserted nor read"
                )
            if existing.status == "refused":
                return await _replace(connection, existing, wish, now_ms)
            return existing if existing.digest == wish.digest else OtherRefund(existing)

    async def get(self, order_id: str) -> RefundRecord | None:
        """The order's refund, or None."""
        async with self._database.read() as connection:
            return await _one(connection, refunds.c.order_id == order_id, lock=False)

    async def page(
        self, *, status: str | None = None, cursor: str | None = None, limit: int = PAGE_MAX
    ) -> tuple[list[RefundRecord], str | None]:
        """A page of refunds and the cursor of the next one; None at the end.

        Pending refunds come oldest first, others newest first.

        Raises:
            ValueError: the cursor is invalid.
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
        async with self._database.read() as connection:
            found = [RefundRecord(**row) for row in (await connection.execute(wanted)).mappings()]
        page = found[:limit]
        more = len(found) > limit
        return page, cursor_of(page[-1].created_at_ms, page[-1].order_id) if more else None

    async def list_pending(self, limit: int) -> list[RefundRecord]:
        """Pending refunds, oldest first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS)
                .where(refunds.c.status == "pending")
                .order_by(refunds.c.created_at_ms, refunds.c.order_id)
                .limit(limit)
            )
            return [RefundRecord(**row) for row in found.mappings()]

    async def count_pending(self, sale_id: str) -> int:
        """The number of pending refunds of a sale's orders."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(func.count())
                .select_from(refunds)
                .join(orders, orders.c.order_id == refunds.c.order_id)
                .where(refunds.c.status == "pending", orders.c.sale_id == sale_id)
            )
            return found.scalar_one()

    async def backlog(self) -> Backlog:
        """The number of pending refunds, and when the oldest began."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(func.count(), func.min(refunds.c.created_at_ms)).where(
                    refunds.c.status == "pending"
                )
            )
            return Backlog(*found.one())

    async def lease(
        self, record: RefundRecord, *, asks: bool, now_ms: int, until_ms: int
    ) -> RefundRecord | None:
        """Take the lease on a refund: the exclusive right to request it at the PG until then.

        Args:
            asks: whether a cancel will leave; it counts as unanswered from here on.

        Returns:
            The refund under its new lease, `unanswered` as it was before; None if it has ended,
            has another wish, or another process holds the lease.
        """
        async with self._database.write() as connection:
            existing = await _one(connection, refunds.c.order_id == record.order_id, lock=True)
            if (
                existing is None
                or existing.idempotency_key != record.idempotency_key
                or existing.status != "pending"
                or existing.lease_until_ms > now_ms
            ):
                return None
            await connection.execute(
                update(refunds)
                .where(refunds.c.order_id == record.order_id)
                .values(lease_until_ms=until_ms, unanswered=existing.unanswered or asks)
            )
            return msgspec.structs.replace(existing, lease_until_ms=until_ms)

    async def release(
        self, held: RefundRecord, *, code: str | None, unanswered: bool, now_ms: int
    ) -> None:
        """Release the lease, with the PG's last code; if `unanswered`, a cancel may still land."""
        async with self._database.write() as connection:
            await connection.execute(
                update(refunds)
                .where(_is_held(held))
                .values(lease_until_ms=0, code=code, unanswered=unanswered, updated_at_ms=now_ms)
            )

    async def replace(
        self, held: RefundRecord, wish: RefundWish, *, now_ms: int
    ) -> RefundRecord | RefundReused | None:
        """Replace a pending wish by another one, and end the lease on it.

        Args:
            held: the pending refund, as returned by `lease_refund`.

        Returns:
            The updated refund; None if another process has the lease by now.
        """
        async with self._database.write() as connection:
            of_key = await _one(
                connection, refunds.c.idempotency_key == wish.idempotency_key, lock=True
            )
            if of_key is not None:
                return RefundReused(of_key.order_id)
            existing = await _one(connection, _is_held(held), lock=True)
            if existing is None or existing.unanswered:
                return None
            return await _replace(connection, existing, wish, now_ms)

    async def finish(
        self, held: RefundRecord, *, status: str, code: str | None, now_ms: int
    ) -> bool:
        """Record the outcome of a refund, `done` or `refused`, and end the lease on it.

        Args:
            held: the pending refund, as returned by `lease`.

        Returns:
            Whether the refund has this outcome, recorded now or earlier; if not, the lease was
            lost, and the refund continues or has ended otherwise.
        """
        async with self._database.write() as connection:
            recorded = await connection.execute(
                update(refunds)
                .where(_is_held(held))
                .values(
                    status=status,
                    code=code,
                    updated_at_ms=now_ms,
                    lease_until_ms=0,
                    unanswered=False,
                )
            )
            if recorded.rowcount:
                return True
            existing = await _one(connection, refunds.c.order_id == held.order_id, lock=False)
        return existing is not None and (existing.idempotency_key, existing.status) == (
            held.idempotency_key,
            status,
        )

    async def reopen(self, sale_id: str) -> None:
        """Make the done refunds of sold orders pending again, and end the leases on pending ones.

        Only after a rebuild from SQL: Redis was lost before SQL had the order's last event. A
        process that has refunded the order before the loss no longer records the outcome.
        """
        sold = select(orders.c.order_id).where(
            orders.c.sale_id == sale_id, orders.c.status == Status.CONFIRMED.value
        )
        async with self._database.write() as connection:
            await connection.execute(
                update(refunds)
                .where(refunds.c.status.in_(("done", "pending")), refunds.c.order_id.in_(sold))
                .values(status="pending", lease_until_ms=0)
            )

    async def list_of_sold(self, sale_id: str, limit: int) -> list[SoldRefund]:
        """Done refunds whose payment is CANCELED and whose order is sold, oldest first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(orders.c.order_id, orders.c.seq)
                .join(refunds, refunds.c.order_id == orders.c.order_id)
                .join(
                    payments,
                    (payments.c.payment_key == orders.c.payment_key)
                    & (payments.c.order_id == orders.c.order_id),
                )
                .where(
                    orders.c.sale_id == sale_id,
                    orders.c.status == Status.CONFIRMED.value,
                    refunds.c.status == "done",
                    payments.c.status == PaymentStatus.CANCELED.value,
                )
                .order_by(refunds.c.updated_at_ms, refunds.c.order_id)
                .limit(limit)
            )
            return [SoldRefund(**row) for row in found.mappings()]


async def _replace(
    connection: AsyncConnection, existing: RefundRecord, wish: RefundWish, now_ms: int
) -> RefundRecord:
    replaced = EarlierWish(
        operator=existing.operator,
        reason=existing.reason,
        restock=existing.restock,
        account_json=existing.account_json,
        status=existing.status,
        code=existing.code,
        created_at_ms=existing.created_at_ms,
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
            [*existing.earlier(), replaced][-EARLIER_MAX:]
        ).decode(),
    }
    await connection.execute(
        update(refunds).where(refunds.c.order_id == wish.order_id).values(**values)
    )
    return RefundRecord(**values)


def _is_held(held: RefundRecord) -> ColumnElement[bool]:
    return (
        (refunds.c.order_id == held.order_id)
        & (refunds.c.idempotency_key == held.idempotency_key)
        & (refunds.c.status == "pending")
        & (refunds.c.lease_until_ms == held.lease_until_ms)
    )


async def _one(
    connection: AsyncConnection, condition: ColumnElement[bool], *, lock: bool
) -> RefundRecord | None:
    wanted = select(*_COLUMNS).where(condition)
    found = await connection.execute(wanted.with_for_update() if lock else wanted)
    row = found.mappings().one_or_none()
    return RefundRecord(**row) if row else None
