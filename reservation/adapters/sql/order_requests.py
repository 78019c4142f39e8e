"""Requests to end an order's account or to look its payment up: kept until they are carried out."""

from enum import StrEnum

import msgspec
from sqlalchemy import select, update

from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import order_requests

__all__ = ["OrderRequest", "OrderRequestRepository", "RequestKind"]


class RequestKind(StrEnum):
    """The kind of a request. The values are stored: add members, never change one."""

    #: Cancel the account of an order that awaits its deposit, and release the units.
    RELEASE = "release"
    #: Look the payment up now.
    RESOLVE = "resolve"


class OrderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request about one order."""

    request_id: int
    order_id: str
    #: The payment of the order at the time of the request.
    payment_key: str
    kind: str
    #: Empty if the buyer made the request.
    operator: str
    reason: str
    created_at_ms: int
    #: The next try.
    due_at_ms: int
    tries: int
    #: None while the request is pending.
    ended_at_ms: int | None
    #: The order's status at that time.
    status: str | None


_COLUMNS = [order_requests.c[name] for name in OrderRequest.__struct_fields__]


class OrderRequestRepository:
    """Stores requests about orders."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(
        self,
        *,
        order_id: str,
        payment_key: str,
        kind: RequestKind,
        operator: str,
        reason: str,
        now_ms: int,
        due_at_ms: int,
    ) -> OrderRequest:
        """Record a request; a repeat by the same caller gets the pending one.

        Args:
            order_id: the order.
            payment_key: its payment.
            kind: the change requested.
            operator: who; empty for the buyer.
            reason: why.
            now_ms: the present.
            due_at_ms: when a worker carries it out, unless this process has.
        """
        same = (
            order_requests.c.order_id == order_id,
            order_requests.c.payment_key == payment_key,
            order_requests.c.kind == kind.value,
            order_requests.c.operator == operator,
            order_requests.c.ended_at_ms.is_(None),
        )
        async with self._database.write() as connection:
            pending = (
                (await connection.execute(select(*_COLUMNS).where(*same).limit(1)))
                .mappings()
                .one_or_none()
            )
            if pending is not None:
                return OrderRequest(**pending)
            added = await connection.execute(
                order_requests.insert()
                .values(
                    order_id=order_id,
                    payment_key=payment_key,
                    kind=kind.value,
                    operator=operator,
                    reason=reason,
                    created_at_ms=now_ms,
                    due_at_ms=due_at_ms,
                    tries=0,
                )
                .returning(*_COLUMNS)
            )
            return OrderRequest(**added.mappings().one())

    async def list_due(self, now_ms: int, limit: int) -> list[OrderRequest]:
        """Pending requests that are due, the longest due first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS)
                .where(order_requests.c.ended_at_ms.is_(None), order_requests.c.due_at_ms <= now_ms)
                .order_by(order_requests.c.due_at_ms, order_requests.c.request_id)
                .limit(limit)
            )
            return [OrderRequest(**row) for row in found.mappings()]

    async def postpone(self, request: OrderRequest, due_at_ms: int) -> OrderRequest | None:
        """Move the next try; None if the request has ended, or another process has moved it."""
        async with self._database.write() as connection:
            moved = await connection.execute(
                update(order_requests)
                .where(
                    order_requests.c.request_id == request.request_id,
                    order_requests.c.due_at_ms == request.due_at_ms,
                    order_requests.c.tries == request.tries,
                    order_requests.c.ended_at_ms.is_(None),
                )
                .values(due_at_ms=due_at_ms, tries=request.tries + 1)
            )
        if moved.rowcount == 0:
            return None
        return msgspec.structs.replace(request, due_at_ms=due_at_ms, tries=request.tries + 1)

    async def end(self, request_id: int, *, status: str, now_ms: int) -> None:
        """Record that the request was carried out, and the order's status then."""
        async with self._database.write() as connection:
            await connection.execute(
                update(order_requests)
                .where(
                    order_requests.c.request_id == request_id,
                    order_requests.c.ended_at_ms.is_(None),
                )
                .values(ended_at_ms=now_ms, status=status)
            )
