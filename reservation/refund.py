"""Refunds: the money goes back at the PG, then the stock; a crash in between is gone on from.

    begin    a row in SQL: who, why, and whether the units are for sale again
    cancel   at the PG, under one idempotency key per payment, so that it happens once
    finish   CONFIRMED -> REFUNDED in Redis, then the row is done

A row that is not done is taken up again by the settler.
"""

import hashlib
from typing import Final

import msgspec
import structlog

from reservation.catalog import Catalog
from reservation.conclude import AnswerKind, Conclude
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.errors import (
    IdempotencyKeyReused,
    NotRefundable,
    RefundAccountRequired,
    ReservationNotFound,
)
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.failpoints import reach
from reservation.look import Look
from reservation.metrics import alarm
from reservation.payments.gateway import (
    Answered,
    Declined,
    PaymentGateway,
    PaymentStatus,
    RefundAccount,
)
from reservation.persistence.ledger import Ledger
from reservation.persistence.refunds import RefundRecord, RefundReused
from reservation.redis.store import Store

__all__ = ["Refund", "RefundWish"]

log = structlog.get_logger(__name__)

#: The PG's word for a virtual account, whose deposits go back to an account only.
VIRTUAL_ACCOUNT: Final = "가상계좌"


class RefundWish(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator asks for."""

    order_id: str
    reason: str
    restock: bool
    account: RefundAccount | None
    idempotency_key: str
    operator: str

    def digest(self) -> str:
        """Tells this wish from another under the same key."""
        body = msgspec.json.encode([self.order_id, self.reason, self.restock, self.account])
        return hashlib.sha256(body).hexdigest()[:32]


class Refund:
    """Refunds sold orders in full."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        ledger: Ledger,
        gateway: PaymentGateway,
        conclude: Conclude,
        look: Look,
        *,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._ledger = ledger
        self._gateway = gateway
        self._conclude = conclude
        self._look = look
        self._clock = clock

    async def __call__(self, wish: RefundWish) -> bool:
        """Begin the refund and try to finish it; whether it is through.

        Raises:
            ReservationNotFound, NotRefundable: nothing was sold under this order.
            RefundAccountRequired: a deposit, and no account to send it back to.
            IdempotencyKeyReused: this key asked for something else.
        """
        order = await self._look.find(wish.order_id)
        if order is None:
            raise ReservationNotFound
        if order.status not in (Status.CONFIRMED, Status.REFUNDED):
            raise NotRefundable(reservationStatus=order.status.value)
        if order.status is Status.CONFIRMED and wish.account is None:
            await self._need_no_account(order)
        record = await self._ledger.begin_refund(
            order_id=wish.order_id,
            idempotency_key=wish.idempotency_key,
            reason=wish.reason,
            restock=wish.restock,
            operator=wish.operator,
            account_json=msgspec.json.encode(wish.account).decode() if wish.account else None,
            digest=wish.digest(),
            now_ms=self._clock.now_ms(),
        )
        reach("refund:after_begin", wish.order_id)
        if isinstance(record, RefundReused):
            raise IdempotencyKeyReused
        return await self.go_on(record)

    async def _need_no_account(self, order: Reservation) -> None:
        if await self._method_of(order) == VIRTUAL_ACCOUNT:
            raise RefundAccountRequired

    async def _method_of(self, order: Reservation) -> str | None:
        """How it was paid; None where the PG has not told."""
        payment = await self._ledger.payment_of(order.order_id)
        return payment.method if payment else None

    async def go_on(self, record: RefundRecord) -> bool:
        """Take a refund on from wherever it stopped; whether it is through."""
        if record.status == "done":
            return True
        order = await self._look.find(record.order_id)
        if order is None or order.payment_key is None:
            alarm(Alarm.REFUND_WITHOUT_ORDER, order_id=record.order_id)
            return False
        if order.status is Status.CONFIRMED and not await self._money_back(order, record):
            return False
        reach("refund:after_cancel", record.order_id)
        known = await self._catalog.get(order.sale_id)
        status = await self._store.refund(
            order,
            epoch=known.epoch,
            restock=record.restock,
            reason=Reason(Cause.OPERATOR, operator=record.operator, note=record.reason),
        )
        if status is not Status.REFUNDED:
            alarm(Alarm.REFUND_OF_UNSOLD_ORDER, order_id=order.order_id, status=status.value)
            return False
        reach("refund:after_finish", record.order_id)
        await self._ledger.finish_refund(
            record, status="done", code=None, now_ms=self._clock.now_ms()
        )
        return True

    async def _money_back(self, order: Reservation, record: RefundRecord) -> bool:
        payment_key = order.payment_key or ""
        answer = await self._conclude.cancel_at_pg(
            order.order_id,
            payment_key,
            record.reason,
            account=await self._account_of(order, record),
            after_refusals=True,
        )
        if isinstance(answer, Declined):
            alarm(Alarm.REFUND_REFUSED, order_id=order.order_id, code=answer.code)
            await self._ledger.finish_refund(
                record, status="refused", code=answer.code, now_ms=self._clock.now_ms()
            )
            raise NotRefundable(
                "The payment provider refuses the refund.", providerCode=answer.code
            )
        if not isinstance(answer, Answered):
            # A cancel of ours may have gone through: only a look at the payment tells.
            answer = await self._gateway.look_up(payment_key)
            await self._conclude.remember(order.order_id, payment_key, AnswerKind.LOOK_UP, answer)
        if not isinstance(answer, Answered) or answer.payment.order_id != order.order_id:
            return False
        await self._conclude.keep_payment(answer.payment)
        return (
            answer.payment.status in (PaymentStatus.CANCELED, PaymentStatus.PARTIAL_CANCELED)
            and answer.payment.balance_amount == 0
        )

    async def _account_of(self, order: Reservation, record: RefundRecord) -> RefundAccount | None:
        """Where a deposit goes back to; the PG refuses an account for what was paid otherwise."""
        if record.account_json is None or await self._method_of(order) not in (
            VIRTUAL_ACCOUNT,
            None,
        ):
            return None
        return msgspec.json.decode(record.account_json, type=RefundAccount)
