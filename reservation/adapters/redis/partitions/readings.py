"""Readings of partitions for a certificate: reading.lua."""

from collections.abc import Sequence

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys, lane_of
from reservation.adapters.redis.script_runner import ScriptRunner
from reservation.domain.certificate import Lot, Reading

__all__ = ["PartitionReader"]

#: Direction, peer, SKU, number and units.
_PARTS_OF_LOT = 5


class PartitionReader:
    """Reads partitions, each atomically."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._calls = ScriptRunner(connections)
        self._keys = keys

    async def read(
        self, sale_id: str, partition: int, *, epoch: str, partitions: int, skus: Sequence[str]
    ) -> Reading:
        """Read the units, refills and transfers of a partition.

        Args:
            sale_id: the sale.
            partition: its number.
            epoch: of the partition.
            partitions: number of partitions of the sale.
            skus: the requested items, at most those of one basket.

        Raises:
            NotAcknowledged: too few replicas have the state that was read.
            SaleRecovering: the partition needs a rebuild, or was rebuilt since the caller read
                the epoch.
            and the other errors of `ScriptRunner.run`.
        """
        lane = lane_of(sale_id, partition)
        names = self._keys.of(lane)
        _, of_epoch, refills, due, available, transfers = await self._calls.run(
            "reading",
            lane,
            epoch=epoch,
            keys=[
                names.sale,
                names.deadlines,
                names.outbox,
                names.transfers,
                *map(names.stock, skus),
            ],
            args=[partitions, *skus],
        )
        lots: dict[str, dict[tuple[int, str], Lot]] = {"lent": {}, "received": {}}
        for first in range(0, len(transfers), _PARTS_OF_LOT):
            direction, peer, sku, number, units = transfers[first : first + _PARTS_OF_LOT]
            lots[direction][int(peer), sku] = Lot(int(number), int(units))
        return Reading(
            partition=partition,
            epoch=of_epoch,
            refills=int(refills),
            due=tuple(due),
            available=dict(zip(skus, map(int, available), strict=True)),
            lent=lots["lent"],
            received=lots["received"],
        )
