"""The reaper: gives back the holds whose deadline has passed.

Nothing waits for it to sell: a prepare that finds stock behind expired holds expires them itself.
"""

from typing import Final

from reservation.catalog import Catalog
from reservation.metrics import REAPED
from reservation.redis.store import EXPIRE_BATCH, Store

__all__ = ["Reaper"]

#: Batches in one round, so that one sale's flood leaves the others their turn.
BATCHES_MAX: Final = 25


class Reaper:
    """Expires what is due."""

    def __init__(self, catalog: Catalog, store: Store) -> None:
        self._catalog = catalog
        self._store = store

    async def run_once(self, sale_id: str) -> int:
        """One round for one sale; how many holds were given back."""
        expired = 0
        for _ in range(BATCHES_MAX):
            due = await self._store.due(sale_id, EXPIRE_BATCH)
            if not due:
                break
            known = await self._catalog.get(sale_id)
            count = await self._store.expire(sale_id, due, epoch=known.epoch)
            expired += count
            if count == 0:
                # The server's clock and ours disagree about these: wait until both agree.
                break
        REAPED.inc(expired)
        return expired
