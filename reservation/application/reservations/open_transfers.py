"""Open transfers: lends that SQL has and whose borrow was never sent.

A worker receives them without an order, but only after the call of their collector has ended:
otherwise it takes the units from the order that waits. No call lasts longer than
`COLLECT_SECONDS_MAX`, so a transfer that this process has seen open for longer has none. The time
is that of one process, so no two clocks are compared.
"""

from typing import Final

import structlog

from reservation.adapters.redis.keys import lane_of
from reservation.adapters.redis.partitions.transfers import Transfer, Transfers
from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.transfers import LendRow
from reservation.application.reservations.collect import COLLECT_SECONDS_MAX, PartitionedSale
from reservation.domain.clock import Clock

__all__ = ["OpenTransfers"]

log = structlog.get_logger(__name__)

#: A call that was sent right before the end of its collector arrives within this time.
MARGIN_SECONDS: Final = 7.0
OPEN_SECONDS: Final = COLLECT_SECONDS_MAX + MARGIN_SECONDS

_Key = tuple[str, int, str, int]


class OpenTransfers:
    """Finishes the open transfers of sales; one process at a time needs to."""

    def __init__(self, transfers: Transfers, sql: SqlStore, *, clock: Clock) -> None:
        self._transfers = transfers
        self._sql = sql
        self._clock = clock
        #: Since when each open transfer was seen, by the sale.
        self._since: dict[str, dict[_Key, float]] = {}

    async def run_once(self, sale: PartitionedSale) -> int:
        """Finish the transfers that have been open for long enough; return their number.

        Raises:
            The errors of `Transfers.borrow`, SQLAlchemyError, OSError.
        """
        now, before = self._clock.monotonic(), self._since.get(sale.sale_id, {})
        since: dict[_Key, float] = {}
        finished = 0
        for receiver in range(len(sale.epochs)):
            for row in await self._first_open(sale, receiver):
                key = (row.sale_id, row.receiver, row.sku, row.number)
                since[key] = before.get(key, now)
                if now - since[key] >= OPEN_SECONDS:
                    await self._finish(sale, row)
                    finished += 1
        self._since[sale.sale_id] = since
        return finished

    async def _first_open(self, sale: PartitionedSale, receiver: int) -> list[LendRow]:
        """The first open transfer of each donor and SKU to a receiver."""
        donors = {
            lane_of(sale.sale_id, place): place
            for place in range(len(sale.epochs))
            if place != receiver
        }
        rows: list[LendRow] = []
        for last in await self._sql.transfers.list_last(donors, receiver):
            lots = await self._transfers.read_received(sale.sale_id, receiver, donors[last.sale_id])
            has = lots[last.sku].number if last.sku in lots else 0
            if last.number > has:
                rows += await self._sql.transfers.list_after(
                    last.sale_id, receiver, last.sku, has, 1
                )
        return rows

    async def _finish(self, sale: PartitionedSale, row: LendRow) -> None:
        donor = int(row.sale_id.rpartition(".")[2])
        transfer = Transfer(
            sale_id=sale.sale_id,
            donor=donor,
            receiver=row.receiver,
            sku=row.sku,
            number=row.number,
            up_to=row.up_to,
        )
        await self._transfers.borrow(transfer, epoch=sale.epochs[row.receiver])
        log.info(
            "transfer_finished",
            sale_id=sale.sale_id,
            donor=donor,
            receiver=row.receiver,
            sku=row.sku,
            number=row.number,
        )
