"""What processes have seen of Redis, and what was found lost: evidence that outlives all of them.

    marks      the last event of a sale that a process has seen
    processes  which life of the server each process writes to; empty while it writes to none
    losses     a sale and an epoch in which something was lost, whoever found it

A rebuild begins another epoch, and what was seen or lost in an earlier one counts no more.
"""

from collections.abc import Mapping

import msgspec
from sqlalchemy import and_, delete, exists, select

from reservation.adapters.sql.bulk import insert_new, upsert
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import events, losses, marks, processes, sales

__all__ = ["LossLedger", "MarkRow"]


class MarkRow(msgspec.Struct, frozen=True, kw_only=True):
    """An event that a process has seen; `chain` is empty where it knows its number alone."""

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
        """Keep what a process has seen, and which server it writes to."""
        rows = [
            (process, sale_id, mark.epoch, mark.seq, mark.chain, now_ms)
            for sale_id, mark in sorted(seen.items())
        ]
        async with self._database.write() as connection:
            await upsert(connection, marks, rows)
            await upsert(connection, processes, [(process, run_id, now_ms)])

    async def leave(self, process: str) -> None:
        """The process ends and writes to no server any more; what it has seen stays."""
        async with self._database.write() as connection:
            await connection.execute(delete(processes).where(processes.c.process == process))

    async def writers(self, *, since_ms: int) -> dict[str, str]:
        """The processes that were there since then, and the run id of the server of each."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(processes.c.process, processes.c.run_id).where(processes.c.at_ms >= since_ms)
            )
            return {row.process: row.run_id for row in found}

    async def unproven(self) -> dict[str, list[MarkRow]]:
        """The marks of each sale's present epoch that SQL does not have the very event of."""
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
        """Keep that something was lost; the first reason stays."""
        async with self._database.write() as connection:
            await insert_new(connection, losses, [(sale_id, epoch, reason, now_ms)])

    async def reported(self) -> dict[str, str]:
        """The sales that lost something in their present epoch, and what."""
        wanted = select(losses.c.sale_id, losses.c.reason).join(
            sales, and_(sales.c.sale_id == losses.c.sale_id, sales.c.epoch == losses.c.epoch)
        )
        async with self._database.read() as connection:
            return {row.sale_id: row.reason for row in await connection.execute(wanted)}

    async def tidy(self, *, before_ms: int) -> None:
        """Remove processes that are gone, and marks that prove nothing any more."""
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
