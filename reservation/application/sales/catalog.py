"""Catalog: this process's cache of the sales, their settings and the epoch that SQL vouches for.

SQL has the sales and their epochs; Redis has their state. A sale that Redis lacks or has in another
epoch than SQL was lost: it is `recovering` until it is rebuilt. A retired sale is in SQL alone.
"""

import asyncio
from collections.abc import Mapping
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.fences import RETIRING_EPOCH
from reservation.adapters.redis.sale_store import SaleStore
from reservation.adapters.sql.sales import ItemRow, SaleRow
from reservation.adapters.sql.store import SqlStore
from reservation.domain.clock import Clock
from reservation.domain.errors import SaleNotFound, SaleRecovering, Unavailable
from reservation.domain.sale import Item, Sale, SaleTerms
from reservation.domain.sale_settings import change_of
from reservation.domain.states import SaleStatus

__all__ = ["CachedSale", "Catalog"]

log = structlog.get_logger(__name__)

#: Maximum age of cached settings, which supply only names and defaults; the scripts themselves read
#: those that decide (price, window, limits).
FRESH_SECONDS: Final = 1.0
#: The buyer's retryAfter for a sale that waits for its rebuild.
RECOVERING_SECONDS: Final = 5
#: Loads of one sale before it counts as recovering. A rebuild writes the epoch to SQL first, so one
#: further load finds the epoch of every rebuild that Redis has.
LOADS_MAX: Final = 2


class CachedSale(msgspec.Struct, frozen=True):
    """A sale and the epoch under which it may be changed."""

    sale: Sale
    epoch: str
    fetched_at: float
    #: Whether only SQL has the sale: nothing can be prepared in it, and it cannot be changed.
    is_retired: bool = False


