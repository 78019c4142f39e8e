"""Acknowledged reads: the state of an order that no failover loses.

A read of Redis shows the master's present state, with changes that no replica may have. An answer
that reports it as the outcome of an earlier call waits until enough replicas have it, or SQL has.
"""

from collections.abc import Sequence

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.sql.store import SqlStore
from reservation.application.sales.catalog import Catalog
from reservation.domain.reservation import Reservation

__all__ = ["AcknowledgedReads"]

log = structlog.get_logger(__name__)


class AcknowledgedReads:
    """Reads orders again, together with the acknowledgement of replicas where they must give one.

    Args:
        catalog: the sales, also those that are closed until Redis is compared with SQL.
        store: the orders in Redis.
        sql: the orders that were written behind. The flusher waits for replicas itself.
    """

    def __init__(self, catalog: Catalog, store: ReservationStore, sql: SqlStore) -> None:
        self._catalog = catalog
        self._store = store
        self._sql = sql

    async def state(self, order: Reservation) -> Reservation:
        """The present state of one order, as `states`."""
        (found,) = await self.states([order])
        return found

    async def states(self, orders: Sequence[Reservation]) -> list[Reservation]:
        """The present states of these orders, all of one sale, as they were just read.

        Without the setting for replicas they are returned as they are. So are those of a closed
        sale: they were compared with SQL, and Redis may have an older state.

        Raises:
            TooFewReplicas, StoreUncertain, StoreUnavailable: too few replicas have the present
                state, and SQL does not have the state that was read.
        """
        if not orders or not self._store.requires_acks:
            return list(orders)
        sale_id = orders[0].sale_id
        if sale_id in self._catalog.closed:
            return list(orders)
        try:
            # No connection waits for replicas that are known to be away.
            self._store.require_acks(sale_id)
            found = await self._store.read_many_acknowledged([one.order_id for one in orders])
        except (StoreUnavailable, StoreUncertain):
            if await self._are_in_sql(orders):
                return list(orders)
            raise
        states = [state for state in found if state is not None]
        if len(states) == len(orders):
            return states
        # A promoted replica lacks an order that the former master had shown.
        gone = [order for order, state in zip(orders, found, strict=True) if state is None]
        if not await self._are_in_sql(gone):
            raise StoreUncertain("an order has left Redis since it was read")
        return [state or order for order, state in zip(orders, found, strict=True)]

    async def _are_in_sql(self, orders: Sequence[Reservation]) -> bool:
        """Whether SQL has the orders in these states, so that no failover can lose them."""
        try:
            rows = await self._sql.orders.get_many([order.order_id for order in orders])
        except (SQLAlchemyError, OSError) as error:
            log.debug("orders_not_read", order_id=orders[0].order_id, reason=str(error))
            return False
        states = {row.order_id: (row.status, row.seq) for row in rows}
        return all(states.get(one.order_id) == (one.status, one.seq) for one in orders)
