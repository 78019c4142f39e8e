"""Writes batches of sales' outboxes within a transaction, each event exactly once in effect.

It locks the cursor of each sale, so two flushers take turns. It validates a batch (no gap, an
intact chain, valid events) and folds it to the last state of each order. All batches are written
with their cursors in a handful of statements. Repeated events are detected and skipped.
"""

from collections.abc import Mapping, Sequence
from enum import Enum, auto
from functools import cache
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, Executable, Row, Text, bindparam, insert, select, update

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

__all__ = ["ApplyKind", "ApplyOutcome", "SaleBatch", "lock_cursor", "next_chain", "write_batches"]

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
_SET_SALE: Final = (
    update(_SALES)
    .where(_SALES.c.sale_id == _OF_SALE)
    .values({name: bindparam(f"new_{name}") for name in SaleState.__struct_fields__})
)
_TRANSFERS: Final = tables.transfers
_LEND: Final = [column.name for column in _TRANSFERS.columns]
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
    #: SQL does not have the sale; nothing was written.
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


class SaleBatch(msgspec.Struct, frozen=True):
    """Events of one sale's outbox."""

    sale_id: str
    events: Sequence[Event]
    #: The epoch under which they were read; None accepts any.
    epoch: str | None = None


class _Verdict(msgspec.Struct):
    """The valid prefix of a batch, and the problem of the rest."""

    fresh: list[Event]
    kind: ApplyKind = ApplyKind.APPLIED
    seq: int | None = None
    reason: str = ""


class _Position(msgspec.Struct, frozen=True):
    """A sale in SQL: its cursor, its epoch and its own columns."""

    seq: int
    chain: str
    epoch: str
    state: SaleState


class _Fold(msgspec.Struct, frozen=True):
    """The part of a batch that is written."""

    sale_id: str
    events: Sequence[Event]
    projection: EventProjection


def write_batches(
    connection: Connection, batches: Sequence[SaleBatch], *, skip_locked: bool = False
) -> list[ApplyOutcome]:
    """Write the valid events of these batches that SQL does not have yet.

    Args:
        connection: in a transaction that writes.
        batches: no two of one sale.
        skip_locked: treat a sale whose cursor another transaction has locked as an unknown one,
            so that it delays no other; SQLite has no such locks.

    Raises:
        DBAPIError: SQL refuses a row; the transaction must be rolled back.
    """
    sale_ids = [batch.sale_id for batch in batches]
    positions = _locked(connection, sale_ids, skip_locked=skip_locked)
    verdicts = [_verdict(connection, batch, positions.get(batch.sale_id)) for batch in batches]
    projections = _load(connection, batches, positions, verdicts)
    folds: list[_Fold] = []
    outcomes: list[ApplyOutcome] = []
    for batch, verdict in zip(batches, verdicts, strict=True):
        written: list[Event] = []
        if verdict.fresh:
            projection = projections[batch.sale_id]
            written = verdict.fresh[: _fold(projection, verdict)]
            if written:
                folds.append(_Fold(batch.sale_id, written, projection))
        outcomes.append(_outcome(verdict, positions.get(batch.sale_id), written))
    if folds:
        _write(connection, folds)
    return outcomes


def _outcome(
    verdict: _Verdict, position: _Position | None, written: Sequence[Event]
) -> ApplyOutcome:
    flushed_seq = position.seq if position else 0
    return ApplyOutcome(
        kind=verdict.kind,
        flushed_seq=written[-1].seq if written else flushed_seq,
        written=len(written),
        seq=verdict.seq,
        reason=verdict.reason,
    )


def _locked(
    connection: Connection, sale_ids: Sequence[str], *, skip_locked: bool
) -> dict[str, _Position]:
    """Lock the sales' cursors until the transaction ends, and read the sales."""
    dialect = connection.dialect.name
    ids = {"ids": texts(dialect, sale_ids)}
    locks = _locked_cursors(dialect, skip_locked=skip_locked)
    cursors = {row.sale_id: row for row in connection.execute(locks, ids)}
    positions: dict[str, _Position] = {}
    # After the locks, which a rebuild takes to change the epoch.
    for sale_id, epoch, *state in connection.execute(_states(dialect), ids):
        if cursor := cursors.get(sale_id):
            positions[sale_id] = _Position(
                cursor.flushed_seq, cursor.flushed_chain, epoch, SaleState(*state)
            )
    return positions


def _verdict(connection: Connection, batch: SaleBatch, position: _Position | None) -> _Verdict:
    if position is None:
        return _Verdict([], ApplyKind.UNKNOWN_SALE, reason="SQL has no such sale")
    if batch.epoch is not None and position.epoch != batch.epoch:
        return _Verdict([], ApplyKind.OTHER_EPOCH)
    stored = _chains(connection, batch, position.seq)
    return _judge(batch.events, position.seq, position.chain, stored)


def lock_cursor(connection: Connection, sale_id: str) -> tuple[int, str] | None:
    """Lock a sale's cursor until the transaction ends; return its number and chain value."""
    row = connection.execute(_CURSOR, {"sale": sale_id}).one_or_none()
    return (row.flushed_seq, row.flushed_chain) if row else None


