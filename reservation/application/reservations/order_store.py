"""Reads and changes orders in their place of record: Redis, or SQL if their sale is retired."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_reservation
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.sql.errors import reason_of
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.retired_orders import RetiredChange, RetiredOrder
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import has_payment_history, order_fields
from reservation.domain.clock import Clock
from reservation.domain.errors import HoldLost, ReservationExpired
from reservation.domain.events import EventName
from reservation.domain.ids import sale_of
from reservation.domain.payment import (
    Claimed,
    Finished,
    Outcome,
    PaymentOutcome,
    Present,
    Reason,
)
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status

__all__ = ["OrderStore"]

#: The transitions by a payment's outcome in a retired sale, as in finish.lua. No order of it is
#: CONFIRMING: a claim needs a hold, and a re-take needs an open sale.
_FINISHES: Final[Mapping[PaymentOutcome, Mapping[Status, Status]]] = {
    PaymentOutcome.CONFIRMED: {Status.AWAITING_DEPOSIT: Status.CONFIRMED},
    PaymentOutcome.AWAITING_DEPOSIT: {Status.CONFIRMED: Status.AWAITING_DEPOSIT},
    PaymentOutcome.DECLINED: {Status.AWAITING_DEPOSIT: Status.RELEASED},
    PaymentOutcome.VOIDED: {},
    PaymentOutcome.EXPIRED: {Status.AWAITING_DEPOSIT: Status.EXPIRED},
    PaymentOutcome.REFUNDED: {
        Status.AWAITING_DEPOSIT: Status.REFUNDED,
        Status.RELEASED: Status.REFUNDED,
        Status.EXPIRED: Status.REFUNDED,
    },
}


class OrderStore(ReservationStore):
    """Reads and changes orders; each call raises the same errors for both places.

    If SQL does not answer a call about a retired sale, the call raises `StoreUnavailable`, or
    `StoreUncertain` if the order may have changed.

    Args:
        connections: the Redis server, with all sales that are not retired.
        keys: its keys.
        sql: the orders of retired sales.
        is_retired: whether a sale is retired.
        clock: the time.
    """

    def __init__(
        self,
        connections: RedisClient,
        keys: Keys,
        sql: SqlStore,
        is_retired: Callable[[str], bool],
        *,
        clock: Clock,
    ) -> None:
        super().__init__(connections, keys, clock=clock)
        self._sql = sql
        self._is_retired = is_retired
        self._now_ms = clock.now_ms

    def _is_in_sql(self, order_id: str) -> bool:
        return self._is_retired(sale_of(order_id) or "")

    async def read_many(self, order_ids: Sequence[str]) -> list[Reservation | None]:
        """The reservations of these ids, in the same order; None where there is none."""
        retired = [order_id for order_id in order_ids if self._is_in_sql(order_id)]
        if not retired:
            return await super().read_many(order_ids)
        with _reading():
            rows = [row for order_id in retired if (row := await self._sql.orders.get(order_id))]
            found = {order.order_id: order for order in await self._of_rows(rows)}
        live = [order_id for order_id in order_ids if not self._is_in_sql(order_id)]
        found |= {order.order_id: order for order in await super().read_many(live) if order}
        return [found.get(order_id) for order_id in order_ids]

    async def _of_rows(self, rows: Sequence[OrderRow]) -> list[Reservation]:
        """These rows as reservations, with their payment attempts, as Redis had them."""
        paid = [row.order_id for row in rows if has_payment_history(row)]
        stories = await self._sql.events.list_payment_events(paid)
        return [
            as_reservation(
                row.sale_id,
                row.order_id,
                order_fields(row, stories.get(row.order_id, ())),
                currency=row.currency,
            )
            for row in rows
        ]

    async def digest(self, order_id: str) -> str | None:
        """The digest of the body that made this order, or None if there is none."""
        if not self._is_in_sql(order_id):
            return await super().digest(order_id)
        with _reading():
            row = await self._sql.orders.get(order_id)
        return row.digest if row else None

    async def orders_of_buyer(self, sale_id: str, buyer_id: str, limit: int) -> list[Reservation]:
        """This buyer's reservations in this sale, newest first, at most `limit`."""
        if not self._is_retired(sale_id):
            return await super().orders_of_buyer(sale_id, buyer_id, limit)
        with _reading():
            rows, _ = await self._sql.orders.page(sale_id=sale_id, buyer_id=buyer_id, limit=limit)
            return await self._of_rows(rows)

    async def claim(
        self,
        order: Reservation,
        *,
        epoch: str,
        payment_key: str,
        lease_ms: int,
        known_fence: int = 0,
    ) -> Claimed | Present:
        """Take a reservation to CONFIRMING (claim.lua); refused in a retired sale."""
        if not self._is_retired(order.sale_id):
            return await super().claim(
                order,
                epoch=epoch,
                payment_key=payment_key,
                lease_ms=lease_ms,
                known_fence=known_fence,
            )
        if order.status in (Status.RELEASED, Status.EXPIRED):
            raise ReservationExpired
        return Present(order.status, order.attempts.get(payment_key, ""))

    async def finish(
        self,
        order: Reservation,
        *,
        epoch: str,
        fence: int,
        outcome: Outcome,
        payment_key: str = "",
        claim_id: str = "",
    ) -> Finished:
        """Record the outcome of a payment (finish.lua), under the fence that asked for it."""
        if not self._is_retired(order.sale_id):
            return await super().finish(
                order,
                epoch=epoch,
                fence=fence,
                outcome=outcome,
                payment_key=payment_key,
                claim_id=claim_id,
            )

        def decide(now: RetiredOrder) -> RetiredChange | None:
            to = _FINISHES[outcome.name].get(now.status)
            if to is None or now.fence != fence or now.seq != order.seq:
                return None
            return RetiredChange(
                EventName(outcome.name.value), to, outcome.event_members, restock=outcome.restock
            )

        found = await self._change(order, decide)
        return Finished(found[0].status, applied=found[1])

    async def refund(
        self, order: Reservation, *, epoch: str, restock: bool, reason: Reason
    ) -> Status:
        """Take a sold order to REFUNDED (refund.lua); returns the resulting status."""
        if not self._is_retired(order.sale_id):
            return await super().refund(order, epoch=epoch, restock=restock, reason=reason)

        def decide(now: RetiredOrder) -> RetiredChange | None:
            if now.status is not Status.CONFIRMED:
                return None
            return RetiredChange(
                EventName.REFUNDED, Status.REFUNDED, reason.members(), restock=restock
            )

        return (await self._change(order, decide))[0].status

    async def release(self, order: Reservation, *, epoch: str, reason: Reason) -> Status:
        """Release a hold (release.lua). A retired sale has no hold, so its orders do not change."""
        if not self._is_retired(order.sale_id):
            return await super().release(order, epoch=epoch, reason=reason)
        return order.status

    async def _change(
        self, order: Reservation, decide: Callable[[RetiredOrder], RetiredChange | None]
    ) -> tuple[RetiredOrder, bool]:
        try:
            changed = await self._sql.retired_orders.change(
                order.sale_id, order.order_id, decide, at_ms=self._now_ms()
            )
        except (SQLAlchemyError, OSError) as error:
            raise StoreUncertain(reason_of(error)) from error
        if changed is None:
            raise HoldLost
        return changed


@contextmanager
def _reading() -> Generator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise StoreUnavailable(reason_of(error)) from error
