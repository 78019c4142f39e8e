"""Peers of a partition that is rebuilt: the units that moved between them and it.

    borrow again    each transfer that SQL has and the partition lost
    lend again      each transfer that a peer has received and the partition lost

In this order, because the partition may have lent units that it had borrowed. A peer may be closed
or in a rebuild of its own, so its received transfers are the later of two reads:

    its server      as it is; a rebuild of the peer clears it only once SQL has all of it
    SQL             read second, so the clearing of the peer hides nothing

No transfer that the partition gave before this rebuild appears afterwards: a borrow is sent only
after SQL has the lend, and SQL has taken the last event of the epoch that has ended.
"""

from typing import Final

import structlog

from reservation.adapters.redis.keys import lane_of, partition_of
from reservation.adapters.redis.partitions.transfers import Transfer, Transfers
from reservation.adapters.sql.store import SqlStore
from reservation.application.recovery.survivors import Uncertain
from reservation.domain.certificate import PARTITIONS_MAX, Lot

__all__ = ["PartitionPeers"]

log = structlog.get_logger(__name__)

_NOTHING: Final = Lot(0, 0)


class PartitionPeers:
    """Compares a partition with its peers, under the epoch of its rebuild; may be repeated."""

    def __init__(self, transfers: Transfers, sql: SqlStore) -> None:
        self._transfers = transfers
        self._sql = sql

    async def compare(self, lane: str, epoch: str) -> None:
        """Move the units that were lent and borrowed in the lost events.

        Raises:
            Uncertain: the partition lacks units that a peer has received of it.
            SaleRecovering: another rebuild has begun.
            StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError: a server does not answer.
        """
        sale_id, place = partition_of(lane)
        lanes = [lane_of(sale_id, peer) for peer in range(PARTITIONS_MAX) if peer != place]
        known = {row.sale_id for row in await self._sql.sales.list_by_id(lanes)}
        peers = [partition_of(one)[1] for one in lanes if one in known]
        for peer in peers:
            await self.borrow_again(sale_id, place, peer, epoch)
        for peer in peers:
            await self.lend_again(sale_id, place, peer, epoch)

    async def borrow_again(self, sale_id: str, place: int, peer: int, epoch: str) -> None:
        """Receive every transfer of a peer that SQL has; the last one stands for all before it."""
        for row in await self._sql.transfers.list_last([lane_of(sale_id, peer)], place):
            transfer = Transfer(
                sale_id=sale_id,
                donor=peer,
                receiver=place,
                sku=row.sku,
                number=row.number,
                up_to=row.up_to,
            )
            await self._transfers.borrow(transfer, epoch=epoch)

    async def lend_again(self, sale_id: str, place: int, peer: int, epoch: str) -> None:
        """Repeat each lend that a peer has received and this partition lacks."""
        for sku, has in (await self._received(sale_id, peer, place)).items():
            available = await self._transfers.lend_again(
                sale_id, place, peer, epoch=epoch, sku=sku, has=has
            )
            if available is not None:
                raise Uncertain(
                    f"partition {peer} has received {has.units} units of {sku} in all, and of"
                    f" those that this partition lacks {available} are available"
                )

    async def _received(self, sale_id: str, peer: int, donor: int) -> dict[str, Lot]:
        lots = await self._transfers.read_received(sale_id, peer, donor)
        last = await self._sql.transfers.last_of(lane_of(sale_id, peer))
        for (direction, of, sku), one in last.items():
            if (direction, of) == ("received", donor):
                lots[sku] = max(
                    lots.get(sku, _NOTHING), Lot(one.number, one.up_to), key=lambda lot: lot.number
                )
        return lots
