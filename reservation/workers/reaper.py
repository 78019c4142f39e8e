"""Reaper: expires the holds whose deadline has passed.

No sale waits for it: a prepare that finds its stock in expired holds expires them itself.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Final

from reservation.adapters.redis.expiry import EXPIRE_BATCH
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.application.sales.catalog import Catalog
from reservation.telemetry.metrics import REAPED

__all__ = ["Reaper"]

#: Batches of one read of the deadlines: their names are read in half a millisecond.
BATCHES_PER_READ: Final = 5
#: Reads in one round, so that one sale's flood does not starve the others.
READS_MAX: Final = 5
#: Batches in flight: Redis expires the holds of one while the other is read and packed here.
#: A third would only make a buyer's call wait for one more script.
BATCHES_AT_ONCE: Final = 2


class Reaper:
    """Expires due holds."""

    def __init__(self, catalog: Catalog, store: ReservationStore) -> None:
        self._catalog = catalog
        self._store = store

    async def run_once(self, sale_id: str) -> int:
        """One round for one sale; the number of holds released.

        Raises:
            Exception: a hold is damaged, and nothing else is due.
        """
        expired = 0
        for _ in range(READS_MAX):
            due = await self._store.due(sale_id, BATCHES_PER_READ * EXPIRE_BATCH)
            if not due:
                break
            count = await self._expire(sale_id, due)
            expired += count
            if count == 0:
                # The server's clock and ours disagree about these deadlines; retry later.
                break
        return expired

    async def _expire(self, sale_id: str, due: Sequence[str]) -> int:
        """Expire all of these, batch by batch; how many were due by the server's clock."""
        known = await self._catalog.get(sale_id)
        starts = iter(range(0, len(due), EXPIRE_BATCH))

        async def batches(starts: Iterator[int]) -> int:
            expired = 0
            for start in starts:
                some = due[start : start + EXPIRE_BATCH]
                count = await self._store.expire(sale_id, some, epoch=known.epoch)
                REAPED.inc(count)
                expired += count
            return expired

        # If one fails the other still finishes first: no task is left running.
        counts = await asyncio.gather(
            *(batches(starts) for _ in range(BATCHES_AT_ONCE)), return_exceptions=True
        )
        expired = 0
        for count in counts:
            if isinstance(count, BaseException):
                raise count
            expired += count
        return expired
