"""Queries of reservations: from Redis while they are there, from SQL afterwards.

While a sale is closed Redis may have its orders in an older state than SQL, and both are read.
"""

from collections.abc import Sequence
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.sql.orders import OrderRow, as_reservation
from reservation.adapters.sql.store import SqlStore
from reservation.adapters.toss.banks import Bank, bank_of
from reservation.application.readiness.data_loss import DataLossDetector
from reservation.application.reservations.acknowledged_reads import AcknowledgedReads
from reservation.application.reservations.waits import Waits
from reservation.application.sales.catalog import Catalog
from reservation.domain.clock import Clock, as_ms
from reservation.domain.errors import HoldLost, ReservationNotFound, Unavailable
from reservation.domain.ids import sale_of
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.domain.tokens import Claims

__all__ = ["DepositAccount", "ReservationQueries", "later_of"]

log = structlog.get_logger(__name__)

#: A buyer's orders in one sale that are listed; a limit per buyer keeps real lists far shorter.
ORDERS_LISTED_MAX: Final = 100
#: The order of such a payment is missing since a restore.
_PAID_BEFORE_RESTORE: Final = "The payment is being assigned to its order; retry later."
PAID_RETRY_SECONDS: Final = 60

#: An order in one of these has no payment, judging by its status.
_WITHOUT_PAYMENT: Final = (Status.HELD, Status.PREPARED, Status.RELEASED, Status.EXPIRED)


class DepositAccount(msgspec.Struct, frozen=True, kw_only=True):
    """The account and the due date of an AWAITING_DEPOSIT order's deposit."""

    bank: Bank
    account_number: str
    holder_name: str
    due_at_ms: int


