"""Writes a batch of a sale's outbox within a transaction, each event exactly once in effect.

It locks the sale's cursor, so two flushers take turns. It validates the batch (no gap, an intact
chain, valid events), folds it to the last state of each order, and writes it with the cursor in a
handful of statements. Repeated events are detected and skipped.
"""

from collections.abc import Sequence
from enum import Enum, auto
from functools import cache
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Executable, Row, Text, bindparam, select, update

from reservation.adapters.sql import tables
from reservation.adapters.sql.bulk import insert_new, is_among, texts, upsert
from reservation.adapters.sql.projection import (
    EventProjection,
    InvalidEvent,
    ItemState,
    OrderState,
    SaleState,
)
from reservation.domain.events import Event, chain_of
from reservation.domain.states import Status

__all__ = ["ApplyKind", "ApplyOutcome", "lock_cursor", "next_chain", "write_batch"]

_CURSORS: Final = tables.cursors
_SALES: Final = tables.sales
_OF_SALE: Final = bindparam("sale", type_=Text)
# Statements are built once: building one takes longer than its execution.
_CURSOR: Final = (
    select(_CURSORS.c.flushed_seq, _CURSORS.c.flushed_chain)
    .where(_CURSORS.c.sale_id == _OF_SALE)
    .with_for_update()
)
_SET_CURSOR: Final = (
    update(_CURSORS)
    .where(_CURSORS.c.sale_id == _OF_SALE)
    .values(flushed_seq=bindparam("seq"), flushed_chain=bindparam("last_chain"))
)
_EPOCH: Final = select(_SALES.c.epoch).where(_SALES.c.sale_id == _OF_SALE)
_SALE: Final = select(*(_SALES.c[name] for name in SaleState.__struct_fields__)).where(
    _SALES.c.sale_id == _OF_SALE
)
_SET_SALE: Final = (
    update(_SALES)
    .where(_SALES.c.sale_id == _OF_SALE)
    .values({name: bindparam(f"new_{name}") for name in SaleState.__struct_fields__})
)
_ITEMS: Final = select(*(tables.items.c[name] for name in ItemState.__struct_fields__)).where(
    tables.items.c.sale_id == _OF_SALE
)
_INTENTS: Final = tables.payment_intents
_END_INTENTS: Final = (
    update(_INTENTS)
    .where(
        _INTENTS.c.order_id == bindparam("ended_order"),
        _INTENTS.c.payment_key == bindparam("ended_key"),
        _INTENTS.c.fence <= bindparam("ended_fence"),
        _INTENTS.c.ended_at_ms.is_(None),
    )
    .values(ended_at_ms=bindparam("at_ms"))
)


class ApplyKind(Enum):
    """Outcome of a batch."""

    #: All of it is in SQL, from this call or an earlier one.
    APPLIED = auto()
    #: `seq` is the event that must come first; nothing was written.
    GAP = auto()
    #: SQL has another event under `seq`; nothing was written.
    CONFLICT = auto()
    #: The chain breaks at `seq`; the events before it are written.
    BROKEN_CHAIN = auto()
    #: The event `seq` is invalid; the events before it are written.
    POISON = auto()
    #: SQL does not know the sale; nothing was written.
    UNKNOWN_SALE = auto()
    #: A rebuild gave the sale another epoch since the events were read; nothing was written.
    OTHER_EPOCH = auto()


class ApplyOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a batch, and SQL's position after it."""

    kind: ApplyKind
    #: Every event up to here is committed.
    flushed_seq: int
    #: Events that this call wrote.
    written: int = 0
    #: The event that `kind` refers to.
    seq: int | None = None
    reason: str = ""


class _Verdict(msgspec.Struct):
    """The valid prefix of a batch, and the problem of the rest."""

    fresh: list[Event]
    kind: ApplyKind = ApplyKind.APPLIED
    seq: int | None = None
    reason: str = ""


