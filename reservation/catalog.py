"""The sales that this process knows: each one's settings, and the epoch that SQL vouches for.

SQL says which sales exist and in which epoch; Redis says how they stand. A sale that SQL knows and
Redis does not, or knows in another epoch, was lost: it is `recovering` until it is rebuilt.
"""

import asyncio
from collections.abc import Mapping
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.domain.clock import Clock
from reservation.domain.errors import SaleNotFound, SaleRecovering, Unavailable
from reservation.domain.sale import Sale
from reservation.persistence.ledger import Ledger
from reservation.redis.replies import StoreUnavailable, StoreUncertain
from reservation.redis.sales import SaleStore

__all__ = ["Catalog", "Known"]

log = structlog.get_logger(__name__)

#: How old a sale's settings may be where only names and defaults are taken from them; what is
#: decided on (price, window, limits) the scripts read themselves.
FRESH_SECONDS: Final = 1.0
#: What a buyer of a sale that waits for its rebuild is told to wait.
RECOVERING_SECONDS: Final = 5


class Known(msgspec.Struct, frozen=True):
    """A sale and the epoch under which it may be changed."""

    sale: Sale
    epoch: str
    fetched_at: float


class Catalog:
    """Sales by id, kept for a second."""

    def __init__(self, sales: SaleStore, ledger: Ledger, *, clock: Clock) -> None:
        self._sales = sales
        self._ledger = ledger
        self._clock = clock
        self._known: dict[str, Known] = {}
        self._epochs: dict[str, str] = {}
        self._asking: asyncio.Task[None] | None = None
        self._refreshing: dict[str, asyncio.Task[Known]] = {}
        #: While SQL is away: the epochs to go by, of the sales that were compared with it.
        self._instead: Mapping[str, str] | None = None
        #: Sales that Redis lost or has in an older state than SQL, and what is missing.
        self.closed: dict[str, str] = {}

    def close(self, sale_id: str, gap: str) -> bool:
        """Let nobody have the sale until it is rebuilt; whether it was open."""
        was_open = sale_id not in self.closed
        self.closed[sale_id] = gap
        self.forget(sale_id)
        return was_open

    def go_by(self, epochs: Mapping[str, str] | None) -> None:
        """Take these for what SQL would answer, or ask SQL again.

        Args:
            epochs: of the sales that were compared with SQL in this life of the server; None once
                SQL answers.
        """
        self._instead = epochs

    def reopen(self, sale_id: str) -> None:
        """Redis has the sale again as SQL knows it."""
        if self.closed.pop(sale_id, None) is not None:
            self.forget(sale_id)

    async def get(self, sale_id: str) -> Known:
        """The sale, at most about a second old while Redis answers.

        Raises:
            SaleNotFound: SQL does not know it.
            SaleRecovering: Redis does not have it as SQL knows it.
            Unavailable: neither can be asked.
        """
        if sale_id in self.closed:
            raise SaleRecovering(retryAfter=RECOVERING_SECONDS)
        known = self._known.get(sale_id)
        if known is None:
            return await self._refresh(sale_id)
        if self._clock.monotonic() - known.fetched_at > FRESH_SECONDS:
            self._start_refresh(sale_id)
        return known

    def at_hand(self, sale_id: str) -> Known | None:
        """What `get` answers without waiting, or None where it would wait or refuse."""
        known = self._known.get(sale_id)
        if known is None or sale_id in self.closed:
            return None
        if self._clock.monotonic() - known.fetched_at > FRESH_SECONDS:
            self._start_refresh(sale_id)
        return known

    async def fresh(self, sale_id: str) -> Known:
        """The sale as it stands now; raises what `get` does."""
        if sale_id in self.closed:
            raise SaleRecovering(retryAfter=RECOVERING_SECONDS)
        return await self._refresh(sale_id)

    def forget(self, sale_id: str) -> None:
        """Ask SQL and Redis again next time: a script found the epoch to be another."""
        self._known.pop(sale_id, None)
        self._epochs.pop(sale_id, None)

    async def _refresh(self, sale_id: str) -> Known:
        return await asyncio.shield(self._start_refresh(sale_id))

    def _start_refresh(self, sale_id: str) -> asyncio.Task[Known]:
        task = self._refreshing.get(sale_id)
        if task is None:
            task = asyncio.create_task(self._load(sale_id))
            self._refreshing[sale_id] = task
            task.add_done_callback(lambda done: self._refreshed(sale_id, done))
        return task

    def _refreshed(self, sale_id: str, task: asyncio.Task[Known]) -> None:
        self._refreshing.pop(sale_id, None)
        if not task.cancelled() and (error := task.exception()):
            log.debug("sale_refresh_failed", sale_id=sale_id, reason=str(error))

    async def _load(self, sale_id: str) -> Known:
        epoch = await self._epoch(sale_id)
        if epoch is None:
            raise SaleNotFound
        try:
            sale = await self._sales.read(sale_id)
        except (StoreUnavailable, StoreUncertain) as error:
            raise Unavailable(retryAfter=1) from error
        if sale is None or sale.epoch != epoch:
            self.forget(sale_id)
            raise SaleRecovering(retryAfter=1)
        known = Known(sale, epoch, self._clock.monotonic())
        self._known[sale_id] = known
        return known

    async def _epoch(self, sale_id: str) -> str | None:
        if self._instead is not None and sale_id not in self._epochs:
            epoch = self._instead.get(sale_id)
            if epoch is None:
                raise Unavailable(retryAfter=1)
            return epoch
        # A query that was under way when we came may have missed a sale that was made since, so
        # an id that it does not bring is asked for once more. Made-up ids never become more than
        # one query at a time.
        for _ in range(2 if self._asking else 1):
            if sale_id not in self._epochs:
                await self._ask_sql()
        return self._epochs.get(sale_id)

    async def _ask_sql(self) -> None:
        if self._asking is None:
            self._asking = asyncio.create_task(self._load_epochs())
        asking = self._asking
        try:
            await asyncio.shield(asking)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error
        finally:
            if asking.done():
                self._asking = None

    async def _load_epochs(self) -> None:
        self._epochs = await self._ledger.known_sales()
