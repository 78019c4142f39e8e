"""Assigns the ids of the event feed, under the lock of the row in `feed_heads`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Connection, RowMapping, exists, func, select, update

from reservation.adapters.sql.bulk import among, insert_into, insert_new, upsert
from reservation.adapters.sql.tables import (
    cursors,
    events,
    feed_heads,
    feed_notices,
    feed_positions,
    feed_ranges,
    items,
    purges,
    restores,
    sales,
)
from reservation.domain.event_types import EventType
from reservation.domain.events import EventName
from reservation.domain.states import SaleStatus, Visibility

__all__ = ["HEAD", "RESTORE_IDS", "add_notices", "assign", "changed_phases", "unassigned"]

#: Ids between two restores: more than an installation can assign. 2^53 / 2^40 restores fit JSON.
RESTORE_IDS: Final = 2**40
#: Events of one sale in one range, and sales in one batch: bounds of the transaction.
RANGE_MAX: Final = 5_000
SALES_MAX: Final = 200
HEAD: Final = "events"
#: A draft, in the data of its last `sale_put`; a text cannot contain it, its quotes are escaped.
_DRAFT: Final = f'"visibility":"{Visibility.DRAFT.value}"'
#: The events that begin an epoch or change the window.
_TURNS: Final = (EventName.SALE_PUT, EventName.REBUILT)


class _Position(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `feed_positions`."""

    sale_id: str
    seq: int
    epoch: str
    opens_at_ms: int
    closes_at_ms: int
    phase: str


class _Turn(msgspec.Struct, rename="camel"):
    """The members of an event that begins an epoch or changes the window."""

    epoch: str = ""
    opens_at: int | None = None
    closes_at: int | None = None


class _Batch(msgspec.Struct, frozen=True):
    """Events of one sale that get ids: the ends and the epochs of its ranges, in order."""

    before: _Position
    ranges: tuple[tuple[int, int, str], ...]
    after: _Position


_TURN: Final = msgspec.json.Decoder(_Turn)


def unassigned(connection: Connection) -> list[_Batch]:
    """The next events without an id of each sale, as far as their flushers have committed them."""
    done = func.coalesce(feed_positions.c.seq, 0)
    purged = exists().where(
        purges.c.sale_id == cursors.c.sale_id,
        purges.c.done_at_ms.is_not(None),
        purges.c.seq >= cursors.c.flushed_seq,
    )
    found = connection.execute(
        select(
            cursors.c.sale_id,
            cursors.c.flushed_seq,
            sales.c.epoch.label("sale_epoch"),
            *[feed_positions.c[name] for name in _Position.__struct_fields__[1:]],
        )
        .join(sales, sales.c.sale_id == cursors.c.sale_id)
        .join(feed_positions, feed_positions.c.sale_id == cursors.c.sale_id, isouter=True)
        .where(cursors.c.flushed_seq > done, ~purged)
        .order_by(cursors.c.sale_id)
        .limit(SALES_MAX)
    ).mappings()
    limits: dict[str, tuple[_Position, int]] = {}
    for row in found:
        before = _position(row)
        limits[before.sale_id] = before, min(row["flushed_seq"], before.seq + RANGE_MAX)
    if not limits:
        return []
    turns = _turns(connection, limits)
    return [
        _batch(before, last, turns.get(sale_id, ())) for sale_id, (before, last) in limits.items()
    ]


def _position(row: RowMapping) -> _Position:
    if row["seq"] is not None:
        return _Position(**{name: row[name] for name in _Position.__struct_fields__})
    return _Position(
        sale_id=row["sale_id"],
        seq=0,
        # Of a sale whose first events were purged; otherwise the first event names its epoch.
        epoch=row["sale_epoch"],
        opens_at_ms=0,
        closes_at_ms=0,
        phase=SaleStatus.SCHEDULED.value,
    )


def _turns(
    connection: Connection, limits: Mapping[str, tuple[_Position, int]]
) -> dict[str, list[tuple[int, _Turn]]]:
    """The events in these limits that begin an epoch or change the window, by sale and in order."""
    done = func.coalesce(feed_positions.c.seq, 0)
    found = connection.execute(
        select(events.c.sale_id, events.c.seq, events.c.data)
        .join(feed_positions, feed_positions.c.sale_id == events.c.sale_id, isouter=True)
        .where(
            among(connection, events.c.sale_id, list(limits)),
            events.c.seq > done,
            events.c.seq <= done + RANGE_MAX,
            events.c.event.in_(_TURNS),
        )
        .order_by(events.c.sale_id, events.c.seq)
    )
    turns: dict[str, list[tuple[int, _Turn]]] = {}
    for sale_id, seq, data in found:
        before, last = limits[sale_id]
        if before.seq < seq <= last:
            turns.setdefault(sale_id, []).append((seq, _TURN.decode(data)))
    return turns


def _batch(before: _Position, last: int, turns: Sequence[tuple[int, _Turn]]) -> _Batch:
    """Divide the events up to `last` into ranges of one epoch each."""
    ranges: list[tuple[int, int, str]] = []
    first, after = before.seq + 1, before
    for seq, turn in turns:
        if turn.epoch and turn.epoch != after.epoch:
            if seq > first:
                ranges.append((first, seq - 1, after.epoch))
            first = seq
            after = msgspec.structs.replace(after, epoch=turn.epoch)
        if turn.opens_at is not None and turn.closes_at is not None:
            after = msgspec.structs.replace(
                after, opens_at_ms=turn.opens_at, closes_at_ms=turn.closes_at
            )
    ranges.append((first, last, after.epoch))
    return _Batch(before, tuple(ranges), msgspec.structs.replace(after, seq=last))