class Catalog:
    """Cache of sales by id, fresh for a second."""

    def __init__(self, sales: SaleStore, sql: SqlStore, *, clock: Clock) -> None:
        self._sales = sales
        self._sql = sql
        self._clock = clock
        self._known: dict[str, CachedSale] = {}
        #: The epoch of every sale, as of the last read of SQL.
        self._epochs: dict[str, str] = {}
        #: Sales whose epoch must be read from SQL again.
        self._forgotten: set[str] = set()
        #: Whether all sales were read from SQL since the start.
        self._complete = False
        self._completing: asyncio.Task[None] | None = None
        self._refreshing: dict[str, asyncio.Task[CachedSale]] = {}
        #: Substitute epochs while SQL is down, of the sales that were compared with it.
        self._fixed_epochs: Mapping[str, str] | None = None
        #: Sales that Redis lost or has in an older state than SQL, and their loss.
        self.closed: dict[str, str] = {}
        #: Retired sales.
        self._retired: set[str] = set()

    def close(self, sale_id: str, gap: str) -> bool:
        """Close the sale until it is rebuilt; whether it was open.

        A retired sale is not closed: Redis has no data of it that could be lost.
        """
        if self.is_retired(sale_id):
            return False
        was_open = sale_id not in self.closed
        self.closed[sale_id] = gap
        self.forget(sale_id)
        return was_open

    def is_retired(self, sale_id: str) -> bool:
        """Whether only SQL has the sale, as of the last comparison.

        Another process's retirement is known here after the next comparison with SQL. Until then
        every script refuses the sale as recovering.
        """
        return sale_id in self._retired

    async def learn_retired(self) -> None:
        """Read from SQL the sales retired since the last call.

        A change of their number shows whether there are any. Their times come from the clocks of
        several processes and cannot show it.

        Raises:
            SQLAlchemyError, OSError: SQL does not answer.
        """
        if await self._sql.sales.count_retired() == len(self._retired):
            return
        for sale_id in await self._sql.sales.list_retired():
            if sale_id not in self._retired:
                self._retired.add(sale_id)
                self.closed.pop(sale_id, None)
                self._known.pop(sale_id, None)
                if sale_id not in self._epochs:
                    # Created and retired since all epochs were read. Redis no longer has it, so
                    # SQL is queried.
                    self._forgotten.add(sale_id)

    def use_epochs(self, epochs: Mapping[str, str] | None) -> None:
        """Use these epochs in place of SQL, or go back to SQL.

        Args:
            epochs: of the sales that were compared with SQL in this life of the server; None once
                SQL answers.
        """
        self._fixed_epochs = epochs

    def reopen(self, sale_id: str) -> None:
        """Open the sale again: Redis matches SQL."""
        if self.closed.pop(sale_id, None) is not None:
            self.forget(sale_id)

    async def get(self, sale_id: str) -> CachedSale:
        """The sale, at most about a second old while Redis answers.

        Raises:
            SaleNotFound: SQL does not have it.
            SaleRecovering: Redis does not have it as SQL does.
            Unavailable: neither answers.
        """
        if sale_id in self.closed:
            raise SaleRecovering(retryAfter=RECOVERING_SECONDS)
        known = self._known.get(sale_id)
        if known is None:
            return await self._refresh(sale_id)
        if self._clock.monotonic() - known.fetched_at > FRESH_SECONDS:
            self._start_refresh(sale_id)
        return known

    def cached(self, sale_id: str) -> CachedSale | None:
        """The cached answer of `get`, or None if `get` would wait or refuse."""
        known = self._known.get(sale_id)
        if known is None or known.is_retired or sale_id in self.closed:
            return None
        if self._clock.monotonic() - known.fetched_at > FRESH_SECONDS:
            self._start_refresh(sale_id)
        return known

    async def fresh(self, sale_id: str) -> CachedSale:
        """The sale now, after every change that finished before this call.

        Raises as `get` does.
        """
        if sale_id in self.closed:
            raise SaleRecovering(retryAfter=RECOVERING_SECONDS)
        running = self._refreshing.get(sale_id)
        if running is not None:
            # It may have read before this call. Every caller since then shares the next one.
            await asyncio.wait({running})
        return await self._refresh(sale_id)

    async def knows(self, sale_id: str) -> bool:
        """Whether there is such a sale, in any state.

        Raises:
            Unavailable: neither Redis nor SQL answers.
        """
        if sale_id in self._known or sale_id in self.closed or self.is_retired(sale_id):
            return True
        return await self._epoch(sale_id) is not None

    def forget(self, sale_id: str) -> None:
        """Invalidate the sale: a script found another epoch."""
        self._known.pop(sale_id, None)
        if self._epochs.pop(sale_id, None) is not None:
            self._forgotten.add(sale_id)

    def learn(self, sale_id: str, epoch: str) -> None:
        """Cache the epoch that SQL has just stored or returned."""
        self._known.pop(sale_id, None)
        self._forgotten.discard(sale_id)
        self._epochs[sale_id] = epoch

    def learn_all(self, epochs: Mapping[str, str]) -> None:
        """Cache the epochs of all sales of SQL; an epoch already cached is newer and stays."""
        for sale_id, epoch in epochs.items():
            if sale_id not in self._forgotten:
                self._epochs.setdefault(sale_id, epoch)
        self._complete = True

    async def _refresh(self, sale_id: str) -> CachedSale:
        return await asyncio.shield(self._start_refresh(sale_id))

    def _start_refresh(self, sale_id: str) -> asyncio.Task[CachedSale]:
        task = self._refreshing.get(sale_id)
        if task is None:
            task = asyncio.create_task(self._load(sale_id))
            self._refreshing[sale_id] = task
            task.add_done_callback(lambda done: self._refreshed(sale_id, done))
        return task

    def _refreshed(self, sale_id: str, task: asyncio.Task[CachedSale]) -> None:
        self._refreshing.pop(sale_id, None)
        if not task.cancelled() and (error := task.exception()):
            log.debug("sale_refresh_failed", sale_id=sale_id, reason=str(error))

    async def _load(self, sale_id: str) -> CachedSale:
        for _ in range(LOADS_MAX):
            epoch = await self._epoch(sale_id)
            if epoch is None:
                raise SaleNotFound
            if self.is_retired(sale_id):
                return await self._load_retired(sale_id)
            try:
                sale = await self._sales.read(sale_id)
            except (StoreUnavailable, StoreUncertain) as error:
                raise Unavailable(retryAfter=1) from error
            # Not the epoch from before the read: it may have been replaced during the read.
            newest = self._cached_epoch(sale_id)
            if sale is not None and sale.epoch == newest:
                known = CachedSale(sale, sale.epoch, self._clock.monotonic())
                self._known[sale_id] = known
                return known
            if newest == epoch:
                self.forget(sale_id)
            if sale is not None and sale.epoch.startswith(RETIRING_EPOCH):
                await self._learn_retired_now()
            if sale is None:
                break
        raise SaleRecovering(retryAfter=1)

    async def _learn_retired_now(self) -> None:
        """Read retirements at once: another process is retiring the sale."""
        try:
            await self.learn_retired()
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error

    async def _load_retired(self, sale_id: str) -> CachedSale:
        try:
            sale = await _read_retired(self._sql, sale_id)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error
        if sale is None:
            raise SaleNotFound
        known = CachedSale(sale, sale.epoch, self._clock.monotonic(), is_retired=True)
        self._known[sale_id] = known
        return known

    def _cached_epoch(self, sale_id: str) -> str | None:
        epoch = self._epochs.get(sale_id)
        if epoch is None and self._fixed_epochs is not None:
            return self._fixed_epochs.get(sale_id)
        return epoch

    async def _epoch(self, sale_id: str) -> str | None:
        epoch = self._cached_epoch(sale_id)
        if epoch is None and self._fixed_epochs is not None:
            raise Unavailable(retryAfter=1)
        if epoch is None and not self._complete:
            await self._load_epochs()
            epoch = self._epochs.get(sale_id)
        if epoch is not None:
            return epoch
        # SQL is queried for one sale at a time, and never for a made-up id: a sale created since
        # all sales were read from SQL exists in Redis.
        try:
            if sale_id not in self._forgotten and not await self._sales.exists(sale_id):
                return None
            epoch = await self._sql.sales.epoch(sale_id)
        except (StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error
        # An epoch that arrived during this query is newer than its answer, and stays.
        if epoch is not None and sale_id not in self._epochs:
            self.learn(sale_id, epoch)
        return self._epochs.get(sale_id)

    async def _load_epochs(self) -> None:
        if self._completing is None:
            self._completing = asyncio.create_task(self._ask_for_all())
            self._completing.add_done_callback(self._asked)
        try:
            await asyncio.shield(self._completing)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error

    async def _ask_for_all(self) -> None:
        await self.learn_retired()
        self.learn_all(await self._sql.sales.epochs())

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._completing = None
        if not task.cancelled() and (error := task.exception()):
            log.debug("epochs_load_failed", reason=str(error))


async def _read_retired(sql: SqlStore, sale_id: str) -> Sale | None:
    """A retired sale as Redis had it after its last event; None if it is not retired.

    Raises:
        SQLAlchemyError, OSError: SQL does not answer.
    """
    row = await sql.sales.get(sale_id)
    if row is None or row.retired_at_ms is None or row.settings is None:
        return None
    items = await sql.sales.list_items(sale_id)
    seq, _ = await sql.events.cursor(sale_id)
    return _sale(row, items, row.settings, seq)


def _sale(row: SaleRow, items: dict[str, ItemRow], settings: str, seq: int) -> Sale:
    definition, _ = change_of(settings)
    terms = {name: getattr(definition, name) for name in SaleTerms.__struct_fields__}
    # The definition has the texts, and SQL the counters of the items.
    listed = [
        msgspec.structs.replace(
            msgspec.convert(items[item.sku], Item, from_attributes=True),
            description=item.description,
            image_url=item.image_url,
        )
        for item in definition.items
        if item.sku in items
    ]
    return Sale(
        **terms,
        sale_id=row.sale_id,
        switched=SaleStatus(row.switched),
        version=row.version,
        epoch=row.epoch,
        seq=seq,
        items=tuple(listed),
    )
