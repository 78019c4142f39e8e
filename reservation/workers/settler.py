"""The settler: takes up payments, deposits and refunds whose process is gone."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.domain.errors import ReservationError
from reservation.metrics import UNDECIDED
from reservation.persistence.ledger import Ledger
from reservation.redis.replies import StoreUnavailable, StoreUncertain
from reservation.redis.store import Store
from reservation.refund import Refund
from reservation.settle import Settle

__all__ = ["Settler"]

log = structlog.get_logger(__name__)

#: Orders looked at in one round, and at once: the gateway's client has 64 connections for this.
ROUND_MAX: Final = 200
AT_ONCE: Final = 32
#: Refunds taken up in one round.
REFUNDS_MAX: Final = 50


class Settler:
    """Settles what is due to be settled."""

    def __init__(self, store: Store, ledger: Ledger, settle: Settle, refund: Refund) -> None:
        self._store = store
        self._ledger = ledger
        self._settle = settle
        self._refund = refund
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def run_once(self, sale_id: str) -> int:
        """One round for one sale; how many orders were looked at."""
        payments = await self._store.leases_over(sale_id, ROUND_MAX)
        deposits = await self._store.deposits_over(sale_id, ROUND_MAX)
        UNDECIDED.labels(sale_id).set(await self._store.undecided(sale_id))
        async with asyncio.TaskGroup() as group:
            for order_id in payments:
                group.create_task(self._one(self._settle, order_id))
            for order_id in deposits:
                group.create_task(self._one(self._settle.deposit, order_id))
        return len(payments) + len(deposits)

    async def refunds(self) -> int:
        """Take up refunds that were begun and not finished; how many are through."""
        through = 0
        for record in await self._ledger.pending_refunds(REFUNDS_MAX):
            try:
                through += await self._refund.go_on(record)
            except (ReservationError, StoreUnavailable, StoreUncertain) as error:
                log.warning("refund_waits", order_id=record.order_id, reason=str(error))
        return through

    async def _one(self, settle: Callable[[str], Awaitable[object]], order_id: str) -> None:
        """One order; what keeps it from being settled must not keep the others."""
        async with self._slots:
            try:
                await settle(order_id)
            except (
                ReservationError,
                StoreUnavailable,
                StoreUncertain,
                SQLAlchemyError,
                OSError,
            ) as error:
                log.warning("settle_waits", order_id=order_id, reason=str(error))
