"""Rebuilds in SQL: one at a time for each sale, and the loss that it repairs.

A rebuild begins with another epoch of the sale, in one transaction that holds the lock of the
sale's cursor. A flusher therefore commits before it, or is refused. The rebuild counts its beat up
while it runs; another process that sees the same beat for a while may begin one of its own.
"""

from typing import Final

import msgspec
from sqlalchemy import delete, insert, select, update

from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.event_writer import lock_cursor
from reservation.adapters.sql.tables import rebuilds, sales
from reservation.domain.errors import SaleRecovering

__all__ = ["ABANDONED", "RebuildRepository", "RebuildRow"]

#: The beat of a rebuild that failed: the next one need not wait.
ABANDONED: Final = -1


class RebuildRow(msgspec.Struct, frozen=True, kw_only=True):
    """The rebuild in progress of a sale, or its last one."""

    sale_id: str
    #: The epoch that it gives the sale.
    epoch: str
    #: The epoch that lost events.
    from_epoch: str
    reason: str
    beat: int
    #: The last event of that epoch that a process had seen; 0 if unknown.
    acknowledged_seq: int
    #: The last event in SQL after all survivors were saved there; None before.
    saved_seq: int | None
    began_at_ms: int
    ended_at_ms: int | None


_COLUMNS = [rebuilds.c[name] for name in RebuildRow.__struct_fields__]


class RebuildRepository:
    """Begins, renews and ends rebuilds.

    Each method is one transaction or one read. Any call may raise `SQLAlchemyError` or `OSError`,
    see `SqlStore`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(
        self,
        wanted: RebuildRow,
        *,
        instead_of: str,
        continues: bool,
    ) -> RebuildRow:
        """Begin another epoch: every script returns `recovering` to callers with the old one.

        Args:
            wanted: the rebuild.
            instead_of: the sale's epoch as the caller read it.
            continues: whether an unfinished rebuild of the sale did not reach its last step. This
                one then takes over the reason and the evidence of the loss.

        Raises:
            SaleRecovering: the sale's epoch is another one by now, because another rebuild has
                begun; or the sale was retired.
        """
        sale_id = wanted.sale_id
        async with self._database.write() as connection:
            await connection.run_sync(lock_cursor, sale_id)
            done = await connection.execute(
                update(sales)
                .where(
                    sales.c.sale_id == sale_id,
                    sales.c.epoch == instead_of,
                    sales.c.retired_at_ms.is_(None),
                )
                .values(epoch=wanted.epoch)
            )
            if done.rowcount == 0:
                raise SaleRecovering(retryAfter=0)
            found = await connection.execute(
                select(*_COLUMNS).where(
                    rebuilds.c.sale_id == sale_id, rebuilds.c.epoch == instead_of
                )
            )
            row = found.mappings().one_or_none()
            if continues and row is not None and row["ended_at_ms"] is None:
                before = RebuildRow(**row)
                wanted = msgspec.structs.replace(
                    wanted,
                    from_epoch=before.from_epoch,
                    reason=before.reason,
                    acknowledged_seq=max(before.acknowledged_seq, wanted.acknowledged_seq),
                    saved_seq=before.saved_seq,
                )
            await connection.execute(delete(rebuilds).where(rebuilds.c.sale_id == sale_id))
            await connection.execute(insert(rebuilds).values(msgspec.structs.asdict(wanted)))
        return wanted

    async def renew(self, sale_id: str, epoch: str) -> bool:
        """Count up the beat of a rebuild; False if another one has begun."""
        return await self._change(sale_id, epoch, beat=rebuilds.c.beat + 1)

    async def abandon(self, sale_id: str, epoch: str) -> None:
        """Record that a rebuild failed and is no longer running."""
        await self._change(sale_id, epoch, beat=ABANDONED)

    async def note_saved(self, sale_id: str, epoch: str, seq: int) -> None:
        """Record that SQL has every event that survived in Redis, up to this one."""
        await self._change(sale_id, epoch, saved_seq=seq)

    async def end(self, sale_id: str, epoch: str, now_ms: int) -> None:
        """Record the end of a rebuild."""
        await self._change(sale_id, epoch, ended_at_ms=now_ms)

    async def _change(self, sale_id: str, epoch: str, **values: object) -> bool:
        async with self._database.write() as connection:
            done = await connection.execute(
                update(rebuilds)
                .where(rebuilds.c.sale_id == sale_id, rebuilds.c.epoch == epoch)
                .values(**values)
            )
        return done.rowcount > 0

    async def last(self, sale_id: str) -> RebuildRow | None:
        """The sale's rebuild in progress, or its last one; None if there was none."""
        async with self._database.read() as connection:
            found = await connection.execute(select(*_COLUMNS).where(rebuilds.c.sale_id == sale_id))
            row = found.mappings().one_or_none()
        return RebuildRow(**row) if row else None

    async def list_unfinished(self) -> dict[str, RebuildRow]:
        """The rebuilds without an end, by sale."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS).where(rebuilds.c.ended_at_ms.is_(None))
            )
            return {row["sale_id"]: RebuildRow(**row) for row in found.mappings()}