def _lock_head(connection: Connection) -> int | None:
    """The last id, locked until the transaction ends; None while another process has the lock."""
    dialect = connection.dialect.name
    connection.execute(
        insert_into(dialect, feed_heads).values(name=HEAD, last_id=0).on_conflict_do_nothing()
    )
    head = connection.execute(
        select(feed_heads.c.last_id)
        .where(feed_heads.c.name == HEAD)
        .with_for_update(skip_locked=True)
    ).scalar_one_or_none()
    if head is None:
        return None
    restored = connection.execute(select(func.max(restores.c.number))).scalar_one() or 0
    return max(head, restored * RESTORE_IDS)


def _set_head(connection: Connection, last_id: int) -> None:
    connection.execute(update(feed_heads).where(feed_heads.c.name == HEAD).values(last_id=last_id))


def _stored(connection: Connection, sale_ids: Collection[str]) -> dict[str, _Position]:
    found = connection.execute(
        select(feed_positions).where(among(connection, feed_positions.c.sale_id, list(sale_ids)))
    )
    return {row["sale_id"]: _Position(**row) for row in found.mappings()}


def assign(connection: Connection, batches: Sequence[_Batch]) -> int:
    began = last_id = _lock_head(connection)
    if began is None or last_id is None:
        return 0
    stored = _stored(connection, [batch.before.sale_id for batch in batches])
    ranges: list[tuple[Any, ...]] = []
    positions: list[tuple[Any, ...]] = []
    for batch in batches:
        before = stored.get(batch.before.sale_id)
        if (before.seq if before else 0) != batch.before.seq:
            continue  # Another process has assigned them since the read.
        for first, last, epoch in batch.ranges:
            last_id += last - first + 1
            ranges.append((last_id, batch.before.sale_id, first, last, epoch))
        phase = before.phase if before else batch.after.phase
        after = msgspec.structs.replace(batch.after, phase=phase)
        positions.append(msgspec.structs.astuple(after))
    insert_new(connection, feed_ranges, ranges)
    upsert(connection, feed_positions, positions)
    _set_head(connection, last_id)
    return last_id - began


def changed_phases(connection: Connection, now_ms: int) -> list[tuple[_Position, str]]:
    """The sales whose status is another one than at their last notice, and that status."""
    has_units = exists().where(
        items.c.sale_id == sales.c.sale_id, items.c.listed, items.c.available > 0
    )
    found = connection.execute(
        select(
            feed_positions,
            sales.c.switched,
            has_units.label("has_units"),
            func.coalesce(sales.c.settings.contains(_DRAFT, autoescape=True), False).label(
                "is_draft"
            ),
        )
        .join(sales, sales.c.sale_id == feed_positions.c.sale_id)
        .where(sales.c.retired_at_ms.is_(None))
        .order_by(feed_positions.c.sale_id)
    ).mappings()
    changed: list[tuple[_Position, str]] = []
    for row in found:
        before = _Position(**{name: row[name] for name in _Position.__struct_fields__})
        # A draft opens for its buyers when it is published.
        phase = SaleStatus.SCHEDULED.value
        if not row["is_draft"]:
            phase = _phase(before, row["switched"], now_ms, has_units=bool(row["has_units"]))
        if phase != before.phase:
            changed.append((before, phase))
    return changed[:SALES_MAX]


def _phase(before: _Position, switched: str, now_ms: int, *, has_units: bool) -> str:
    """The status as `Sale.status` has it; a paused sale keeps its status."""
    if switched == SaleStatus.CLOSED or now_ms >= before.closes_at_ms:
        return SaleStatus.CLOSED.value
    if now_ms < before.opens_at_ms:
        return SaleStatus.SCHEDULED.value
    if switched == SaleStatus.PAUSED:
        return before.phase
    return (SaleStatus.OPEN if has_units else SaleStatus.SOLD_OUT).value


def _notices_of(before: str, phase: str) -> list[EventType]:
    opened = before in (SaleStatus.SCHEDULED, SaleStatus.CLOSED)
    match phase:
        case SaleStatus.OPEN if opened:
            return [EventType.SALE_OPENED]
        case SaleStatus.SOLD_OUT if opened:
            return [EventType.SALE_OPENED, EventType.SALE_SOLD_OUT]
        case SaleStatus.SOLD_OUT:
            return [EventType.SALE_SOLD_OUT]
        case SaleStatus.CLOSED:
            return [EventType.SALE_CLOSED]
        case _:
            return []


def add_notices(
    connection: Connection, changed: Sequence[tuple[_Position, str]], now_ms: int
) -> int:
    last_id = _lock_head(connection)
    if last_id is None:
        return 0
    stored = _stored(connection, [before.sale_id for before, _ in changed])
    notices: list[tuple[Any, ...]] = []
    positions: list[tuple[Any, ...]] = []
    for before, phase in changed:
        now = stored.get(before.sale_id)
        if now is None or now.phase != before.phase:
            continue  # Another process has added them since the read.
        for kind in _notices_of(before.phase, phase):
            last_id += 1
            notices.append((last_id, now.sale_id, now.seq, now.epoch, kind.value, now_ms))
        positions.append(msgspec.structs.astuple(msgspec.structs.replace(now, phase=phase)))
    insert_new(connection, feed_notices, notices)
    upsert(connection, feed_positions, positions)
    _set_head(connection, last_id)
    return len(notices)
