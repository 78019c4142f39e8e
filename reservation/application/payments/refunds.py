"""Refunds: the money goes back at the PG, then the stock; a crash in between is resumed.

    begin    a row in SQL: who, why, and whether the units are for sale again
    cancel   at the PG, under one idempotency key per payment, so that it happens once
    finish   CONFIRMED -> REFUNDED in Redis, then the row is done

The worker resumes a row that is not done. One process at a time works on it: the holder of its
lease in SQL.

An operator may correct a pending refund. The new wish replaces the old one only while no cancel of
the old one may still be carried out and the PG shows that all of the money is there; else it is
refused with the pending wish.
"""

import asyncio
import hashlib
from typing import Final

import msgspec
import structlog

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.refunds import OtherRefund, RefundRecord, RefundReused
from reservation.adapters.sql.refunds import RefundWish as RefundWishRow
from reservation.application.payments.follow_up import FollowUp
from reservation.application.payments.resolve import AnswerKind, PaymentResolver
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.application.reservations.queries import ReservationQueries
from reservation.domain.alarms import Alarm
from reservation.domain.clock import as_wire
from reservation.domain.errors import (
    IdempotencyKeyReused,
    NotRefundable,
    RefundAccountRequired,
    RefundPending,
    ReservationError,
    ReservationNotFound,
)
from reservation.domain.payment import Cause, Reason
from reservation.domain.payment_gateway import (
    Answer,
    Answered,
    Declined,
    Misconfigured,
    Payment,
    PaymentMissing,
    PaymentStatus,
    RefundAccount,
)
from reservation.domain.payment_rules import (
    code_of,
    has_no_capture,
    is_refunded,
    may_still_succeed,
)
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.failpoints import reach
from reservation.telemetry.metrics import alarm

__all__ = ["ORDER_NOT_PAID", "VIRTUAL_ACCOUNT", "RefundService", "RefundWish", "facts_of"]

log = structlog.get_logger(__name__)

#: The PG's name of the virtual account method, whose deposits go back only to an account.
VIRTUAL_ACCOUNT: Final = "가상계좌"


#: The code of a refund that ended because its order ended without money to return.
ORDER_NOT_PAID: Final = "ORDER_NOT_PAID"


