"""Partition sale: a sale of several partitions that SQL knows, on a real server."""

import secrets
from collections.abc import Sequence
from typing import Any

from tests.support.in_process import Bench
from tests.support.lua_partition import LuaPartition
from tests.support.lua_sale import PRICES

__all__ = ["PartitionSale"]


class PartitionSale:
    """The partitions of one sale, each a lane in Redis and SQL."""

    def __init__(self, here: Bench, partitions: int) -> None:
        self.here = here
        self.id = f"parts-{secrets.token_hex(4)}"
        connections = here.service.connections
        self.lanes = [LuaPartition(connections, self.id, place) for place in range(partitions)]

    async def open(
        self, units: Sequence[Sequence[int]], *, limit: int = 9, **settings: Any
    ) -> None:
        """Create the partitions: per partition the units of `a` and `b`."""
        for lane, totals in zip(self.lanes, units, strict=True):
            lane.epoch, _ = await self.here.service.sql.sales.register(lane.id, "{}", 1)
            rows = [
                (s, s, PRICES.get(s, 1000), n, limit) for s, n in zip("ab", totals, strict=False)
            ]
            assert await lane.put(items=rows, epoch=lane.epoch, **settings) == ["done", "1"]
            await self.here.flush(lane.id)

    async def flush(self) -> None:
        for lane in self.lanes:
            await self.here.flush(lane.id)

    async def transfer(self, donor: int, receiver: int, units: int, *, number: int = 1) -> None:
        """Lend, write the row, and borrow, with the units of `a`."""
        before = await self.lanes[donor].transfers()
        up_to = int(before.get(f"lent:{receiver}:a", "0 0").split(" ")[1]) + units
        given = await self.lanes[donor].lend(receiver, units=units, after=number - 1)
        assert given == ["lent", str(number), str(units), str(up_to)]
        await self.here.flush(self.lanes[donor].id)
        got = await self.lanes[receiver].borrow(donor, number=number, up_to=up_to)
        assert got[0] == "borrowed"

    async def rebuild(self, place: int, *, force: bool = False) -> None:
        """Rebuild a partition, and learn its epoch."""
        lane = self.lanes[place]
        report = await self.here.service.rebuild.run(lane.id, operator="op", force=force)
        assert report.rebuilt
        lane.epoch = report.epoch

    async def check(self, totals: Sequence[int]) -> None:
        """Judge a quiet moment: every unit is in one partition or in transit, and none twice."""
        for sku, total in zip("ab", totals, strict=False):
            there = [await lane.stock(sku) for lane in self.lanes]
            assert all(n == a + h + s and min(a, h, s) >= 0 for n, a, h, s in there), there
            assert sum(n for n, *_ in there) + await self.in_transit(sku) == total, there

    async def in_transit(self, sku: str) -> int:
        """The units lent and not received yet; no receiver has more than its donor lent."""
        lots = [await lane.transfers() for lane in self.lanes]
        units = 0
        for donor, of_donor in enumerate(lots):
            for receiver, of_receiver in enumerate(lots):
                lent = _lot(of_donor.get(f"lent:{receiver}:{sku}"))
                received = _lot(of_receiver.get(f"received:{donor}:{sku}"))
                assert lent >= received, (donor, receiver, sku)
                units += lent[1] - received[1]
        return units


def _lot(text: str | None) -> tuple[int, int]:
    number, units = (text or "0 0").split(" ")
    return int(number), int(units)
