"""Sales in SQL: registration, epochs and cursors."""

import secrets
from typing import Final

import msgspec
from sqlalchemy import exists, select, update

from reservation.adapters.sql.bulk import insert_new
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import cursors, payment_intents, sales
from reservation.domain.errors import SaleRecovering

__all__ = [
    "SaleRow",
    "cursor_of",
    "epoch_of",
    "known_sales",
    "register_sale",
    "renew_unbegun_sale",
    "sale_document",
    "sale_row",
    "set_epoch",
]

#: 64 random bits: two epochs of one sale never meet.
EPOCH_BYTES: Final = 8


class SaleRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sale's state after its last written event."""

    sale_id: str
    epoch: str
    #: The operator's request that created the sale, JSON.
    document: str
    created_at_ms: int
    #: `data` of the last `sale_put` event, JSON; None until the first one is written.
    settings: str | None
    version: int
    #: open, paused or closed, as last switched by an operator.
    switched: str


async def known_sales(database: Database) -> dict[str, str]:
    """Every sale and its epoch."""
    async with database.read() as connection:
        found = await connection.execute(select(sales.c.sale_id, sales.c.epoch))
        return {row.sale_id: row.epoch for row in found}


async def epoch_of(database: Database, sale_id: str) -> str | None:
    """The sale's epoch, or None where SQL does not know it."""
    async with database.read() as connection:
        found = await connection.execute(select(sales.c.epoch).where(sales.c.sale_id == sale_id))
        epoch: str | None = found.scalar_one_or_none()
    return epoch


async def register_sale(
    database: Database, sale_id: str, document: str, now_ms: int
) -> tuple[str, bool]:
    """Register the sale, before Redis has it; the epoch, and whether this call registered it."""
    epoch = secrets.token_hex(EPOCH_BYTES)
    async with database.write() as connection:
        row = (sale_id, epoch, document, now_ms, None, None, None, 0, "open")
        await insert_new(connection, sales, [row])
        await insert_new(connection, cursors, [(sale_id, 0, "")])
        found = await connection.execute(select(sales.c.epoch).where(sales.c.sale_id == sale_id))
        standing: str = found.scalar_one()
    return standing, standing == epoch


async def renew_unbegun_sale(
    database: Database, sale_id: str, document: str, made_before_ms: int
) -> str | None:
    """Begin another epoch of a sale of which only the registration was written.

    None where the document differs, the registration is not older than `made_before_ms`, or SQL has
    an event or a payment intent of the sale.
    """
    epoch = secrets.token_hex(EPOCH_BYTES)
    begun = exists().where(cursors.c.sale_id == sale_id, cursors.c.flushed_seq > 0)
    asked = exists().where(payment_intents.c.sale_id == sale_id)
    async with database.write() as connection:
        renewed = await connection.execute(
            update(sales)
            .where(
                sales.c.sale_id == sale_id,
                sales.c.document == document,
                sales.c.created_at_ms < made_before_ms,
                ~begun,
                ~asked,
            )
            .values(epoch=epoch)
        )
    return epoch if renewed.rowcount else None


async def sale_document(database: Database, sale_id: str) -> str | None:
    """The operator's request that created the sale; None where SQL does not know the sale."""
    row = await sale_row(database, sale_id)
    return row.document if row else None


async def sale_row(database: Database, sale_id: str) -> SaleRow | None:
    """The sale, or None where SQL does not know it."""
    wanted = [sales.c[name] for name in SaleRow.__struct_fields__]
    async with database.read() as connection:
        found = await connection.execute(select(*wanted).where(sales.c.sale_id == sale_id))
        row = found.mappings().one_or_none()
    return SaleRow(**row) if row else None


async def set_epoch(database: Database, sale_id: str, epoch: str, *, instead_of: str) -> None:
    """Begin another epoch: every script returns `recovering` to callers with the old one.

    Raises:
        SaleRecovering: the sale's epoch is not the one that the caller read: another rebuild has
        begun.
    """
    async with database.write() as connection:
        done = await connection.execute(
            update(sales)
            .where(sales.c.sale_id == sale_id, sales.c.epoch == instead_of)
            .values(epoch=epoch)
        )
        if done.rowcount == 0:
            raise SaleRecovering(retryAfter=0)


async def cursor_of(database: Database, sale_id: str) -> tuple[int, str]:
    """The number and the chain value of the last written event; (0, "") before the first."""
    async with database.read() as connection:
        found = await connection.execute(
            select(cursors.c.flushed_seq, cursors.c.flushed_chain).where(
                cursors.c.sale_id == sale_id
            )
        )
        row = found.one_or_none()
    return (row.flushed_seq, row.flushed_chain) if row else (0, "")
