"""An installation with many open sales, of which one is busy."""

from collections.abc import Sequence
from typing import Final

import msgspec
from sqlalchemy import insert, select

from api.http.schemas.sales import SaleRequest
from benchmarks.support.sale import SALE_ID, document, put_directly
from reservation.adapters.sql.tables import metadata
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.workers.flusher import Flusher

__all__ = ["fill"]

#: Sales that are copied in one step.
_COPIES_AT_ONCE: Final = 500


async def fill(settings: Settings, count: int, *, stock: int) -> None:
    """Bring the installation to this many sales besides the busy one, with their events in SQL.

    Args:
        settings: of the installation.
        count: how many; they are `idle-00000` and so forth.
        stock: units of the busy sale, where it does not exist yet.
    """
    async with opened(settings) as service:
        ids = await service.sale_store.ids()
        if not ids:
            await _first_sales(service, settings, stock)
            ids = await service.sale_store.ids()
        template = next(sale_id for sale_id in ids if sale_id != SALE_ID)
        more = [f"idle-{number:05d}" for number in range(len(ids) - 1, count)]
        for start in range(0, len(more), _COPIES_AT_ONCE):
            await _copy(service, template, more[start : start + _COPIES_AT_ONCE])


async def _first_sales(service: Service, settings: Settings, stock: int) -> None:
    """The busy sale, and the idle one that the others are copies of."""
    await put_directly(settings, stock)
    change = msgspec.convert(document(1_000), SaleRequest).change()
    await service.sales.put("idle-00000", change, if_match=None, operator="benchmark")
    flusher = Flusher(service.outbox, service.sql, on_alarm=_alarmed, on_flushed=lambda _: None)
    for sale_id in (SALE_ID, "idle-00000"):
        while (await flusher.run_once(sale_id)).flushed:
            continue


async def _copy(service: Service, template: str, sale_ids: Sequence[str]) -> None:
    """Copy a sale in both stores: creating ten thousand one by one takes minutes."""
    commands = service.connections
    prefix = service.keys.of(template).all
    for name in await commands.command("KEYS", f"{prefix}*"):
        for sale_id in sale_ids:
            copied = service.keys.of(sale_id).all + name.removeprefix(prefix)
            await commands.command("COPY", name, copied)
    async with service.sql.database.write() as connection:
        for table in metadata.sorted_tables:
            if "sale_id" not in table.c:
                continue
            found = await connection.execute(select(table).where(table.c.sale_id == template))
            rows = [dict(row) for row in found.mappings()]
            copies = [row | {"sale_id": sale_id} for row in rows for sale_id in sale_ids]
            if copies:
                await connection.execute(insert(table), copies)
    await commands.command("SADD", service.keys.sales, *sale_ids)


def _alarmed(name: str, **facts: object) -> None:
    raise RuntimeError(f"the flusher's alarm: {name} {facts}")
