"""Reads and changes orders in their place of record: Redis, or SQL if their sale is retired."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

import structlog
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
from reservation.application.reservations.tombstones import TombstonedOrders
from reservation.domain.clock import Clock
from reservation.domain.errors import (
    HoldLost,
    ReservationError,
    ReservationExpired,
    Unavailable,
)
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

log = structlog.get_logger(__name__)

#: Tries of a read or a call whose order is restored or replaced meanwhile.
TRIES_MAX: Final = 3

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
        tombstones: the orders that ended without a claim, of which Redis has only a short record.
        clock: the time.
    """

    def __init__(
        self,
        connections: RedisClient,
        keys: Keys,
        sql: SqlStore,
        is_retired: Callable[[str], bool],
        tombstones: TombstonedOrders,
        *,
        clock: Clock,
    ) -> None:
        super().__init__(connections, keys, clock=clock)
        self._sql = sql
        self._is_retired = is_retired
        self._tombstones = tombstones
        self._now_ms = clock.now_ms

    @property
    def keep_ms(self) -> int:
        """Time from an order's deadline to its tombstone."""
        return self._tombstones.keep_ms

    def _is_in_sql(self, order_id: str) -> bool:
        return self._is_retired(sale_of(order_id) or "")

    async def read_many(self, order_ids: Sequence[str]) -> list[Reservation | None]:
        """The reservations of these ids, in the same order; None for a missing one.

        An order with a tombstone is read from SQL. If the two differ, that is an alarm, and there
        is no such order.
        """
        found = await self._read_many(order_ids)
        for attempt in range(1, TRIES_MAX + 1):
            missing = [
                order_id
                for order_id, order in zip(order_ids, found, strict=True)
                if order is None and not self._is_in_sql(order_id)
            ]
            if not missing:
                break
            with _reading():
                rows, unclear = await self._tombstones.rows(missing)
                ended = {order.order_id: order for order in await self._of_rows(rows)}
            found = [
                ended.get(order_id, order) for order_id, order in zip(order_ids, found, strict=True)
            ]
            if not unclear:
                break
            if attempt == TRIES_MAX:
                with _reading():
                    await self._tombstones.report(unclear)
                break
            # Between the two reads a tombstone may have come or gone.
            again = dict(zip(unclear, await self._read_many(unclear), strict=True))
            found = [
                order or again.get(order_id)
                for order_id, order in zip(order_ids, found, strict=True)
            ]
        return found

    async def _read_many(self, order_ids: Sequence[str]) -> list[Reservation | None]:
        retired = [order_id for order_id in order_ids if self._is_in_sql(order_id)]
        if not retired:
            return await super().read_many(order_ids)
        with _reading():
            rows = [row for order_id in retired if (row := await self._sql.orders.get(order_id))]
            found = {order.order_id: order for order in await self._of_rows(rows)}
        live = [order_id for order_id in order_ids if not self._is_in_sql(order_id)]
        found |= {order.order_id: order for order in await super().read_many(live) if order}
        return [found.get(order_id) for order_id in order_ids]

    async def read_many_acknowledged(self, order_ids: Sequence[str]) -> list[Reservation | None]:
        """Like `read_many`, of orders of one sale; enough replicas have the states, or SQL has."""
        if self._is_in_sql(order_ids[0]):
            return await self.read_many(order_ids)
        found: dict[str, Reservation | None] = {}
        wanted = list(order_ids)
        for attempt in range(1, TRIES_MAX + 1):
            found |= zip(wanted, await super().read_many_acknowledged(wanted), strict=True)
            missing = [order_id for order_id in wanted if found[order_id] is None]
            if not missing:
                break
            with _reading():
                rows, wanted = await self._tombstones.rows(missing)
                found |= {order.order_id: order for order in await self._of_rows(rows)}
                if not wanted:
                    break
                if attempt == TRIES_MAX:
                    await self._tombstones.report(wanted)
        return [found[order_id] for order_id in order_ids]

    def require_acks(self, sale_id: str) -> None:
        """Refuse a new payment attempt while too few replicas acknowledge changes."""
        if not self._is_retired(sale_id):
            super().require_acks(sale_id)

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

    async def digest(self, order_id: str, buyer_id: str) -> str | None:
        """The digest of the body that made this buyer's order, or None if there is none."""
        if not self._is_in_sql(order_id):
            return await super().digest(order_id, buyer_id)
        with _reading():
            row = await self._sql.orders.get(order_id)
        return row.digest if row else None

    async def orders_of_buyer(self, sale_id: str, buyer_id: str, limit: int) -> list[Reservation]:
        """This buyer's reservations in this sale, newest first, at most `limit`."""
        if not self._is_retired(sale_id):
            return await self._orders_in_redis(sale_id, buyer_id, limit)
        with _reading():
            rows, _ = await self._sql.orders.page(sale_id=sale_id, buyer_id=buyer_id, limit=limit)
            return await self._of_rows(rows)

    async def _orders_in_redis(self, sale_id: str, buyer_id: str, limit: int) -> list[Reservation]:
        found: dict[str, Reservation] = {}
        for _ in range(TRIES_MAX):
            count = await self._tombstones.count_of_buyer(sale_id, buyer_id)
            if count:
                with _reading():
                    rows = await self._tombstones.of_buyer(sale_id, buyer_id, limit)
                    found |= {order.order_id: order for order in await self._of_rows(rows)}
            # Read last: an order that is restored meanwhile is found here.
            in_redis = await super().orders_of_buyer(sale_id, buyer_id, limit)
            found |= {order.order_id: order for order in in_redis}
            # An order that is replaced meanwhile is found in the next try.
            if await self._tombstones.count_of_buyer(sale_id, buyer_id) == count:
                break
        newest = sorted(
            found.values(), key=lambda order: (order.created_at_ms, order.order_id), reverse=True
        )
        return newest[:limit]

    async def _call(
        self,
        script: str,
        order: Reservation,
        *,
        epoch: str,
        keys: Sequence[str],
        args: Sequence[str | int],
        acked: bool = True,
    ) -> list[str]:
        """Run a script of one order; an order with a tombstone is restored first.

        Raises:
            HoldLost: Redis has neither the order nor its tombstone.
            SaleRecovering: the tombstone is not the state of the order in SQL.
        """
        for attempt in range(TRIES_MAX):
            try:
                reply = await super()._call(
                    script, order, epoch=epoch, keys=keys, args=args, acked=acked
                )
            except HoldLost:
                with _reading():
                    if not await self._tombstones.restore(order.order_id, epoch=epoch):
                        raise
                continue
            if attempt:
                await self._replace_again(order, epoch)
            return reply
        # Other processes keep replacing it, between our two calls.
        raise Unavailable(retryAfter=1)

    async def _replace_again(self, order: Reservation, epoch: str) -> None:
        """Replace a restored order that the script has not changed."""
        try:
            await self._tombstones.replace(order.order_id, epoch=epoch)
        except (
            ReservationError,
            StoreUnavailable,
            StoreUncertain,
            SQLAlchemyError,
            OSError,
        ) as error:
            # The script's reply counts; the order stays until its sale is retired.
            log.warning("order_not_replaced", order_id=order.order_id, reason=reason_of(error))

    async def claim(
        self,
        order: Reservation,
        *,
        epoch: str,
        payment_key: str,
        lease_ms: int,
        known_fence: int = 0,
        is_requested: bool = False,
    ) -> Claimed | Present:
        """Take a reservation to CONFIRMING (claim.lua); refused in a retired sale."""
        if not self._is_retired(order.sale_id):
            return await super().claim(
                order,
                epoch=epoch,
                payment_key=payment_key,
                lease_ms=lease_ms,
                known_fence=known_fence,
                is_requested=is_requested,
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
        """Record the outcome of a payment (finish.lua), under the fence of its request."""
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
