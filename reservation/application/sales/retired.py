"""Reads a retired sale from SQL, in the form that it had in Redis."""

import msgspec

from reservation.adapters.sql.sales import ItemRow, SaleRow
from reservation.adapters.sql.store import SqlStore
from reservation.domain.sale import Item, Sale, SaleTerms
from reservation.domain.sale_settings import change_of
from reservation.domain.states import SaleStatus

__all__ = ["read_retired"]


async def read_retired(sql: SqlStore, sale_id: str) -> Sale | None:
    """The sale after its last event; None if it is not retired.

    Raises:
        SQLAlchemyError, OSError: SQL does not answer.
    """
    row = await sql.sales.get(sale_id)
    if row is None or row.retired_at_ms is None or row.settings is None:
        return None
    items = await sql.sales.list_items(sale_id)
    seq, _ = await sql.events.cursor(sale_id)
    return _sale(row, items, row.settings, seq)


def _sale(row: SaleRow, items: dict[str, ItemRow], settings: str, seq: int) -> Sale:
    definition, _ = change_of(settings)
    terms = {name: getattr(definition, name) for name in SaleTerms.__struct_fields__}
    listed = [items[item.sku] for item in definition.items if item.sku in items]
    return Sale(
        **terms,
        sale_id=row.sale_id,
        switched=SaleStatus(row.switched),
        version=row.version,
        epoch=row.epoch,
        seq=seq,
        items=tuple(msgspec.convert(item, Item, from_attributes=True) for item in listed),
    )
