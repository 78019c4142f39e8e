"""Events in SQL, and the evidence of events that Redis lost before SQL had them.

    events     the written events of each sale, chained by hash; `cursors` has the last one
    marks      the last event of a sale that a process has seen: high-water marks
    processes  the life of the server that each process writes to; empty while it writes to none
    losses     a sale and an epoch that lost events, with the reason

The evidence is durable and outlives the processes. A rebuild begins another epoch; marks and losses
of earlier epochs are ignored.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec
from sqlalchemy import Connection, and_, delete, exists, select
from sqlalchemy.exc import DBAPIError

from reservation.adapters.sql.bulk import among, among_few, insert_new, upsert
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.errors import is_row_error
from reservation.adapters.sql.event_writer import (
    ApplyKind,
    ApplyOutcome,
    SaleBatch,
    write_batches,
)
from reservation.adapters.sql.group_commit import GroupCommit
from reservation.adapters.sql.tables import cursors, events, losses, marks, processes, sales
from reservation.domain.events import Event, EventName

__all__ = ["EVENTS_MAX", "EventRepository", "MarkRow"]

#: Events in one call: about 10 MB of rows and half a second, the longest that a lock is held.
EVENTS_MAX: Final = 5_000
#: Events of several sales in one transaction. Payments wait for it with SQLite.
EVENTS_SHARED_MAX: Final = 1_000
#: The events by which a payment attempt begins or ends.
_ATTEMPT_EVENTS: Final = (
    EventName.CLAIMED,
    EventName.TAKEN_OVER,
    EventName.CONFIRMED,
    EventName.AWAITING_DEPOSIT,
    EventName.DECLINED,
    EventName.VOIDED,
    EventName.EXPIRED,
    EventName.REFUNDED,
)
_COLUMNS: Final = [events.c[name] for name in Event.__struct_fields__]


class MarkRow(msgspec.Struct, frozen=True, kw_only=True):
    """An event that a process has seen; `chain` is empty if only the number is known."""

    epoch: str
    seq: int
    chain: str
    #: Whether SQL has another event under this number.
    differs: bool = False


class EventRepository:
    """Writes and reads events, and keeps the evidence of lost ones.

    Batches of different sales that are applied at the same time share a transaction.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._group = GroupCommit[SaleBatch, ApplyOutcome](
            self._commit, weigh=lambda batch: len(batch.events), weight_max=EVENTS_SHARED_MAX
        )

    async def aclose(self) -> None:
        """Wait for writes in progress; no new ones may arrive."""
        await self._group.aclose()

    async def apply(
        self, sale_id: str, batch: Sequence[Event], *, epoch: str | None = None
    ) -> ApplyOutcome:
        """Write a batch of the sale's outbox; safe to repeat in whole or in part.

        Args:
            sale_id: the sale.
            batch: its events.
            epoch: write them only if this is the sale's epoch; None accepts any.

        Raises:
            ValueError: more than `EVENTS_MAX` events.
            SQLAlchemyError, OSError: the outcome is unknown; retry the same batch.
        """
        if len(batch) > EVENTS_MAX:
            raise ValueError(f"at most {EVENTS_MAX} events at once")
        try:
            return await self._write(SaleBatch(sale_id, batch, epoch))
        except DBAPIError as error:
            if not is_row_error(error):
                raise
            # The fold accepted an event that SQL rejects: bisect until one event is left.
            if len(batch) == 1:
                return ApplyOutcome(
                    kind=ApplyKind.POISON,
                    flushed_seq=batch[0].seq - 1,
                    seq=batch[0].seq,
                    reason=f"SQL rejects the event: {error.orig}",
                )
        middle = len(batch) // 2
        first = await self.apply(sale_id, batch[:middle], epoch=epoch)
        if first.kind is not ApplyKind.APPLIED:
            return first
        second = await self.apply(sale_id, batch[middle:], epoch=epoch)
        return msgspec.structs.replace(second, written=first.written + second.written)

    async def _write(self, batch: SaleBatch) -> ApplyOutcome:
        outcome = await self._group.submit(batch)
        if outcome.kind is not ApplyKind.UNKNOWN_SALE:
            return outcome
        # Its cursor may be locked. This transaction waits for it, so no other sale is delayed.
        [outcome] = await self._database.run_write(
            lambda connection: write_batches(connection, [batch])
        )
        return outcome

    async def _commit(self, batches: Sequence[SaleBatch]) -> list[ApplyOutcome]:
        def write(connection: Connection) -> list[ApplyOutcome]:
            outcomes: dict[int, ApplyOutcome] = {}
            left = dict(enumerate(batches))
            while left:
                # Several batches of one sale are written in order, one per pass.
                first = {batch.sale_id: number for number, batch in reversed(left.items())}
                numbers = sorted(first.values())
                now = [left.pop(number) for number in numbers]
                written = write_batches(connection, now, skip_locked=True)
                outcomes |= zip(numbers, written, strict=True)
            return [outcomes[number] for number in range(len(batches))]

        return await self._database.run_write(write)

    async def cursor(self, sale_id: str) -> tuple[int, str]:
        """The number and the chain value of the last written event; (0, "") before the first."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(cursors.c.flushed_seq, cursors.c.flushed_chain).where(
                    cursors.c.sale_id == sale_id
                )
            )
            row = found.one_or_none()
        return (row.flushed_seq, row.flushed_chain) if row else (0, "")

    async def has(self, sale_id: str, seq: int, chain: str) -> bool:
        """Whether this event is written; its chain value covers every event before it."""
        if (seq, chain) == await self.cursor(sale_id):
            return True
        async with self._database.read() as connection:
            found = await connection.execute(
                select(events.c.chain).where(events.c.sale_id == sale_id, events.c.seq == seq)
            )
            return found.scalar_one_or_none() == chain

    async def cursors(self, sale_ids: Collection[str]) -> dict[str, int]:
        """The number of the last written event of these sales; other sales may be included."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(cursors.c.sale_id, cursors.c.flushed_seq).where(
                    among_few(connection, cursors.c.sale_id, sale_ids)
                )
            )
            return {row.sale_id: row.flushed_seq for row in found}

    async def list_after(self, sale_id: str, after_seq: int, limit: int) -> list[Event]:
        """The sale's written events after this one, in order."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS)
                .where(events.c.sale_id == sale_id, events.c.seq > after_seq)
                .order_by(events.c.seq)
                .limit(limit)
            )
            return [Event(**row) for row in found.mappings()]

    async def list_payment_events(self, order_ids: Collection[str]) -> dict[str, list[Event]]:
        """The payment events of each of these orders, in order; without orders that have none."""
        by_order: dict[str, list[Event]] = {}
        if not order_ids:
            return by_order
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS)
                .where(
                    among(connection, events.c.order_id, list(order_ids)),
                    events.c.order_id != "",
                    events.c.event.in_(_ATTEMPT_EVENTS),
                )
                .order_by(events.c.order_id, events.c.seq)
            )
            for row in found.mappings():
                by_order.setdefault(row["order_id"], []).append(Event(**row))
        return by_order

    async def list_restocks(self, sale_id: str) -> list[str]:
        """The data of every restock of the sale, JSON, in order."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(events.c.data)
                .where(events.c.sale_id == sale_id, events.c.event == EventName.RESTOCKED)
                .order_by(events.c.seq)
            )
            return list(found.scalars())

    async def put_marks(
        self, process: str, *, run_id: str, seen: Mapping[str, MarkRow], now_ms: int
    ) -> None:
        """Store the marks of a process, and the server that it writes to."""
        rows = [
            (process, sale_id, mark.epoch, mark.seq, mark.chain, now_ms)
            for sale_id, mark in sorted(seen.items())
        ]

        def put(connection: Connection) -> None:
            upsert(connection, marks, rows)
            upsert(connection, processes, [(process, run_id, now_ms)])

        await self._database.run_write(put)

    async def remove_process(self, process: str) -> None:
        """Remove a process that ends and no longer writes to a server; its marks stay."""
        async with self._database.write() as connection:
            await connection.execute(delete(processes).where(processes.c.process == process))

    async def list_writers(self, *, since_ms: int) -> dict[str, str]:
        """The processes that have written since then, and the run id of the server of each."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(processes.c.process, processes.c.run_id).where(processes.c.at_ms >= since_ms)
            )
            return {row.process: row.run_id for row in found}

    async def list_unproven_marks(self) -> dict[str, list[MarkRow]]:
        """The marks of each sale's current epoch whose event SQL does not have."""
        this_event = and_(events.c.sale_id == marks.c.sale_id, events.c.seq == marks.c.seq)
        this_epoch = and_(sales.c.sale_id == marks.c.sale_id, sales.c.epoch == marks.c.epoch)
        wanted = (
            select(
                marks.c.sale_id,
                marks.c.epoch,
                marks.c.seq,
                marks.c.chain,
                events.c.chain.is_not(None).label("differs"),
            )
            .join(sales, this_epoch)
            .join(events, this_event, isouter=True)
            .where(
                events.c.chain.is_(None)
                | ((marks.c.chain != "") & (events.c.chain != marks.c.chain))
            )
            .distinct()
        )
        found: dict[str, list[MarkRow]] = {}
        async with self._database.read() as connection:
            for row in await connection.execute(wanted):
                mark = MarkRow(
                    epoch=row.epoch, seq=row.seq, chain=row.chain, differs=bool(row.differs)
                )
                found.setdefault(row.sale_id, []).append(mark)
        return found

    async def add_loss(self, sale_id: str, epoch: str, reason: str, now_ms: int) -> None:
        """Record a loss of events; the first reason stays."""
        async with self._database.write() as connection:
            await connection.run_sync(insert_new, losses, [(sale_id, epoch, reason, now_ms)])

    async def list_losses(self) -> dict[str, str]:
        """The sales that lost events in their current epoch, and the reasons."""
        wanted = select(losses.c.sale_id, losses.c.reason).join(
            sales, and_(sales.c.sale_id == losses.c.sale_id, sales.c.epoch == losses.c.epoch)
        )
        async with self._database.read() as connection:
            return {row.sale_id: row.reason for row in await connection.execute(wanted)}

    async def prune_marks(self, *, before_ms: int) -> None:
        """Remove ended processes, and marks that no longer prove anything."""
        of_this_epoch = exists().where(
            sales.c.sale_id == marks.c.sale_id, sales.c.epoch == marks.c.epoch
        )
        in_sql = exists().where(
            events.c.sale_id == marks.c.sale_id,
            events.c.seq == marks.c.seq,
            (marks.c.chain == "") | (events.c.chain == marks.c.chain),
        )
        async with self._database.write() as connection:
            await connection.execute(
                delete(marks).where(marks.c.at_ms < before_ms, in_sql | ~of_this_epoch)
            )
            await connection.execute(delete(processes).where(processes.c.at_ms < before_ms))
