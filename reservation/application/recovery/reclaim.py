"""Reclaim: claims payments again whose claim was lost, while their sale is rebuilt.

    holds      keep their stock; first, because a later step may end overdue holds
    other orders that Redis or SQL has      take their stock again
    orders that both lack      are made again from their intents, and take their stock again

Overdue holds that take the stock or the limit of such an order are ended: their expiry may be among
the lost events, and they would end within seconds of the rebuild.
"""

from enum import IntEnum

import msgspec
import structlog

from reservation.adapters.redis.fences import RESTORING_EPOCH
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_writer import SaleWriter
from reservation.adapters.redis.script_results import RemakeWord
from reservation.adapters.sql.orders import as_reservation
from reservation.adapters.sql.payment_intents import Intent, IntentOutcome, UnmetIntent
from reservation.adapters.sql.store import SqlStore
from reservation.application.readiness.data_loss import is_under_way
from reservation.domain.errors import (
    BuyerLimitExceeded,
    HoldLost,
    PartitionDry,
    ReservationExpired,
    SaleRecovering,
    SoldOut,
)
from reservation.domain.idempotency_keys import confirm_key
from reservation.domain.payment import Claimed
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status

__all__ = ["Reclaim"]

log = structlog.get_logger(__name__)


class _Turn(IntEnum):
    """The step in which a payment is claimed."""

    HOLD = 1
    ORDER = 2
    LOST = 3


class Reclaim:
    """Takes orders with a requested payment back to CONFIRMING, under a rebuild's own epoch."""

    def __init__(self, restorer: SaleWriter, store: ReservationStore, sql: SqlStore) -> None:
        self._restorer = restorer
        self._store = store
        self._sql = sql

    async def reclaim(self, sale_id: str, epoch: str) -> tuple[list[str], list[UnmetIntent]]:
        """Take orders with a requested payment back to CONFIRMING, for the settler to decide.

        Args:
            sale_id: the sale.
            epoch: the epoch that the rebuild hands over.

        Returns:
            Their order ids, and the intents that cannot be served: the stock or the order is gone,
            or the order has another payment.

        Raises:
            SaleRecovering: another rebuild has begun; or another payment has an intent under the
                fence of a claim of this one, which must begin again.
        """
        claimed: list[str] = []
        unplaced: list[UnmetIntent] = []
        intents = await self._sql.intents.list_unmet(sale_id)
        turns = [_turn_of(await self._known_order(intent)) for intent in intents]
        for _, intent in sorted(zip(turns, intents, strict=True), key=lambda pair: pair[0]):
            # Read now: of two payments of one order the previous iteration may have claimed one.
            order = await self._order_of(epoch, intent)
            if is_under_way(intent, order):
                continue
            if order is not None and await self._claim(epoch, intent, order):
                claimed.append(intent.order_id)
            else:
                unplaced.append(intent)
        return claimed, unplaced

    async def _known_order(self, intent: UnmetIntent) -> Reservation | None:
        """The order of an intent in Redis or SQL."""
        found = await self._store.read(intent.order_id)
        if found is not None:
            return found
        row = await self._sql.orders.get(intent.order_id)
        # It ended long ago and is no longer kept in Redis.
        return as_reservation(row) if row is not None else None

    async def _order_of(self, epoch: str, intent: UnmetIntent) -> Reservation | None:
        """The order of an intent, made again if neither Redis nor SQL has it."""
        known = await self._known_order(intent)
        if known is not None or intent.reservation is None:
            return known
        order = msgspec.json.decode(intent.reservation, type=Reservation)
        remade = await self._remake(RESTORING_EPOCH + epoch, order)
        return await self._store.read(intent.order_id) if remade else None

    async def _remake(self, epoch: str, order: Reservation) -> bool:
        """Whether a lost order has its hold again; overdue holds that take its stock end."""
        while True:
            word, facts = await self._restorer.remake(order, epoch=epoch)
            if word is not RemakeWord.DUE:
                return word is RemakeWord.DONE
            ended = await self._store.expiry.end(order.sale_id, facts, epoch=epoch)
            if not ended.freed_stock:
                # They are due on the server's clock only, or damaged.
                return False

    async def _claim(self, epoch: str, intent: UnmetIntent, order: Reservation) -> bool:
        try:
            outcome = await self._store.claim(
                order,
                epoch=RESTORING_EPOCH + epoch,
                payment_key=intent.payment_key,
                lease_ms=0,
                known_fence=await self._sql.intents.known_fence(intent.order_id),
                is_requested=True,
            )
        except (ReservationExpired, SoldOut, PartitionDry, BuyerLimitExceeded, HoldLost) as refusal:
            reason = type(refusal).__name__
            log.info("payment_not_reclaimed", order_id=intent.order_id, reason=reason)
            return False
        if not isinstance(outcome, Claimed):
            return False
        await self._renew(epoch, intent, order, outcome.fence)
        return True

    async def _renew(self, epoch: str, intent: UnmetIntent, order: Reservation, fence: int) -> None:
        """Write the intent under the fence of its new claim, before the sale is handed over.

        Otherwise a cancel that was decided before this loss could be sent after the order is sold:
            orphan:  no order has it; queries the PG ---------------> DONE -> bars it, cancels it
            rebuild:                     claims it; sold
        A bar looks for intents of later fences. With this intent, the bar is refused, or it was
        first, and the settler cancels the payment instead of selling it.
        """
        outcome = await self._sql.intents.add(
            Intent(
                order_id=intent.order_id,
                sale_id=intent.sale_id,
                fence=fence,
                payment_key=intent.payment_key,
                amount=intent.amount,
                currency=order.currency,
                idempotency_key=confirm_key(intent.payment_key, 0),
                # Nothing is requested now: the PG's window began with the first request.
                now_ms=intent.created_at_ms,
                epoch=epoch,
                reservation=intent.reservation or msgspec.json.encode(order).decode(),
            )
        )
        if outcome is IntentOutcome.FENCE_OF_ANOTHER_KEY:
            # By a process whose claim was lost. The next attempt claims above this fence.
            raise SaleRecovering(retryAfter=0)


def _turn_of(order: Reservation | None) -> _Turn:
    if order is None:
        return _Turn.LOST
    return _Turn.HOLD if order.status is Status.HELD else _Turn.ORDER
