"""Look reservations up: in Redis while they are there, in SQL afterwards."""

from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.catalog import Catalog
from reservation.domain.clock import Clock
from reservation.domain.errors import HoldLost, ReservationNotFound, Unavailable
from reservation.domain.ids import sale_of
from reservation.domain.reservation import Line, Reservation
from reservation.domain.states import Status
from reservation.domain.tokens import Claims
from reservation.losses import Losses
from reservation.payments.banks import Bank, bank_of
from reservation.persistence.ledger import Ledger
from reservation.persistence.orders import OrderRow
from reservation.redis.replies import StoreUnavailable, StoreUncertain
from reservation.redis.store import Store
from reservation.waits import Waits

__all__ = ["DepositAccount", "Look"]

log = structlog.get_logger(__name__)

#: A buyer's orders in one sale that are listed; a limit per buyer keeps real lists far shorter.
ORDERS_LISTED_MAX: Final = 100


#: An order in one of these has no payment, as far as Redis knows.
_WITHOUT_PAYMENT: Final = (Status.HELD, Status.PREPARED, Status.RELEASED, Status.EXPIRED)


class DepositAccount(msgspec.Struct, frozen=True, kw_only=True):
    """Where the buyer of an AWAITING_DEPOSIT order pays in, and until when."""

    bank: Bank
    account_number: str
    holder_name: str
    due_at_ms: int


class Look:
    """Reads reservations for their owners."""

    def __init__(
        self, catalog: Catalog, store: Store, ledger: Ledger, losses: Losses, *, clock: Clock
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._ledger = ledger
        self._losses = losses
        self._waits = Waits(store.read, clock=clock)

    def stop_waiting(self) -> None:
        """Answer each request that waits now, and let none wait any more: the service ends."""
        self._waits.stop()

    async def find(self, order_id: str) -> Reservation | None:
        """The reservation, wherever it is kept; None where there is none.

        Raises:
            Unavailable: Redis does not have it and SQL cannot be asked, or the other way round.
        """
        sale_id = sale_of(order_id)
        if sale_id is None or not await self._catalog.knows(sale_id):
            return None
        try:
            found = await self._store.read(order_id)
            if found is None:
                row = await self._ledger.order(order_id)
                found = as_reservation(row) if row else None
            if sale_id in self._catalog.closed:
                return await self._in_a_closed_sale(order_id, found)
        except (StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error
        return found

    async def _in_a_closed_sale(
        self, order_id: str, found: Reservation | None
    ) -> Reservation | None:
        """An order that Redis may have lost the payment of, or all of."""
        if found is None:
            return await self._losses.settling_of(order_id)
        if found.status in _WITHOUT_PAYMENT:
            return await self._losses.settling(found) or found
        return found

    async def of_buyer(self, order_id: str, buyer_id: str) -> Reservation:
        """The buyer's own reservation.

        Raises:
            ReservationNotFound: there is none, or it is somebody else's; which one is not told.
        """
        found = await self.find(order_id)
        if found is None or found.buyer_id != buyer_id:
            raise ReservationNotFound
        return found

    async def of_token(self, claims: Claims) -> Reservation:
        """The reservation that a token of ours names.

        Raises:
            HoldLost: we gave the token out, and the order is gone.
        """
        self._losses.saw(claims)
        found = await self.find(claims.order_id)
        if found is not None:
            return found
        try:
            await self._losses.missing(claims)
            settling = await self._losses.settling_of(claims.order_id)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error
        if settling is None:
            raise HoldLost
        return settling

    async def deposit_account(self, order: Reservation) -> DepositAccount | None:
        """The account that the order's buyer pays in to; None unless it is AWAITING_DEPOSIT.

        Only for the buyer and for operators. The order can be read without it while SQL is away.
        """
        if order.status is not Status.AWAITING_DEPOSIT or order.payment_key is None:
            return None
        try:
            payment = await self._ledger.payment_by_key(order.payment_key)
        except (SQLAlchemyError, OSError) as error:
            log.warning("account_not_read", order_id=order.order_id, reason=type(error).__name__)
            return None
        if payment is None or payment.order_id != order.order_id or not payment.account_number:
            return None
        return DepositAccount(
            bank=bank_of(payment.account_bank or ""),
            account_number=payment.account_number,
            holder_name=payment.account_holder or "",
            due_at_ms=payment.due_at_ms or order.expires_at_ms,
        )

    async def all_of_buyer(self, sale_id: str, buyer_id: str) -> list[Reservation]:
        """The buyer's reservations in this sale, newest first."""
        try:
            return await self._store.orders_of_buyer(sale_id, buyer_id, ORDERS_LISTED_MAX)
        except (StoreUnavailable, StoreUncertain) as error:
            raise Unavailable(retryAfter=1) from error

    async def next_change(self, order: Reservation, seconds: float) -> Reservation:
        """The reservation at its next change, or as it is after that many seconds.

        A hold that passes its deadline counts as changed even before it is reaped.
        """
        try:
            return await self._waits.next_change(order, seconds)
        except (StoreUnavailable, StoreUncertain) as error:
            raise Unavailable(retryAfter=1) from error


def as_reservation(row: OrderRow) -> Reservation:
    """An order in SQL as the reservation it was."""
    return Reservation(
        order_id=row.order_id,
        sale_id=row.sale_id,
        buyer_id=row.buyer_id,
        status=Status(row.status),
        lines=tuple(
            Line(sku=line.sku, quantity=line.quantity, price=line.price) for line in row.lines
        ),
        amount=row.amount,
        currency=row.currency,
        order_name=row.order_name,
        created_at_ms=row.created_at_ms,
        updated_at_ms=row.updated_at_ms,
        expires_at_ms=row.expires_at_ms,
        seq=row.seq,
        fence=row.fence,
        payment_key=row.payment_key,
        digest=row.digest,
    )
