"""Requests about orders: release an open account, and look a payment up now.

A request is in SQL before anything is done for it. The process that received it begins at once; if
it dies, a worker carries the request out. A request ends once the order has left the state in which
it was made, or, to resolve, once the payment was looked up.
"""

import asyncio
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.order_requests import OrderRequest, RequestKind
from reservation.application.payments.settle import PaymentSettlement
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.domain.alarms import Alarm
from reservation.domain.errors import ReservationError, Unavailable
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.failpoints import reach
from reservation.telemetry.metrics import alarm

__all__ = ["OrderRequests"]

log = structlog.get_logger(__name__)

#: Requests that a process carries out at once, each with at most one look-up and one cancel.
AT_ONCE: Final = 20
#: How long a round of a worker waits for them. A cancel that hangs delays no other request.
ROUND_SECONDS: Final = 1.0
_MINUTE_MS: Final = 60_000
#: The orders whose payment can be resolved.
_UNDECIDED: Final = (Status.CONFIRMING, Status.AWAITING_DEPOSIT)
#: The errors that a later try may not meet.
_TRANSIENT: Final = (
    ReservationError,
    StoreUnavailable,
    StoreUncertain,
    SQLAlchemyError,
    OSError,
)


class OrderRequests(PaymentUseCase):
    """Records and carries out requests about orders."""

    def __init__(self, systems: PaymentSystems, settlement: PaymentSettlement) -> None:
        super().__init__(systems)
        self._settlement = settlement
        self._under_way: dict[int, asyncio.Task[bool]] = {}

    async def release(self, order: Reservation, *, operator: str = "", reason: str = "") -> None:
        """Request the end of an AWAITING_DEPOSIT order; its account is cancelled at the PG.

        Args:
            order: as just read.
            operator: who; empty for the buyer.
            reason: the operator's.

        Raises:
            SaleRecovering: the sale waits for a rebuild.
            Unavailable: the request could not be recorded.
        """
        self._begin(await self._add(order, RequestKind.RELEASE, operator, reason))

    async def resolve(self, order: Reservation, *, operator: str, reason: str) -> None:
        """Look the payment of a CONFIRMING or AWAITING_DEPOSIT order up now.

        Returns after the look-up, or after a time-out while it continues. An order in another state
        stays as it is.

        Args:
            order: as just read.
            operator: who.
            reason: why.

        Raises:
            SaleRecovering: the sale waits for a rebuild.
            Unavailable: the request could not be recorded.
        """
        if order.status not in _UNDECIDED:
            return
        task = self._begin(await self._add(order, RequestKind.RESOLVE, operator, reason))
        await asyncio.wait({task}, timeout=self._limits.refund_answer_seconds)

    async def _add(
        self, order: Reservation, kind: RequestKind, operator: str, reason: str
    ) -> OrderRequest:
        await self._catalog.get(order.sale_id)
        now_ms = self._clock.now_ms()
        try:
            request = await self._sql.order_requests.add(
                order_id=order.order_id,
                payment_key=order.payment_key or "",
                kind=kind,
                operator=operator,
                reason=reason,
                now_ms=now_ms,
                due_at_ms=now_ms + self._limits.lease_ms,
            )
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("The request could not be recorded.", retryAfter=1) from error
        log.info("order_requested", order_id=order.order_id, kind=kind.value, operator=operator)
        reach("request:after_add", order.order_id)
        return request

    def _begin(self, request: OrderRequest) -> asyncio.Task[bool]:
        """Carry the request out in a task of its own, unless this process does already."""
        running = self._under_way.get(request.request_id)
        if running is not None:
            return running
        task = asyncio.create_task(self._try(request))
        self._under_way[request.request_id] = task
        task.add_done_callback(lambda done: self._done(request, done))
        return task

    def _done(self, request: OrderRequest, task: asyncio.Task[bool]) -> None:
        del self._under_way[request.request_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("order_request_crashed", order_id=request.order_id, exc_info=error)

    async def aclose(self) -> None:
        """Cancel the requests in progress: a worker carries them out."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def run_once(self) -> int:
        """Begin due requests while there is room; how many ended meanwhile.

        Raises:
            SQLAlchemyError, OSError: SQL is down.
        """
        room = AT_ONCE - len(self._under_way)
        if room <= 0:
            return 0
        begun: list[asyncio.Task[bool]] = []
        for request in await self._sql.order_requests.list_due(self._clock.now_ms(), room):
            held = await self._sql.order_requests.postpone(
                request, self._clock.now_ms() + self._limits.lease_ms
            )
            if held is not None:
                begun.append(self._begin(held))
        if not begun:
            return 0
        done, _ = await asyncio.wait(begun, timeout=ROUND_SECONDS)
        ended = [task for task in done if not task.cancelled() and task.exception() is None]
        return sum(task.result() for task in ended)

    async def _try(self, request: OrderRequest) -> bool:
        """Carry the request out, or postpone it; whether it has ended."""
        try:
            status = await self._carry_out(request)
        except _TRANSIENT as error:
            log.info("order_request_deferred", order_id=request.order_id, reason=_name(error))
            status = None
        try:
            if status is None:
                await self._postpone(request)
                return False
            reach("request:before_end", request.order_id)
            await self._sql.order_requests.end(
                request.request_id, status=status.value, now_ms=self._clock.now_ms()
            )
        except (SQLAlchemyError, OSError) as error:
            # A worker tries it again once it is due.
            log.info("order_request_not_stored", order_id=request.order_id, reason=_name(error))
            return False
        return True

    async def _carry_out(self, request: OrderRequest) -> Status | None:
        """The order's status if the request has ended; None if it must be tried again."""
        order = await self._store.read(request.order_id)
        if order is None:
            return None
        # While the sale waits for a rebuild, Redis may have the order in an older state.
        await self._catalog.get(order.sale_id)
        if request.payment_key != order.payment_key or order.status not in _UNDECIDED:
            return order.status
        if request.kind == RequestKind.RELEASE:
            return await self._release(request, order)
        return await self._resolve(request, order)

    async def _release(self, request: OrderRequest, order: Reservation) -> Status | None:
        if order.status is not Status.AWAITING_DEPOSIT:
            return None
        cause = Cause.OPERATOR if request.operator else Cause.BUYER
        reason = Reason(cause, operator=request.operator, note=request.reason)
        return await self._settlement.release_account(order, reason)

    async def _resolve(self, request: OrderRequest, order: Reservation) -> Status | None:
        if order.status is Status.CONFIRMING:
            looked = await self._settlement.settle_now(order.order_id)
        else:
            looked = await self._settlement.look_at_account(order)
        after = await self._store.read(request.order_id)
        if after is None:
            return None
        return after.status if looked or after.status not in _UNDECIDED else None

    async def _postpone(self, request: OrderRequest) -> None:
        age_ms = self._clock.now_ms() - request.created_at_ms
        if age_ms >= self._limits.alarm_seconds * 1000:
            alarm(Alarm.PAYMENT_UNDECIDED, order_id=request.order_id, minutes=age_ms // _MINUTE_MS)
        least, most = self._limits.pause_least_seconds, self._limits.pause_most_seconds
        pause = min(most, max(least, 2.0 ** min(request.tries, 10)))
        await self._sql.order_requests.postpone(request, self._clock.now_ms() + round(pause * 1000))


def _name(error: Exception) -> str:
    return type(error).__name__
