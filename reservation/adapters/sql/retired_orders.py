"""Changes orders of retired sales, which only SQL has.

Until its retirement a sale changes in Redis, and SQL follows event by event. Afterwards the same
events are created here: one transaction locks the sale's cursor, reads the order, takes the next
number and chain value, and applies the event as the flusher would.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.event_writer import ApplyKind, SaleBatch, lock_cursor, write_batches
from reservation.adapters.sql.tables import orders, sales
from reservation.domain.errors import BrokenInvariant
from reservation.domain.events import Event, EventName, chain_of
from reservation.domain.states import HOLDING, Status

__all__ = ["RetiredChange", "RetiredOrder", "RetiredOrderRepository"]

_COLUMNS: Final = [orders.c.status, orders.c.fence, orders.c.seq]


class RetiredOrder(msgspec.Struct, frozen=True):
    """The state of an order on which a change depends."""

    status: Status
    fence: int
    seq: int


class RetiredChange(msgspec.Struct, frozen=True):
    """A change to an order: its event, its next status and the members of the event."""

    event: EventName
    to: Status
    members: Mapping[str, Any]
    #: Whether units that the order returns are for sale again; otherwise they leave the sale.
    restock: bool = True


class RetiredOrderRepository:
    """Applies changes to orders of retired sales."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def change(
        self,
        sale_id: str,
        order_id: str,
        decide: Callable[[RetiredOrder], RetiredChange | None],
        *,
        at_ms: int,
    ) -> tuple[RetiredOrder, bool] | None:
        """Change an order as `decide` returns, which reads it under the sale's lock.

        Args:
            sale_id: the retired sale.
            order_id: one of its orders.
            decide: returns the change, or None to leave the order as it is.
            at_ms: the instant of the event.

        Returns:
            The order after the call, and whether it changed; None if there is no such order.

        Raises:
            BrokenInvariant: the sale is not retired, or the event contradicts its rows.
        """
        async with self._database.write() as connection:
            cursor = await connection.run_sync(lock_cursor, sale_id)
            version = await _retired_version(connection, sale_id)
            if cursor is None or version is None:
                raise BrokenInvariant(f"sale {sale_id} is not retired")
            found = await connection.execute(
                select(*_COLUMNS).where(orders.c.order_id == order_id, orders.c.sale_id == sale_id)
            )
            row = found.one_or_none()
            if row is None:
                return None
            before = RetiredOrder(Status(row.status), row.fence, row.seq)
            change = decide(before)
            if change is None:
                return before, False
            seq, chain = cursor[0] + 1, cursor[1]
            data = msgspec.json.encode(_data_of(before, change, version)).decode()
            event = Event(
                sale_id=sale_id,
                seq=seq,
                event=change.event.value,
                order_id=order_id,
                at_ms=at_ms,
                data=data,
                chain=chain_of(
                    chain,
                    seq=seq,
                    event=change.event.value,
                    order_id=order_id,
                    at_ms=at_ms,
                    data=data,
                ),
            )
            [outcome] = await connection.run_sync(write_batches, [SaleBatch(sale_id, [event])])
            if outcome.kind is not ApplyKind.APPLIED:
                raise BrokenInvariant(f"order {order_id} of a retired sale: {outcome.reason}")
            return RetiredOrder(change.to, before.fence, seq), True


def _data_of(before: RetiredOrder, change: RetiredChange, version: int) -> dict[str, Any]:
    """The event's data, with the members that the scripts write."""
    data: dict[str, Any] = {
        "from": before.status.value,
        "to": change.to.value,
        "fence": before.fence,
    }
    withdraws = not change.restock and _gives_up_units(before.status, change.to)
    if withdraws:
        # The total decreases, so the version increases, as with a restock.
        data |= {"restock": False, "version": version + 1}
    elif change.to is Status.REFUNDED:
        data["restock"] = True
    return data | dict(change.members)


def _gives_up_units(status: Status, to: Status) -> bool:
    keeps = {*HOLDING, Status.CONFIRMED}
    return status in keeps and to not in keeps


async def _retired_version(connection: AsyncConnection, sale_id: str) -> int | None:
    """The version of a retired sale; None if there is none."""
    found = await connection.execute(
        select(sales.c.version).where(
            sales.c.sale_id == sale_id, sales.c.retired_at_ms.is_not(None)
        )
    )
    return found.scalar_one_or_none()
