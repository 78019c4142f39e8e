"""Sales in SQL: registrations, epochs, items and counters."""

import secrets
from collections.abc import Collection
from typing import Final

import msgspec
from sqlalchemy import ColumnElement, Row, Select, case, exists, func, select, update

from reservation.adapters.sql.bulk import among, among_few, insert_new
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import (
    cursors,
    items,
    order_lines,
    orders,
    payment_intents,
    sales,
)
from reservation.domain.states import HOLDING, Status

__all__ = ["ItemRow", "SaleFold", "SaleHead", "SaleRepository", "SaleRow", "SkuFold"]

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
    #: The time of the retirement; None while Redis has the sale.
    retired_at_ms: int | None


class SaleHead(msgspec.Struct, frozen=True, kw_only=True):
    """SQL's position in a sale, and the epoch."""

    epoch: str
    seq: int
    chain: str


class ItemRow(msgspec.Struct, frozen=True, kw_only=True):
    """One item with its counters."""

    sku: str
    name: str
    price: int
    limit_per_buyer: int
    total: int
    available: int
    held: int
    sold: int


class SkuFold(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one item; `confirming` is part of `held`."""

    total: int
    available: int
    held: int
    confirming: int
    sold: int


class SaleFold(msgspec.Struct, frozen=True, kw_only=True):
    """A sale's counters in SQL, from one snapshot."""

    flushed_seq: int
    chain: str
    skus: dict[str, SkuFold]


_COLUMNS = [sales.c[name] for name in SaleRow.__struct_fields__]
_ITEM_COLUMNS = [items.c[name] for name in ItemRow.__struct_fields__]


class SaleRepository:
    """Registers sales, and reads their epochs, items and counters.

    Each method is one transaction or one read. All writes are idempotent. Any call may raise
    `SQLAlchemyError` or `OSError`, see `SqlStore`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def register(self, sale_id: str, document: str, now_ms: int) -> tuple[str, bool]:
        """Register a sale before Redis has it; its epoch, and whether this call registered it."""
        epoch = secrets.token_hex(EPOCH_BYTES)
        async with self._database.write() as connection:
            row = (sale_id, epoch, document, now_ms, None, None, None, 0, "open", None)
            await connection.run_sync(insert_new, sales, [row])
            await connection.run_sync(insert_new, cursors, [(sale_id, 0, "")])
            found = await connection.execute(
                select(sales.c.epoch).where(sales.c.sale_id == sale_id)
            )
            existing: str = found.scalar_one()
        return existing, existing == epoch

    async def renew_unbegun(self, sale_id: str, document: str, made_before_ms: int) -> str | None:
        """Begin another epoch of a sale of which only the registration was written.

        None if the document differs, the registration is not older than `made_before_ms`, or
        SQL has an event or a payment intent of the sale.
        """
        epoch = secrets.token_hex(EPOCH_BYTES)
        begun = exists().where(cursors.c.sale_id == sale_id, cursors.c.flushed_seq > 0)
        asked = exists().where(payment_intents.c.sale_id == sale_id)
        async with self._database.write() as connection:
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

    async def get(self, sale_id: str) -> SaleRow | None:
        """The sale's state after its last written event; None if SQL does not have the sale."""
        async with self._database.read() as connection:
            found = await connection.execute(select(*_COLUMNS).where(sales.c.sale_id == sale_id))
            row = found.mappings().one_or_none()
        return SaleRow(**row) if row else None

    async def list_by_id(self, sale_ids: Collection[str]) -> list[SaleRow]:
        """The states of these sales; sales that SQL does not have are left out."""
        async with self._database.read() as connection:
            some = among(connection, sales.c.sale_id, sale_ids)
            found = await connection.execute(select(*_COLUMNS).where(some))
            return [SaleRow(**row) for row in found.mappings()]

    async def epochs(self) -> dict[str, str]:
        """Every sale and its epoch."""
        async with self._database.read() as connection:
            found = await connection.execute(select(sales.c.sale_id, sales.c.epoch))
            return {row.sale_id: row.epoch for row in found}

    async def epoch(self, sale_id: str) -> str | None:
        """The sale's epoch, or None if SQL does not have it."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(sales.c.epoch).where(sales.c.sale_id == sale_id)
            )
            return found.scalar_one_or_none()

    async def count_retired(self) -> int:
        """The number of retired sales."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(func.count()).select_from(sales).where(sales.c.retired_at_ms.is_not(None))
            )
            return found.scalar_one()

    async def list_retired(self) -> list[str]:
        """The ids of all retired sales."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(sales.c.sale_id).where(sales.c.retired_at_ms.is_not(None))
            )
            return [row.sale_id for row in found]

    async def retire(self, sale_id: str, head: SaleHead, now_ms: int) -> bool:
        """Record the retirement of a sale if this is its last event; return whether it is retired.

        Args:
            sale_id: the sale.
            head: the last event of the sale in Redis, which accepts no further one.
            now_ms: the instant of the retirement; an earlier record is kept.
        """
        ends_here = exists().where(
            cursors.c.sale_id == sale_id,
            cursors.c.flushed_seq == head.seq,
            cursors.c.flushed_chain == head.chain,
        )
        async with self._database.write() as connection:
            await connection.execute(
                update(sales)
                .where(
                    sales.c.sale_id == sale_id,
                    sales.c.epoch == head.epoch,
                    sales.c.retired_at_ms.is_(None),
                    ends_here,
                )
                .values(retired_at_ms=now_ms)
            )
            found = await connection.execute(
                select(sales.c.retired_at_ms).where(sales.c.sale_id == sale_id)
            )
            return found.scalar_one_or_none() is not None

    async def heads(self, sale_ids: Collection[str] | None = None) -> dict[str, SaleHead]:
        """The epoch and the last written event of these sales, without retired ones.

        The result may include other sales.

        Args:
            sale_ids: the sales; None means all.
        """
        wanted = (
            select(sales.c.sale_id, sales.c.epoch, cursors.c.flushed_seq, cursors.c.flushed_chain)
            .join(cursors, cursors.c.sale_id == sales.c.sale_id)
            .where(sales.c.retired_at_ms.is_(None))
        )
        async with self._database.read() as connection:
            some = among_few(connection, sales.c.sale_id, sale_ids)
            found = await connection.execute(wanted.where(some))
            return {
                row.sale_id: SaleHead(epoch=row.epoch, seq=row.flushed_seq, chain=row.flushed_chain)
                for row in found
            }

    async def list_items(self, sale_id: str) -> dict[str, ItemRow]:
        """The items on sale with their counters, by SKU."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_ITEM_COLUMNS).where(items.c.sale_id == sale_id, items.c.listed)
            )
            return {row["sku"]: ItemRow(**row) for row in found.mappings()}

    async def counters(self, sale_id: str) -> SaleFold | None:
        """The sale's counters up to its last written event; None if SQL does not have the sale.

        Held and sold are counted from the orders, total and available come from the items'
        rows: an error in either one breaks the sum.
        """
        async with self._database.snapshot() as connection:
            cursor = (
                await connection.execute(
                    select(cursors.c.flushed_seq, cursors.c.flushed_chain).where(
                        cursors.c.sale_id == sale_id
                    )
                )
            ).one_or_none()
            if cursor is None:
                return None
            known = (
                await connection.execute(
                    select(items.c.sku, items.c.total, items.c.available).where(
                        items.c.sale_id == sale_id
                    )
                )
            ).all()
            counted = {row.sku: row for row in await connection.execute(_counted(sale_id))}
        skus = {
            row.sku: SkuFold(
                total=row.total, available=row.available, **_units(counted.get(row.sku))
            )
            for row in known
        }
        return SaleFold(flushed_seq=cursor.flushed_seq, chain=cursor.flushed_chain, skus=skus)


def _units(row: Row[str, int, int, int] | None) -> dict[str, int]:
    # PostgreSQL's sum of a BIGINT is a Decimal.
    return {
        name: int(getattr(row, name)) if row is not None else 0
        for name in ("held", "confirming", "sold")
    }


def _counted(sale_id: str) -> Select[str, int, int, int]:
    def units(name: str, *statuses: Status) -> ColumnElement[int]:
        wanted = orders.c.status.in_(sorted(statuses))
        return func.sum(case((wanted, order_lines.c.quantity), else_=0)).label(name)

    return (
        select(
            order_lines.c.sku,
            units("held", *HOLDING),
            units("confirming", Status.CONFIRMING),
            units("sold", Status.CONFIRMED),
        )
        .join(orders, orders.c.order_id == order_lines.c.order_id)
        .where(
            orders.c.sale_id == sale_id, orders.c.status.in_(sorted({*HOLDING, Status.CONFIRMED}))
        )
        .group_by(order_lines.c.sku)
    )
