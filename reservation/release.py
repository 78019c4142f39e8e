"""Give a hold back before any money was asked for."""

from reservation.catalog import Catalog
from reservation.domain.errors import AlreadyConfirmed, PaymentInProgress
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.redis.store import Store

__all__ = ["Release"]


class Release:
    """Releases holds for buyers, and for the PG's fail redirect."""

    def __init__(self, catalog: Catalog, store: Store) -> None:
        self._catalog = catalog
        self._store = store

    async def __call__(self, order: Reservation, *, cause: str) -> Reservation:
        """Give the hold back; one that has ended stays as it is.

        Raises:
            PaymentInProgress: money may be moving, or a deposit is awaited.
            AlreadyConfirmed: it is paid for.
        """
        found = await self.if_held(order, cause=cause)
        if found.status in (Status.CONFIRMING, Status.AWAITING_DEPOSIT):
            raise PaymentInProgress
        if found.status is Status.CONFIRMED:
            raise AlreadyConfirmed
        return found

    async def if_held(self, order: Reservation, *, cause: str) -> Reservation:
        """Give the hold back where there is one, and tell how the order stands in any case."""
        if order.status not in (Status.HELD, Status.PREPARED):
            return order
        known = await self._catalog.get(order.sale_id)
        await self._store.release(order, epoch=known.epoch, cause=cause)
        return await self._store.read(order.order_id) or order