def write_batch(
    connection: Connection,
    sale_id: str,
    events: Sequence[Event],
    *,
    epoch: str | None = None,
) -> ApplyOutcome:
    """Write the valid events of a batch that SQL does not have yet.

    Args:
        connection: in a transaction that writes.
        sale_id: the sale.
        events: the batch.
        epoch: the epoch under which they were read; None accepts any.

    Raises:
        DBAPIError: SQL refuses a row; the transaction must be rolled back.
    """
    cursor = lock_cursor(connection, sale_id)
    if cursor is None:
        return ApplyOutcome(
            kind=ApplyKind.UNKNOWN_SALE, flushed_seq=0, reason="SQL has no such sale"
        )
    flushed_seq, chain = cursor
    # After the lock, which a rebuild takes to change the epoch.
    if epoch is not None and _epoch(connection, sale_id) != epoch:
        return ApplyOutcome(kind=ApplyKind.OTHER_EPOCH, flushed_seq=flushed_seq)
    verdict = _judge(events, flushed_seq, chain, _chains(connection, sale_id, events, cursor))
    written = 0
    if verdict.fresh:
        fold = _load(connection, sale_id, verdict.fresh)
        written = _fold(fold, verdict)
        if written:
            _write(connection, sale_id, fold, verdict.fresh[:written])
            flushed_seq = verdict.fresh[written - 1].seq
    return ApplyOutcome(
        kind=verdict.kind,
        flushed_seq=flushed_seq,
        written=written,
        seq=verdict.seq,
        reason=verdict.reason,
    )


def lock_cursor(connection: Connection, sale_id: str) -> tuple[int, str] | None:
    """Lock a sale's cursor until the transaction ends; return its number and chain value."""
    row = connection.execute(_CURSOR, {"sale": sale_id}).one_or_none()
    return (row.flushed_seq, row.flushed_chain) if row else None


def _epoch(connection: Connection, sale_id: str) -> str | None:
    return connection.execute(_EPOCH, {"sale": sale_id}).scalar_one_or_none()


def _chains(
    connection: Connection, sale_id: str, events: Sequence[Event], cursor: tuple[int, str]
) -> dict[int, str]:
    """The chain values of those events that SQL already has."""
    repeated = [event.seq for event in events if event.seq <= cursor[0]]
    if not repeated:
        return {}
    known = tables.events
    found = connection.execute(
        select(known.c.seq, known.c.chain).where(
            known.c.sale_id == sale_id, known.c.seq.between(min(repeated), max(repeated))
        )
    )
    return {row.seq: row.chain for row in found}


def _judge(
    events: Sequence[Event], flushed_seq: int, chain: str, stored: dict[int, str]
) -> _Verdict:
    """Drop the events that SQL has, and check that the rest follows without a gap or a break."""
    fresh: list[Event] = []
    broken: Event | None = None
    known = dict(stored)
    for event in events:
        seq = event.seq
        if seq <= flushed_seq:
            if known.get(seq) != event.chain:
                reason = f"SQL has another event {seq}"
                return _Verdict([], ApplyKind.CONFLICT, seq, reason)
            continue
        if seq != flushed_seq + 1:
            expected = flushed_seq + 1
            return _Verdict([], ApplyKind.GAP, expected, f"event {expected} is missing")
        flushed_seq, known[seq] = seq, event.chain
        if broken is None and event.chain != next_chain(chain, event):
            broken = event
        chain = event.chain
        if broken is None:
            fresh.append(event)
    if broken is not None:
        reason = "its chain value does not follow from the event before it and its own content"
        return _Verdict(fresh, ApplyKind.BROKEN_CHAIN, broken.seq, reason)
    return _Verdict(fresh)


def next_chain(chain: str, event: Event) -> str:
    """The chain value of this event if it follows the one with the given value."""
    return chain_of(
        chain,
        seq=event.seq,
        event=event.event,
        order_id=event.order_id,
        at_ms=event.at_ms,
        data=event.data,
    )