class ReservationQueries:
    """Reads reservations for their owners."""

    def __init__(
        self,
        catalog: Catalog,
        store: ReservationStore,
        sql: SqlStore,
        data_loss: DataLossDetector,
        reads: AcknowledgedReads,
        *,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._reads = reads
        self._sql = sql
        self._data_loss = data_loss
        self._waits = Waits(store.read, is_still=self._is_closed, clock=clock)

    def stop_waiting(self) -> None:
        """On shutdown: answer each waiting request, and let no further one wait."""
        self._waits.stop()

    async def find(self, order_id: str) -> Reservation | None:
        """The reservation, from Redis or SQL; None if there is none.

        Raises:
            Unavailable: Redis does not answer, or SQL is needed and does not answer.
        """
        sale_id = sale_of(order_id)
        if sale_id is None or not await self._catalog.knows(sale_id):
            return None
        try:
            found = await self._store.read(order_id)
            closed = sale_id in self._catalog.closed
            row = await self._sql.orders.get(order_id) if closed or found is None else None
            if closed:
                return await self._in_a_closed_sale(order_id, found, row)
        except (StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error
        return as_reservation(row) if row else found

    async def acknowledged(self, order: Reservation) -> Reservation:
        """The present state of an order that was just read, for an answer to its buyer.

        Raises:
            Unavailable: a failover may lose that state.
        """
        try:
            return await self._reads.state(order)
        except (StoreUnavailable, StoreUncertain) as error:
            raise Unavailable(retryAfter=1) from error

    def _is_closed(self, order_id: str) -> bool:
        return sale_of(order_id) in self._catalog.closed

    async def _in_a_closed_sale(
        self, order_id: str, found: Reservation | None, row: OrderRow | None
    ) -> Reservation | None:
        """An order that Redis may have in an older state than SQL, or not at all."""
        if row is not None:
            found = later_of(found, as_reservation(row))
        if found is None:
            return await self._data_loss.settling_order(order_id)
        if found.status in _WITHOUT_PAYMENT:
            return await self._data_loss.settling(found) or found
        return found

    async def now(self, order: Reservation) -> Reservation:
        """An order that was read from Redis, in SQL's state if that is later.

        Raises:
            SQLAlchemyError, OSError: its sale is closed, and SQL does not answer.
        """
        if not self._is_closed(order.order_id):
            return order
        row = await self._sql.orders.get(order.order_id)
        return await self._in_a_closed_sale(order.order_id, order, row) or order

    async def of_buyer(self, order_id: str, buyer_id: str) -> Reservation:
        """The buyer's own reservation.

        Raises:
            ReservationNotFound: there is none, or it is another buyer's; the error hides which.
        """
        found = await self.find(order_id)
        if found is None or found.buyer_id != buyer_id:
            raise ReservationNotFound
        return found

    async def of_token(self, claims: Claims) -> Reservation:
        """The reservation of a token of ours.

        Raises:
            HoldLost: the token is ours, and the order is gone.
            Unavailable: likewise, but the gateway has money for it, which an operator must place.
        """
        self._data_loss.saw(claims)
        found = await self.find(claims.order_id)
        if found is not None:
            return found
        try:
            await self._data_loss.missing(claims)
            settling = await self._data_loss.settling_order(claims.order_id)
            is_paid = settling is None and await self._sql.differences.has_order(claims.order_id)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error
        if is_paid:
            raise Unavailable(_PAID_BEFORE_RESTORE, retryAfter=PAID_RETRY_SECONDS)
        if settling is None:
            raise HoldLost
        return settling

    async def deposit_account(self, order: Reservation) -> DepositAccount | None:
        """The order's deposit account; None unless it is AWAITING_DEPOSIT.

        Only for the buyer and for operators. While SQL is down the order is shown without it.
        """
        if order.status is not Status.AWAITING_DEPOSIT or order.payment_key is None:
            return None
        try:
            payment = await self._sql.payments.get(order.payment_key)
        except (SQLAlchemyError, OSError) as error:
            log.warning("account_read_failed", order_id=order.order_id, reason=type(error).__name__)
            return None
        if payment is None or payment.order_id != order.order_id:
            return None
        account = payment.virtual_account
        if account is None or not account.account_number:
            return None
        return DepositAccount(
            bank=bank_of(account.bank),
            account_number=account.account_number,
            holder_name=account.holder_name,
            due_at_ms=as_ms(payment.due_at) if payment.due_at else order.expires_at_ms,
        )

    async def all_of_buyer(self, sale_id: str, buyer_id: str) -> list[Reservation]:
        """The buyer's reservations in this sale, newest first."""
        try:
            found = await self._store.orders_of_buyer(sale_id, buyer_id, ORDERS_LISTED_MAX)
            if sale_id not in self._catalog.closed:
                return await self._reads.states(found)
            return await self._all_in_a_closed_sale(sale_id, buyer_id, found)
        except (StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError) as error:
            raise Unavailable(retryAfter=1) from error

    async def _all_in_a_closed_sale(
        self, sale_id: str, buyer_id: str, found: Sequence[Reservation]
    ) -> list[Reservation]:
        rows, _ = await self._sql.orders.page(
            sale_id=sale_id, buyer_id=buyer_id, limit=ORDERS_LISTED_MAX
        )
        in_redis = {order.order_id: order for order in found}
        in_sql = {row.order_id: row for row in rows}
        listed = [
            order
            for order_id in in_redis | in_sql
            if (
                order := await self._in_a_closed_sale(
                    order_id, in_redis.get(order_id), in_sql.get(order_id)
                )
            )
        ]
        listed.sort(key=lambda order: (order.created_at_ms, order.order_id), reverse=True)
        return listed[:ORDERS_LISTED_MAX]

    async def next_change(self, order: Reservation, seconds: float) -> Reservation:
        """The reservation at its next change, or as it is after that many seconds.

        A hold that passes its deadline counts as changed even before it is reaped.
        """
        try:
            return await self._waits.next_change(order, seconds)
        except (StoreUnavailable, StoreUncertain) as error:
            raise Unavailable(retryAfter=1) from error


def later_of(found: Reservation | None, kept: Reservation) -> Reservation:
    """The later state of one order in Redis (`found`) and in SQL (`kept`).

    The numbers of a sale's events continue through each rebuild, so the higher number is the later
    state: SQL's where Redis lost events, Redis' where SQL has yet to receive them. They mislead
    where Redis went back and reused the numbers after SQL's last for other events:

        SQL     5 claimed   6 confirmed
        Redis   5 ...       6 ...         7 released

    So the order in Redis must also have the payment that it has in SQL. Only `voided` removes one,
    from CONFIRMING and before any money was asked for. The order keeps the fence of that claim, and
    no fence is given twice:

        SQL     5 claimed, fence 1
        Redis   5 claimed, fence 1   6 voided     the payment is gone, the fence is 1: Redis
        Redis   5 ...                6 released   it never had the payment, the fence is 0: SQL
    """
    if found is None or kept.seq > found.seq:
        return kept
    if kept.payment_key is None or kept.status in _WITHOUT_PAYMENT:
        return found
    if kept.payment_key in (found.payment_key, *found.attempts):
        return found
    voided = kept.status is Status.CONFIRMING and found.fence >= kept.fence
    return found if voided else kept
