"""Restores in SQL: each restore of a backup leaves a mark, and its sales stay closed until opened.

The mark is written with new epochs in one transaction, before any process can use the database. A
token, a head in Redis or a process of the time before the restore has another epoch.
"""

import secrets

import msgspec
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.sales import EPOCH_BYTES
from reservation.adapters.sql.schema_version import bar, level_of, unbar
from reservation.adapters.sql.tables import losses, marks, processes, restores, sales
from reservation.domain.levels import LEVEL_OF_0_1_0

__all__ = ["RestoreRepository", "RestoreRow", "mark_restored"]


class RestoreRow(msgspec.Struct, frozen=True, kw_only=True):
    """One restore."""

    number: int
    #: The instant of the backup.
    taken_at_ms: int
    restored_at_ms: int
    operator: str
    reason: str
    compared_at_ms: int | None
    without_list: bool
    opened_at_ms: int | None
    opened_by: str | None
    opened_reason: str | None


_COLUMNS = [restores.c[name] for name in RestoreRow.__struct_fields__]


class RestoreRepository:
    """Writes and reads the marks of restores."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def last(self) -> RestoreRow | None:
        """The last restore; None if there was none."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS).order_by(restores.c.number.desc()).limit(1)
            )
            row = found.mappings().one_or_none()
        return RestoreRow(**row) if row else None

    async def pending(self) -> RestoreRow | None:
        """The last restore while its sales are not opened; else None."""
        row = await self.last()
        return row if row is not None and row.opened_at_ms is None else None

    async def note_comparison(self, number: int, *, at_ms: int, without_list: bool) -> None:
        """Record that the restored data was compared with the gateway."""
        async with self._database.write() as connection:
            await connection.execute(
                update(restores)
                .where(restores.c.number == number)
                .values(compared_at_ms=at_ms, without_list=without_list)
            )

    async def open(self, number: int, *, at_ms: int, operator: str, reason: str) -> None:
        """Open the sales; a restore that is open stays as it is."""
        async with self._database.write() as connection:
            await connection.execute(
                update(restores)
                .where(restores.c.number == number, restores.c.opened_at_ms.is_(None))
                .values(opened_at_ms=at_ms, opened_by=operator, opened_reason=reason)
            )
            if await level_of(connection) == LEVEL_OF_0_1_0:
                await connection.run_sync(unbar)


async def mark_restored(
    connection: AsyncConnection,
    *,
    taken_at_ms: int,
    restored_at_ms: int,
    operator: str,
    reason: str,
) -> None:
    """Record a restore, and begin another epoch of each sale that is not retired.

    Processes of release 0.1.0, which ignores the mark, cannot start until the sales are
    opened.

    Args:
        connection: in the transaction that makes the restored data usable.
        taken_at_ms: the instant of the backup. If this backup was itself taken after a restore
            that was not opened, that restore's instant counts.
        restored_at_ms: the present time.
        operator: the operator's name.
        reason: why.
    """
    found = await connection.execute(
        select(restores.c.number, restores.c.taken_at_ms, restores.c.opened_at_ms)
        .order_by(restores.c.number.desc())
        .limit(1)
    )
    last = found.one_or_none()
    if last is not None and last.opened_at_ms is None:
        # The data was restored before, and not opened: it lacks all changes since that backup.
        taken_at_ms = min(taken_at_ms, last.taken_at_ms)
    await connection.execute(
        insert(restores).values(
            number=last.number + 1 if last is not None else 1,
            taken_at_ms=min(taken_at_ms, restored_at_ms),
            restored_at_ms=restored_at_ms,
            operator=operator,
            reason=reason,
            without_list=False,
        )
    )
    await _begin_epochs(connection)
    # They are of earlier epochs, and of processes that have ended.
    for table in (marks, processes, losses):
        await connection.execute(delete(table))
    await connection.run_sync(bar)


async def _begin_epochs(connection: AsyncConnection) -> None:
    found = await connection.execute(
        select(sales.c.sale_id).where(sales.c.retired_at_ms.is_(None)).order_by(sales.c.sale_id)
    )
    for sale_id in found.scalars().all():
        await connection.execute(
            update(sales)
            .where(sales.c.sale_id == sale_id)
            .values(epoch=secrets.token_hex(EPOCH_BYTES))
        )