def _fold(fold: EventProjection, verdict: _Verdict) -> int:
    """Fold the events before the first invalid one; returns their number."""
    for position, event in enumerate(verdict.fresh):
        try:
            fold.add(event)
        except InvalidEvent as poison:
            verdict.kind, verdict.seq = ApplyKind.POISON, event.seq
            verdict.reason = f"{event.event} of {event.order_id or 'the sale'}: {poison}"
            return position
    return len(verdict.fresh)


def _load(connection: Connection, sale_id: str, events: Sequence[Event]) -> EventProjection:
    """The sale's state in SQL, with the orders that the events name."""
    state = SaleState(**connection.execute(_SALE, {"sale": sale_id}).mappings().one())
    items = {row[0]: ItemState(*row) for row in connection.execute(_ITEMS, {"sale": sale_id})}
    return EventProjection(
        sale_id,
        sale=state,
        items=items,
        orders=_load_orders(connection, {event.order_id for event in events} - {""}),
    )


def _load_orders(connection: Connection, order_ids: set[str]) -> dict[str, OrderState]:
    if not order_ids:
        return {}
    dialect = connection.dialect.name
    found = connection.execute(_orders(dialect), {"ids": texts(dialect, order_ids)})
    orders = {row[0]: _order_state(row) for row in found}
    if not orders:
        return orders
    found = connection.execute(_lines(dialect), {"ids": texts(dialect, orders.keys())})
    for order_id, sku, quantity, price in found:
        orders[order_id].lines += ((sku, quantity, price),)
    return orders


@cache
def _orders(dialect: str) -> Executable:
    """The orders with these ids (`ids`)."""
    return select(tables.orders).where(is_among(dialect, tables.orders.c.order_id, "ids"))


@cache
def _lines(dialect: str) -> Executable:
    """The lines of these orders (`ids`), in order."""
    lines = tables.order_lines
    return (
        select(lines.c.order_id, lines.c.sku, lines.c.quantity, lines.c.price)
        .where(is_among(dialect, lines.c.order_id, "ids"))
        .order_by(lines.c.order_id, lines.c.position)
    )


def _order_state(row: Row[Any]) -> OrderState:
    state = OrderState(*row)
    state.status = Status(state.status)
    return state


def _write(
    connection: Connection, sale_id: str, fold: EventProjection, events: Sequence[Event]
) -> None:
    changed = [fold.orders[order_id] for order_id in fold.changed_orders]
    # Without its last field, a state is a row, column by column.
    orders = [msgspec.structs.astuple(order)[:-1] for order in changed]
    upsert(connection, tables.orders, orders, newer_by="seq")
    insert_new(
        connection,
        tables.order_lines,
        [
            (order_id, position, sku, quantity, price)
            for order_id in fold.new_orders
            for position, (sku, quantity, price) in enumerate(fold.orders[order_id].lines)
        ],
    )
    upsert(
        connection,
        tables.items,
        [
            (sale_id, *msgspec.structs.astuple(fold.items[sku]))
            for sku in sorted(fold.changed_items)
        ],
    )
    insert_new(connection, tables.stock_movements, fold.movements)
    insert_new(
        connection,
        tables.events,
        [
            (sale_id, event.seq, event.event, event.order_id, event.at_ms, event.data, event.chain)
            for event in events
        ],
    )
    if fold.ended_attempts:
        # In the same transaction: SQL alone decides which attempts have ended.
        connection.execute(_END_INTENTS, _ended(fold, events[-1].at_ms))
    if fold.sale_changed:
        changes = msgspec.structs.asdict(fold.sale)
        new = {f"new_{name}": value for name, value in changes.items()}
        connection.execute(_SET_SALE, {"sale": sale_id} | new)
    last = events[-1]
    connection.execute(_SET_CURSOR, {"sale": sale_id, "seq": last.seq, "last_chain": last.chain})


def _ended(fold: EventProjection, at_ms: int) -> list[dict[str, str | int]]:
    return [
        {"ended_order": order_id, "ended_key": key, "ended_fence": fence, "at_ms": at_ms}
        for order_id, key, fence in sorted(fold.ended_attempts)
    ]
