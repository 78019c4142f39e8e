"""History export: a sale's past in the form that `verify` judges, from SQL and the outbox."""

import time
from collections.abc import AsyncGenerator
from typing import Final

from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.sale_store import SaleStore
from reservation.adapters.sql.store import SqlStore
from reservation.domain.clock import Clock
from reservation.domain.errors import SaleNotFound
from reservation.domain.events import Event
from reservation.verification.model.history_format import (
    VERSION,
    End,
    EventLine,
    Head,
    History,
    OrderLine,
    Record,
)

__all__ = ["recorded"]

#: Events and orders in one page.
_PAGE: Final = 1_000
_ORDERS_PAGE: Final = 100


async def recorded(
    sale_id: str, *, sales: SaleStore, sql: SqlStore, outbox: RedisOutbox, clock: Clock
) -> AsyncGenerator[Record]:
    """The lines of a sale: its counters at one instant, and every event up to it.

    The orders come with them only where SQL is complete, which is never certain in a running sale.

    Raises:
        SaleNotFound: neither Redis nor SQL has it.
    """
    asked_ns = time.monotonic_ns()
    counters = await sales.counters(sale_id)
    head = counters.seq if counters else (await sql.events.cursor(sale_id))[0]
    if not head:
        raise SaleNotFound
    now_ns = time.monotonic_ns()
    yield History(
        version=VERSION,
        unix_ms=clock.now_ms(),
        monotonic_ns=now_ns,
        replicas_acknowledge=sales.requires_acks,
    )
    if counters:
        yield Head(
            sale=sale_id,
            invoked_ns=asked_ns,
            answered_ns=now_ns,
            seq=head,
            stock=counters.stocks,
        )
    seq = 0
    async for event in _events(sale_id, sql, outbox):
        if event.seq > head:
            break
        yield _line(event)
        seq = event.seq
    whole = (await sql.events.cursor(sale_id))[0] == head
    if whole:
        async for order in _orders(sale_id, sql):
            yield order
        # An order that moved during the read is not in the state that these events give it.
        whole = (await sql.events.cursor(sale_id))[0] == head
    yield End(sale=sale_id, seq=seq, orders=whole)


async def _events(sale_id: str, sql: SqlStore, outbox: RedisOutbox) -> AsyncGenerator[Event]:
    """The events in SQL, then those that only the stream has."""
    seq = 0
    while page := await sql.events.list_after(sale_id, seq, _PAGE):
        for event in page:
            yield event
        seq = page[-1].seq
    while page := await outbox.after(sale_id, seq, _PAGE):
        for event in page:
            yield event
        seq = page[-1].seq


async def _orders(sale_id: str, sql: SqlStore) -> AsyncGenerator[OrderLine]:
    cursor: str | None = None
    while True:
        page, cursor = await sql.orders.page(sale_id=sale_id, cursor=cursor, limit=_ORDERS_PAGE)
        for order in page:
            yield OrderLine(
                sale=sale_id, order=order.order_id, status=order.status, amount=order.amount
            )
        if cursor is None:
            return


def _line(event: Event) -> EventLine:
    return EventLine(
        sale=event.sale_id,
        seq=event.seq,
        event=event.event,
        order=event.order_id,
        at=event.at_ms,
        data=event.data,
        chain=event.chain,
    )