class RefundWish(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's request for a refund."""

    order_id: str
    reason: str
    restock: bool
    account: RefundAccount | None
    idempotency_key: str
    operator: str

    def digest(self) -> str:
        """Distinguishes this wish from another one under the same key."""
        body = msgspec.json.encode([self.order_id, self.reason, self.restock, self.account])
        return hashlib.sha256(body).hexdigest()[:32]

    def written(self) -> RefundWishRow:
        """The wish as stored in SQL."""
        return RefundWishRow(
            order_id=self.order_id,
            idempotency_key=self.idempotency_key,
            digest=self.digest(),
            reason=self.reason,
            restock=self.restock,
            operator=self.operator,
            account_json=msgspec.json.encode(self.account).decode() if self.account else None,
        )


class _CancelResult(msgspec.Struct, frozen=True):
    """The result of a refund call to the PG."""

    #: All of the money is back.
    back: bool
    #: The PG's last code if it is not.
    code: str | None = None
    #: A cancel may still be carried out.
    unanswered: bool = False


class RefundService(PaymentUseCase):
    """Refunds sold orders in full."""

    def __init__(
        self,
        systems: PaymentSystems,
        resolver: PaymentResolver,
        queries: ReservationQueries,
        follow_up: FollowUp,
    ) -> None:
        super().__init__(systems)
        self._resolver = resolver
        self._queries = queries
        self._follow_up = follow_up
        self._under_way: set[asyncio.Task[bool]] = set()

    async def refund(self, wish: RefundWish) -> bool:
        """Begin the refund and try to finish it; whether it is finished.

        Raises:
            ReservationNotFound, NotRefundable: nothing was sold under this order, it is refunded
                by another wish already, or the PG refuses.
            RefundPending: another wish is pending and may be carried out at any time.
            RefundAccountRequired: a deposit, and no account to send it back to.
            IdempotencyKeyReused: this key has another body.
        """
        order = await self._queries.find(wish.order_id)
        if order is None:
            raise ReservationNotFound
        if order.status not in (Status.CONFIRMED, Status.REFUNDED):
            raise NotRefundable(reservationStatus=order.status.value)
        if order.status is Status.CONFIRMED and wish.account is None:
            await self._require_no_account(order)
        now_ms = self._clock.now_ms()
        begun = await self._sql.refunds.begin(wish.written(), now_ms=now_ms)
        reach("refund:after_begin", wish.order_id)
        if isinstance(begun, OtherRefund):
            begun = await self._correct(order, begun.existing, wish)
        if isinstance(begun, RefundReused):
            raise IdempotencyKeyReused
        if begun.status == "refused":
            raise _refused(begun.code or "")
        return await self._answer_in_time(begun)

    async def _answer_in_time(self, record: RefundRecord) -> bool:
        """Run the refund; false after a time-out, while it continues in its own task."""
        task = asyncio.create_task(self.resume(record))
        self._under_way.add(task)
        task.add_done_callback(lambda done: self._done(record, done))
        await asyncio.wait({task}, timeout=self._limits.refund_answer_seconds)
        return task.result() if task.done() else False

    def _done(self, record: RefundRecord, task: asyncio.Task[bool]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (error := task.exception()):
            # The request raises it as well, unless it timed out.
            log.info("refund_deferred", order_id=record.order_id, reason=type(error).__name__)

    async def aclose(self) -> None:
        """Cancel the refunds in flight: a worker resumes them once their leases expire."""
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _require_no_account(self, order: Reservation) -> None:
        if await self._method_of(order) == VIRTUAL_ACCOUNT:
            raise RefundAccountRequired

    async def _method_of(self, order: Reservation) -> str | None:
        """The payment method; None if it is unknown."""
        payment = await self._sql.payments.get(order.payment_key or "")
        return payment.method if payment else None

    async def _correct(
        self, order: Reservation, existing: RefundRecord, wish: RefundWish
    ) -> RefundRecord | RefundReused:
        """Replace another wish with this one, if the other can no longer be carried out.

        Raises:
            RefundPending, NotRefundable: the other wish stays.
        """
        if existing.status == "done":
            raise NotRefundable(
                "The order was refunded by another request.", refund=facts_of(existing)
            )
        held = await self._lease(existing, asks=False)
        if held is None:
            raise RefundPending(refund=facts_of(existing))
        replaced = None
        if not held.unanswered and await self._is_untouched(order):
            now_ms = self._clock.now_ms()
            replaced = await self._sql.refunds.replace(held, wish.written(), now_ms=now_ms)
        if isinstance(replaced, RefundRecord):
            log.info("refund_corrected", order_id=order.order_id, operator=wish.operator)
            return replaced
        await self._leave(held, code=held.code, unanswered=held.unanswered)
        if replaced is None:
            raise RefundPending(refund=facts_of(held))
        return replaced

    async def _is_untouched(self, order: Reservation) -> bool:
        """Whether the PG shows that all of the order's money is still there."""
        payment_key = order.payment_key or ""
        answer = await self._gateway.look_up(payment_key)
        await self._resolver.remember(order.order_id, payment_key, AnswerKind.LOOK_UP, answer)
        if not isinstance(answer, Answered) or answer.payment.order_id != order.order_id:
            return False
        payment = answer.payment
        whole = payment.balance_amount == payment.total_amount
        return payment.status == PaymentStatus.DONE and whole

    async def resume(self, record: RefundRecord) -> bool:
        """Resume a refund from its last step; whether it is finished."""
        if record.status == "done":
            return True
        order = await self._queries.find(record.order_id)
        if order is None or order.payment_key is None:
            alarm(Alarm.REFUND_WITHOUT_ORDER, order_id=record.order_id)
            return False
        sold = order.status is Status.CONFIRMED
        began = self._clock.monotonic()
        held = await self._lease(record, asks=sold)
        if held is None:
            return False
        if order.status not in (Status.CONFIRMED, Status.REFUNDED):
            return await self._handle_unsold(order, held)
        if sold:
            asked = await self._request_cancel(order, held, began)
            if not asked.back:
                await self._leave(held, code=asked.code, unanswered=asked.unanswered)
                return False
        reach("refund:after_cancel", record.order_id)
        try:
            known = await self._catalog.get(order.sale_id)
            status = await self._store.refund(
                order,
                epoch=known.epoch,
                restock=held.restock,
                reason=Reason(Cause.OPERATOR, operator=held.operator, note=held.reason),
            )
        except (ReservationError, StoreUnavailable, StoreUncertain):
            # The money is back; the stock follows once Redis answers or the sale is rebuilt.
            await self._leave(held, code=None, unanswered=False)
            raise
        if status is not Status.REFUNDED:
            alarm(Alarm.REFUND_OF_UNSOLD_ORDER, order_id=order.order_id, status=status.value)
            await self._leave(held, code=status.value, unanswered=held.unanswered)
            return False
        reach("refund:after_finish", record.order_id)
        # If the lease is lost, the worker resumes the refund: Redis may have lost its end.
        return await self._sql.refunds.finish(held, status="done", code=None, now_ms=self._now_ms())

    async def _handle_unsold(self, order: Reservation, held: RefundRecord) -> bool:
        """Handle an unsold order: the bank reversed its deposit, or Redis went back in time.

        The refund continues once the order is sold again or refunded. It ends if the order has
        ended and the PG shows no money that could be returned.
        """
        order_id, payment_key = order.order_id, order.payment_key or ""
        alarm(Alarm.REFUND_OF_UNSOLD_ORDER, order_id=order_id, status=order.status.value)
        answer = await self._gateway.look_up(payment_key)
        await self._resolver.remember(order_id, payment_key, AnswerKind.LOOK_UP, answer)
        self._warn(order, answer)
        ended = order.status in (Status.RELEASED, Status.EXPIRED)
        match answer:
            case Answered(payment) if (payment.order_id, payment.payment_key) == (
                order_id,
                payment_key,
            ):
                if ended and has_no_capture(payment):
                    await self._sql.refunds.finish(
                        held, status="refused", code=ORDER_NOT_PAID, now_ms=self._now_ms()
                    )
                    return False
                moved = ended or _has_moved(order, payment)
            case _:
                moved = False
        await self._leave(held, code=order.status.value, unanswered=held.unanswered)
        if moved and isinstance(answer, Answered):
            await self._follow_up.follow(order, answer)
        return False

    def _now_ms(self) -> int:
        return self._clock.now_ms()

    async def _lease(self, record: RefundRecord, *, asks: bool) -> RefundRecord | None:
        now_ms = self._clock.now_ms()
        return await self._sql.refunds.lease(
            record, asks=asks, now_ms=now_ms, until_ms=now_ms + self._limits.lease_ms
        )

    async def _leave(self, held: RefundRecord, *, code: str | None, unanswered: bool) -> None:
        await self._sql.refunds.release(
            held, code=code, unanswered=unanswered, now_ms=self._now_ms()
        )

    async def _request_cancel(
        self, order: Reservation, held: RefundRecord, began: float
    ) -> _CancelResult:
        payment_key = order.payment_key or ""
        account = await self._account_of(order, held)
        lease_left = self._limits.lease_ms / 1000 - (self._clock.monotonic() - began)
        if lease_left < self._limits.confirm_seconds + self._limits.lease_left_seconds:
            # This process was frozen: another one may have the refund, under another wish.
            log.warning("lease_too_short", order_id=order.order_id)
            return _CancelResult(back=False, code=held.code, unanswered=held.unanswered)
        answer = await self._resolver.cancel_at_pg(
            order.order_id, payment_key, held.reason, account=account
        )
        if isinstance(answer, Declined):
            alarm(Alarm.REFUND_REFUSED, order_id=order.order_id, code=answer.code)
            if await self._sql.refunds.finish(
                held, status="refused", code=answer.code, now_ms=self._now_ms()
            ):
                raise _refused(answer.code)
            # The lease is lost: the outcome is open.
            return _CancelResult(back=False, code=answer.code, unanswered=held.unanswered)
        unanswered = may_still_succeed(answer, before=held.unanswered)
        self._warn(order, answer)
        shown = answer
        if not isinstance(shown, Answered):
            # A cancel of ours may have succeeded: only a lookup of the payment shows it.
            shown = await self._gateway.look_up(payment_key)
            await self._resolver.remember(order.order_id, payment_key, AnswerKind.LOOK_UP, shown)
            self._warn(order, shown)
        asked_for = (order.order_id, payment_key)
        if (
            not isinstance(shown, Answered)
            or (shown.payment.order_id, shown.payment.payment_key) != asked_for
        ):
            return _CancelResult(back=False, code=code_of(answer), unanswered=unanswered)
        # The audit names an order that is refunded while SQL has its payment as DONE.
        kept = await self._resolver.store_payment(shown.payment)
        back = kept and is_refunded(shown.payment)
        return _CancelResult(back, code=code_of(answer), unanswered=unanswered)

    def _warn(self, order: Reservation, answer: Answer) -> None:
        """Raise the alarm on a permanent failure."""
        match answer:
            case Misconfigured(code):
                alarm(Alarm.GATEWAY_MISCONFIGURED, order_id=order.order_id, code=code)
            case PaymentMissing(code):
                alarm(Alarm.REFUND_PAYMENT_MISSING, order_id=order.order_id, code=code)
            case _:
                pass

    async def _account_of(self, order: Reservation, record: RefundRecord) -> RefundAccount | None:
        """The refund account of a deposit; the PG refuses one for any other payment method."""
        if record.account_json is None or await self._method_of(order) not in (
            VIRTUAL_ACCOUNT,
            None,
        ):
            return None
        return msgspec.json.decode(record.account_json, type=RefundAccount)


def facts_of(record: RefundRecord) -> dict[str, object]:
    """A refund as shown to operators, in the wire's camelCase."""
    account = msgspec.json.decode(record.account_json) if record.account_json else None
    return {
        "orderId": record.order_id,
        "status": record.status,
        "reason": record.reason,
        "restock": record.restock,
        "operator": record.operator,
        "refundReceiveAccount": account,
        "providerCode": record.code,
        "createdAt": as_wire(record.created_at_ms),
        "updatedAt": as_wire(record.updated_at_ms),
    }


def _has_moved(order: Reservation, payment: Payment) -> bool:
    """Whether the order awaits a deposit and its account no longer does."""
    awaits = order.status is Status.AWAITING_DEPOSIT
    return awaits and payment.status != PaymentStatus.WAITING_FOR_DEPOSIT


def _refused(code: str) -> NotRefundable:
    return NotRefundable("The payment provider refused the refund.", providerCode=code)
