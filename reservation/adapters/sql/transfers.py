"""Transfers in SQL: the lends of partitions, and the last transfer of each kind by the events.

The flusher writes the row of a lend with its event. A row therefore proves that SQL has every event
of the donor up to the lend, and only then may the receiver take the units.
"""

from collections.abc import Collection, Mapping
from typing import Final

import msgspec
from sqlalchemy import and_, func, select

from reservation.adapters.sql.bulk import among
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import events, transfers
from reservation.domain.events import EventName

__all__ = ["LastTransfer", "LendRow", "TransferRepository"]

_DIRECTIONS: Final = {EventName.LENT: "lent", EventName.BORROWED: "received"}


class LendRow(msgspec.Struct, frozen=True, kw_only=True):
    """One lend; `sale_id` is the donor's lane."""

    sale_id: str
    receiver: int
    sku: str
    number: int
    units: int
    #: Units of all lends of this donor, receiver and SKU up to this number.
    up_to: int
    #: The donor's event.
    seq: int
    operation: str


class LastTransfer(msgspec.Struct, frozen=True, rename="camel"):
    """The last transfer of one direction, peer and SKU, in the event of its partition."""

    peer: int
    sku: str
    number: int
    units: int
    up_to: int
    #: Only a lend has one.
    operation: str = ""


_COLUMNS = [transfers.c[name] for name in LendRow.__struct_fields__]
_EVENT: Final = msgspec.json.Decoder(LastTransfer)


class TransferRepository:
    """Reads transfers; `write_batches` writes them with their events.

    Any call may raise `SQLAlchemyError` or `OSError`, see `SqlStore`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, donor: str, receiver: int, sku: str, number: int) -> LendRow | None:
        """The lend of this number; None until SQL has every event of the donor up to it."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS).where(
                    transfers.c.sale_id == donor,
                    transfers.c.receiver == receiver,
                    transfers.c.sku == sku,
                    transfers.c.number == number,
                )
            )
            row = found.mappings().one_or_none()
        return LendRow(**row) if row else None

    async def list_after(
        self, donor: str, receiver: int, sku: str, after: int, limit: int
    ) -> list[LendRow]:
        """The lends of a donor to a receiver after this number, in order."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(*_COLUMNS)
                .where(
                    transfers.c.sale_id == donor,
                    transfers.c.receiver == receiver,
                    transfers.c.sku == sku,
                    transfers.c.number > after,
                )
                .order_by(transfers.c.number)
                .limit(limit)
            )
            return [LendRow(**row) for row in found.mappings()]

    async def list_last(self, donors: Collection[str], receiver: int) -> list[LendRow]:
        """The last lend of each of these partitions to a receiver, per SKU."""
        if not donors:
            return []
        async with self._database.read() as connection:
            last = (
                select(
                    transfers.c.sale_id,
                    transfers.c.sku,
                    func.max(transfers.c.number).label("number"),
                )
                .where(
                    among(connection, transfers.c.sale_id, list(donors)),
                    transfers.c.receiver == receiver,
                )
                .group_by(transfers.c.sale_id, transfers.c.sku)
                .subquery()
            )
            found = await connection.execute(
                select(*_COLUMNS)
                .join(
                    last,
                    and_(
                        transfers.c.sale_id == last.c.sale_id,
                        transfers.c.sku == last.c.sku,
                        transfers.c.number == last.c.number,
                    ),
                )
                .where(transfers.c.receiver == receiver)
                .order_by(transfers.c.sale_id, transfers.c.sku)
            )
            return [LendRow(**row) for row in found.mappings()]

    async def last_of(self, partition: str) -> Mapping[tuple[str, int, str], LastTransfer]:
        """The last transfer of each direction (lent, received), peer and SKU, by the events."""
        async with self._database.read() as connection:
            found = await connection.execute(
                select(events.c.event, events.c.data)
                .where(events.c.sale_id == partition, events.c.event.in_(_DIRECTIONS))
                .order_by(events.c.seq)
            )
            last: dict[tuple[str, int, str], LastTransfer] = {}
            for row in found:
                one = _EVENT.decode(row.data)
                last[_DIRECTIONS[EventName(row.event)], one.peer, one.sku] = one
        return last
