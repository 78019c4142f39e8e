"""Recheck: polls payments whose webhook may never come.

- An ended attempt, by a refusal or by silence: after 15 minutes, and a day later.
- An open virtual account: every ten minutes at first, then hourly, until it is paid or lapses.
- A payment whose webhook exceeded a rate limit: a moment later.
- A failed cancel: after a minute, then with back-off, until the PG shows the refund.

Only a lookup that the PG has answered counts. While its sale is closed a payment stays listed:
until the rebuild Redis may have the order in an older state, in which the payment changes nothing.
"""

from typing import Final

import msgspec
import structlog

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.sql.payments import PaymentCheck
from reservation.application.payments.follow_up import FollowUp
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.domain.alarms import Alarm
from reservation.domain.errors import ReservationError, SaleRecovering
from reservation.domain.ids import sale_of
from reservation.domain.payment_gateway import (
    OPEN_PAYMENT,
    Answer,
    Answered,
    PaymentMissing,
    PaymentStatus,
)
from reservation.domain.states import Status
from reservation.telemetry.metrics import alarm

__all__ = ["Recheck"]

log = structlog.get_logger(__name__)

#: Payments of one round: a round runs every few seconds, within the PG's own rate limits.
ROUND_MAX: Final = 20
_MINUTE_MS: Final = 60_000
#: Lease of one check, its cancel included; another worker may take the payment afterwards.
TAKEN_MS: Final = 3 * _MINUTE_MS
#: Checks of an open account in its first hour, then one per hour.
FIRST_CHECKS: Final = 6
#: Checks, hourly at last, of a payment without an order in Redis, which a rebuild may restore, and
#: of a sold order's payment that the PG does not show as its own.
MISSING_CHECKS_MAX: Final = 48
#: Transient failures.
_TRANSIENT: Final = (ReservationError, StoreUnavailable, StoreUncertain, OSError)
#: Orders whose payment the PG has shown as theirs.
_SOLD: Final = (Status.AWAITING_DEPOSIT, Status.CONFIRMED)

_HAS_MONEY: Final = (PaymentStatus.DONE, PaymentStatus.PARTIAL_CANCELED)


class _Next(msgspec.Struct, frozen=True):
    """The next check of a payment, and the number of its answered lookups."""

    pause_ms: int
    looks: int


class Recheck(PaymentUseCase):
    """Works the list of payments to recheck."""

    def __init__(
        self,
        systems: PaymentSystems,
        follow_up: FollowUp,
    ) -> None:
        super().__init__(systems)
        self._follow_up = follow_up

    async def run_once(self) -> int:
        """Check the due payments; how many were checked.

        Raises:
            SQLAlchemyError: SQL is down.
        """
        now_ms, checked = self._clock.now_ms(), 0
        for due in await self._sql.payments.list_due_checks(now_ms, ROUND_MAX):
            check = await self._sql.payments.lease_check(due, self._clock.now_ms() + TAKEN_MS)
            if check is None:
                continue
            checked += 1
            try:
                following = await self._check(check)
            except _TRANSIENT as error:
                log.info("recheck_deferred", order_id=check.order_id, reason=str(error))
                continue
            if following is None:
                await self._sql.payments.remove_check(check)
            else:
                due_at_ms = self._clock.now_ms() + following.pause_ms
                await self._sql.payments.reschedule_check(check, due_at_ms, following.looks)
        return checked

    async def _check(self, check: PaymentCheck) -> _Next | None:
        """Check once; None if the payment needs no further check.

        Raises:
            SaleRecovering: its sale is closed, or was closed meanwhile.
        """
        sale_id = sale_of(check.order_id) or ""
        await self._catalog.fresh(sale_id)
        following = await self._next(check)
        if following is None and sale_id in self._catalog.closed:
            raise SaleRecovering
        return following

    async def _next(self, check: PaymentCheck) -> _Next | None:
        order = await self._store.read(check.order_id)
        if order is not None and order.status is Status.CONFIRMING:
            return _Next(15 * _MINUTE_MS, check.looks)
        answer = await self._gateway.look_up(check.payment_key)
        if not isinstance(answer, Answered | PaymentMissing):
            return _Next(5 * _MINUTE_MS, check.looks)
        looks = check.looks + 1
        if order is None:
            return await self._of_missing(check, answer)
        back_off = _Next(min(60, 2**check.looks) * _MINUTE_MS, looks)
        owns = order.payment_key == check.payment_key
        if isinstance(answer, Answered) and _is_of(check, answer):
            if not await self._follow_up.follow(order, answer, is_listed=True):
                return back_off
            order = await self._store.read(check.order_id) or order
        elif owns and order.status in _SOLD:
            # The order's own payment: the PG's answer is wrong.
            if check.looks < MISSING_CHECKS_MAX:
                return back_off
        elif isinstance(answer, Answered) and check.looks < MISSING_CHECKS_MAX:
            # An answer about another payment says nothing of this one.
            return back_off
        elif await self._had_money(check):
            return back_off
        if order.status is Status.AWAITING_DEPOSIT and owns:
            share = 1 if check.looks < FIRST_CHECKS else FIRST_CHECKS
            return _Next(round(self._limits.deposit_check_seconds * 1000) * share, looks)
        if order.status is Status.CONFIRMED and owns:
            return None
        return _Next(24 * 60 * _MINUTE_MS, looks) if check.looks == 0 else None

    async def _had_money(self, check: PaymentCheck) -> bool:
        """Whether the PG showed money in this payment when it last showed it."""
        payment = await self._sql.payments.get(check.payment_key)
        return payment is not None and payment.status in _HAS_MONEY and payment.balance_amount > 0

    async def _of_missing(self, check: PaymentCheck, answer: Answer) -> _Next | None:
        """The next check of a payment whose order Redis lacks; money is never left unlisted."""
        following = _Next(60 * _MINUTE_MS, check.looks + 1)
        if isinstance(answer, Answered) and _is_of(check, answer):
            payment = answer.payment
            if payment.status in OPEN_PAYMENT and payment.balance_amount:
                alarm(Alarm.PAYMENT_WITHOUT_ORDER, order_id=check.order_id)
                return following
        elif await self._had_money(check):
            return following
        return following if check.looks < MISSING_CHECKS_MAX else None


def _is_of(check: PaymentCheck, answer: Answered) -> bool:
    """Whether the PG shows the requested payment."""
    shown = (answer.payment.payment_key, answer.payment.order_id)
    return shown == (check.payment_key, check.order_id)
