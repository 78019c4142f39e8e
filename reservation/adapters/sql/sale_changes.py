"""The changes of sales by operators: who, when and why."""

from typing import Any, Final

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.bulk import insert_into
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.paging import PAGE_MAX
from reservation.adapters.sql.tables import events, purges, sale_requests, sales
from reservation.domain.events import EventName

__all__ = ["SaleChange", "SaleChangeRepository"]

#: The events of a sale that operators cause.
_CHANGES: Final = (
    EventName.SALE_PUT,
    EventName.SALE_SWITCHED,
    EventName.RESTOCKED,
    EventName.REBUILT,
)
_ARCHIVE: Final = "archive"


class SaleChange(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a sale."""

    at_ms: int
    #: The event's name, or `archive`, `retired` or `purged`.
    what: str
    #: Empty if no operator requested it, or no reason was given.
    operator: str = ""
    reason: str = ""
    #: Further members of the event.
    facts: dict[str, Any] = {}
    #: The number of the event; 0 for a change without one.
    seq: int = 0


class SaleChangeRepository:
    """Reads the changes of sales, and stores those that no event records."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put_archive(self, sale_id: str, *, operator: str, reason: str, now_ms: int) -> None:
        """Record who archives a sale, before it is archived; a repeat replaces the record."""
        async with self._database.write() as connection:
            statement = insert_into(connection.dialect.name, sale_requests)
            changed = {
                name: statement.excluded[name] for name in ("operator", "reason", "created_at_ms")
            }
            await connection.execute(
                statement.on_conflict_do_update(
                    index_elements=["sale_id", "kind"], set_=changed
                ).values(
                    sale_id=sale_id,
                    kind=_ARCHIVE,
                    operator=operator,
                    reason=reason,
                    created_at_ms=now_ms,
                )
            )

    async def remove_archive(self, sale_id: str) -> None:
        """Remove the record of an archive that was refused."""
        async with self._database.write() as connection:
            await connection.execute(
                sale_requests.delete().where(
                    sale_requests.c.sale_id == sale_id, sale_requests.c.kind == _ARCHIVE
                )
            )

    async def page(
        self, sale_id: str, *, before_seq: int | None = None, limit: int = PAGE_MAX
    ) -> tuple[list[SaleChange], int | None]:
        """A page of changes, newest first, and the `before_seq` of the next; None at the end."""
        limit = max(1, min(limit, PAGE_MAX))
        wanted = (
            select(events.c.seq, events.c.event, events.c.at_ms, events.c.data)
            .where(events.c.sale_id == sale_id, events.c.order_id == "")
            .where(events.c.event.in_([name.value for name in _CHANGES]))
            .order_by(events.c.seq.desc())
            .limit(limit + 1)
        )
        if before_seq is not None:
            wanted = wanted.where(events.c.seq < before_seq)
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(wanted)).all()
            # A retired sale takes no further event.
            last = await _after_events(connection, sale_id) if before_seq is None else []
        changes = [_of_event(*row) for row in rows[:limit]]
        return [*last, *changes], changes[-1].seq if len(rows) > limit else None


def _of_event(seq: int, name: str, at_ms: int, data: str) -> SaleChange:
    facts = msgspec.json.decode(data, type=dict[str, Any])
    operator, reason = str(facts.pop("operator", "")), str(facts.pop("reason", ""))
    return SaleChange(
        at_ms=at_ms, what=name, operator=operator, reason=reason, facts=facts, seq=seq
    )


async def _after_events(connection: AsyncConnection, sale_id: str) -> list[SaleChange]:
    """Archive, retirement and purge of a sale, newest first."""
    found: list[SaleChange] = []
    columns = (purges.c.begun_at_ms, purges.c.operator, purges.c.reason)
    for row in await connection.execute(select(*columns).where(purges.c.sale_id == sale_id)):
        found.append(
            SaleChange(
                at_ms=row.begun_at_ms, what="purged", operator=row.operator, reason=row.reason
            )
        )
    retired = await connection.execute(
        select(sales.c.retired_at_ms).where(
            sales.c.sale_id == sale_id, sales.c.retired_at_ms.is_not(None)
        )
    )
    found += [SaleChange(at_ms=row.retired_at_ms, what="retired") for row in retired]
    asked = await connection.execute(
        select(sale_requests).where(sale_requests.c.sale_id == sale_id)
    )
    found += [
        SaleChange(at_ms=row.created_at_ms, what=row.kind, operator=row.operator, reason=row.reason)
        for row in asked
    ]
    return found
