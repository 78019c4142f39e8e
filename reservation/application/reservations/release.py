"""Release: gives a hold back before a payment begins."""

from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.application.reservations.acknowledged_reads import AcknowledgedReads
from reservation.application.sales.catalog import Catalog
from reservation.domain.clock import Clock
from reservation.domain.errors import AlreadyConfirmed, PaymentInProgress
from reservation.domain.payment import Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status

__all__ = ["Release"]


class Release:
    """Releases holds for buyers, and for the PG's fail redirect."""

    def __init__(
        self, catalog: Catalog, store: ReservationStore, reads: AcknowledgedReads, *, clock: Clock
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._reads = reads
        self._clock = clock

    async def release(self, order: Reservation, *, reason: Reason) -> Reservation:
        """Give the hold back; one that has ended stays as it is.

        Raises:
            PaymentInProgress: money may be moving, or a deposit is awaited.
            AlreadyConfirmed: it is paid for.
            and the errors of `if_held`.
        """
        found = await self.if_held(order, reason=reason)
        if found.status in (Status.CONFIRMING, Status.AWAITING_DEPOSIT):
            raise PaymentInProgress
        if found.status is Status.CONFIRMED:
            raise AlreadyConfirmed
        return found

    async def if_held(self, order: Reservation, *, reason: Reason) -> Reservation:
        """Give the hold back if there is one; returns the current state of the order.

        Raises:
            StoreUncertain, StoreUnavailable: even if an earlier call has ended the hold: too
                few replicas have that.
        """
        # An order shown as EXPIRED stays EXPIRED: its status is final for readers.
        if order.shown_status(self._clock.now_ms()) in (Status.HELD, Status.PREPARED):
            known = await self._catalog.get(order.sale_id)
            await self._store.release(order, epoch=known.epoch, reason=reason)
            order = await self._store.read(order.order_id) or order
        return await self._reads.state(order)
