"""High-water marks and losses of Redis, as durable evidence that outlives the processes.

    marks      the last event of a sale that a process has seen
    processes  the life of the server that each process writes to; empty while it writes to none
    losses     a sale and an epoch that lost events, with the reason

A rebuild begins another epoch; marks and losses of earlier epochs are ignored.
"""

from collections.abc import Mapping

import msgspec
from sqlalchemy import and_, delete, exists, select

from reservation.adapters.sql.bulk import insert_new, upsert
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import events, losses, marks, processes, sales

__all__ = ["LossLedger", "MarkRow"]


class MarkRow(msgspec.Struct, frozen=True, kw_only=True):
    """An event that a process has seen; `chain` is empty where it knows only the number."""

    epoch: str
    seq: int
    chain: str
    #: Whether SQL has another event under this number.
    differs: bool = False


class LossLedger:
    """The three tables; each method is one transaction or one read."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(
        self, process: str, *, run_id: str, seen: Mapping[str, MarkRow], now_ms: int
    ) -> None:
        """Store the marks of a process, and the server that it writes to."""
        rows = [
            (process, sale_id, mark.epoch, mark.seq, mark.chain, now_ms)
            for sale_id, mark in sorted(seen.items())
        ]
        async with self._database.write() as connection:
            await upsert(connection, marks, rows)
            await upsert(connection, processes, [(process, run_id, now_ms)])

    async def leave(self, process: str) -> None:
        """The process ends and no longer writes to a server; its marks stay."""
        async with self._database.write() as connection:
            await connection.execute(delete(processes).where(processes.c.process == process))

    async def writers(self, *, since_ms: int) -> dict[str, str]:
        """The processes that have written since then, and the run id of the server of each."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(processes.c.process, processes.c.run_id).where(processes.c.at_ms >= since_ms)
            )
            return {row.process: row.run_id for row in found}

    async def unproven(self) -> dict[str, list[MarkRow]]:
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

    async def report(self, sale_id: str, epoch: str, reason: str, now_ms: int) -> None:
        """Record a loss of events; the first reason stays."""
        async with self._database.write() as connection:
            await insert_new(connection, losses, [(sale_id, epoch, reason, now_ms)])

    async def reported(self) -> dict[str, str]:
        """The sales that lost events in their current epoch, and the reasons."""
        wanted = select(losses.c.sale_id, losses.c.reason).join(
            sales, and_(sales.c.sale_id == losses.c.sale_id, sales.c.epoch == losses.c.epoch)
        )
        async with self._database.read() as connection:
            return {row.sale_id: row.reason for row in await connection.execute(wanted)}

    async def tidy(self, *, before_ms: int) -> None:
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