def _chains(connection: Connection, batch: SaleBatch, flushed_seq: int) -> dict[int, str]:
    """The chain values of those events that SQL already has."""
    repeated = [event.seq for event in batch.events if event.seq <= flushed_seq]
    if not repeated:
        return {}
    known = tables.events
    found = connection.execute(
        select(known.c.seq, known.c.chain).where(
            known.c.sale_id == batch.sale_id, known.c.seq.between(min(repeated), max(repeated))
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


def _load(
    connection: Connection,
    batches: Sequence[SaleBatch],
    positions: Mapping[str, _Position],
    verdicts: Sequence[_Verdict],
) -> dict[str, EventProjection]:
    """The state in SQL of each sale with new events, with the orders that the events name."""
    fresh = {
        batch.sale_id: verdict.fresh
        for batch, verdict in zip(batches, verdicts, strict=True)
        if verdict.fresh
    }
    if not fresh:
        return {}
    dialect = connection.dialect.name
    items: dict[str, dict[str, ItemState]] = {sale_id: {} for sale_id in fresh}
    for sale_id, *item in connection.execute(
        _items(dialect), {"ids": texts(dialect, fresh.keys())}
    ):
        items[sale_id][item[0]] = ItemState(*item)
    named = {sale_id: {event.order_id for event in events} for sale_id, events in fresh.items()}
    order_ids = {order_id for ids in named.values() for order_id in ids if order_id}
    orders = _load_orders(connection, order_ids)
    return {
        sale_id: EventProjection(
            sale_id,
            sale=positions[sale_id].state,
            items=items[sale_id],
            orders={order_id: orders[order_id] for order_id in ids if order_id in orders},
        )
        for sale_id, ids in named.items()
    }


@cache
def _locked_cursors(dialect: str, *, skip_locked: bool) -> Executable:
    """The cursors of these sales (`ids`), locked in one order, which prevents deadlocks."""
    return (
        select(_CURSORS.c.sale_id, _CURSORS.c.flushed_seq, _CURSORS.c.flushed_chain)
        .where(is_among(dialect, _CURSORS.c.sale_id, "ids"))
        .order_by(_CURSORS.c.sale_id)
        .with_for_update(skip_locked=skip_locked)
    )


@cache
def _states(dialect: str) -> Executable:
    """The epoch and the own columns of these sales (`ids`)."""
    columns = [_SALES.c[name] for name in SaleState.__struct_fields__]
    return select(_SALES.c.sale_id, _SALES.c.epoch, *columns).where(
        is_among(dialect, _SALES.c.sale_id, "ids")
    )


@cache
def _items(dialect: str) -> Executable:
    """The items of these sales (`ids`)."""
    columns = [tables.items.c[name] for name in ItemState.__struct_fields__]
    return select(tables.items.c.sale_id, *columns).where(
        is_among(dialect, tables.items.c.sale_id, "ids")
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


def _write(connection: Connection, folds: Sequence[_Fold]) -> None:
    upsert(connection, tables.orders, _order_rows(folds), newer_by="seq")
    insert_new(connection, tables.order_lines, _line_rows(folds))
    upsert(connection, tables.items, _item_rows(folds))
    insert_new(
        connection,
        tables.stock_movements,
        [movement for fold in folds for movement in fold.projection.movements],
    )
    insert_new(connection, tables.events, _event_rows(folds))
    if lends := [lend for fold in folds for lend in fold.projection.lends]:
        # A number that was lent before is refused, and its event is poison.
        connection.execute(
            insert(_TRANSFERS), [dict(zip(_LEND, one, strict=True)) for one in lends]
        )
    # In the same transaction: SQL alone decides which attempts have ended.
    if ended := [one for fold in folds for one in _ended(fold)]:
        connection.execute(_END_INTENTS, ended)
    if moved := [_sale_row(fold) for fold in folds if fold.projection.sale_changed]:
        connection.execute(_SET_SALE, moved)
    connection.execute(
        _SET_CURSOR,
        [
            {"sale": fold.sale_id, "seq": fold.events[-1].seq, "last_chain": fold.events[-1].chain}
            for fold in folds
        ],
    )


def _order_rows(folds: Sequence[_Fold]) -> list[tuple[Any, ...]]:
    # Without its last field, a state is a row, column by column.
    return [
        msgspec.structs.astuple(fold.projection.orders[order_id])[:-1]
        for fold in folds
        for order_id in fold.projection.changed_orders
    ]


def _line_rows(folds: Sequence[_Fold]) -> list[tuple[Any, ...]]:
    return [
        (order_id, position, sku, quantity, price)
        for fold in folds
        for order_id in fold.projection.new_orders
        for position, (sku, quantity, price) in enumerate(fold.projection.orders[order_id].lines)
    ]


def _item_rows(folds: Sequence[_Fold]) -> list[tuple[Any, ...]]:
    return [
        (fold.sale_id, *msgspec.structs.astuple(fold.projection.items[sku]))
        for fold in folds
        for sku in sorted(fold.projection.changed_items)
    ]


def _event_rows(folds: Sequence[_Fold]) -> list[tuple[Any, ...]]:
    return [
        (fold.sale_id, one.seq, one.event, one.order_id, one.at_ms, one.data, one.chain)
        for fold in folds
        for one in fold.events
    ]


def _sale_row(fold: _Fold) -> dict[str, Any]:
    changes = msgspec.structs.asdict(fold.projection.sale)
    return {"sale": fold.sale_id} | {f"new_{name}": value for name, value in changes.items()}


def _ended(fold: _Fold) -> list[dict[str, str | int]]:
    at_ms = fold.events[-1].at_ms
    return [
        {"ended_order": order_id, "ended_key": key, "ended_fence": fence, "at_ms": at_ms}
        for order_id, key, fence in sorted(fold.projection.ended_attempts)
    ]
