"""Reclaim: claims payments again whose claim was lost, while their sale is rebuilt."""

import msgspec
import structlog

from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_writer import SaleWriter
from reservation.adapters.sql.orders import as_reservation
from reservation.adapters.sql.payment_intents import UnmetIntent
from reservation.adapters.sql.store import SqlStore
from reservation.application.readiness.data_loss import is_under_way
from reservation.domain.errors import BuyerLimitExceeded, HoldLost, ReservationExpired, SoldOut
from reservation.domain.payment import Claimed
from reservation.domain.reservation import Reservation

__all__ = ["Reclaim"]

log = structlog.get_logger(__name__)


class Reclaim:
    """Takes orders with a requested payment back to CONFIRMING, under a rebuild's own epoch."""

    def __init__(self, restorer: SaleWriter, store: ReservationStore, sql: SqlStore) -> None:
        self._restorer = restorer
        self._store = store
        self._sql = sql

    async def reclaim(self, sale_id: str, epoch: str) -> tuple[list[str], list[UnmetIntent]]:
        """Take orders with a requested payment back to CONFIRMING, for the settler to decide.

        Returns:
            Their order ids, and the intents that cannot be served: the stock or the order is gone,
            or the order has another payment.
        """
        claimed: list[str] = []
        unplaced: list[UnmetIntent] = []
        for intent in await self._sql.intents.list_unmet(sale_id):
            # Read now: of two payments of one order the previous iteration may have claimed one.
            order = await self._order_of(epoch, intent)
            if is_under_way(intent, order):
                continue
            if order is not None and await self._claim(epoch, intent, order):
                claimed.append(intent.order_id)
            else:
                unplaced.append(intent)
        return claimed, unplaced

    async def _order_of(self, epoch: str, intent: UnmetIntent) -> Reservation | None:
        """The order of an intent, made again if neither Redis nor SQL has it."""
        found = await self._store.read(intent.order_id)
        if found is not None:
            return found
        row = await self._sql.orders.get(intent.order_id)
        if row is not None:
            # It ended long ago and is no longer kept in Redis.
            return as_reservation(row)
        if intent.reservation is None:
            return None
        order = msgspec.json.decode(intent.reservation, type=Reservation)
        remade = await self._restorer.remake(order, epoch=epoch)
        return await self._store.read(intent.order_id) if remade else None

    async def _claim(self, epoch: str, intent: UnmetIntent, order: Reservation) -> bool:
        try:
            outcome = await self._store.claim(
                order,
                epoch=epoch,
                payment_key=intent.payment_key,
                lease_ms=0,
                known_fence=await self._sql.intents.known_fence(intent.order_id),
            )
        except (ReservationExpired, SoldOut, BuyerLimitExceeded, HoldLost) as refusal:
            reason = type(refusal).__name__
            log.info("payment_not_reclaimed", order_id=intent.order_id, reason=reason)
            return False
        return isinstance(outcome, Claimed)
