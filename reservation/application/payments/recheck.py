"""Recheck: polls payments whose webhook may never come.

- An ended attempt, by a refusal or by silence: after 15 minutes, and a day later.
- An open virtual account: every ten minutes at first, then hourly, until it is paid or lapses.
- A payment whose webhook exceeded a rate limit: a moment later.
- A failed cancel: after a minute, then with back-off, until the PG shows the money given back.
"""

from typing import Final

import structlog

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.sql.payments import PaymentCheck
from reservation.adapters.sql.store import SqlStore
from reservation.application.payments.follow_up import FollowUp
from reservation.domain.clock import Clock
from reservation.domain.errors import ReservationError
from reservation.domain.payment_gateway import Answered, PaymentGateway, PaymentMissing
from reservation.domain.payment_timeouts import DEFAULT_LIMITS, PaymentTimeouts
from reservation.domain.states import Status

__all__ = ["Recheck"]

log = structlog.get_logger(__name__)

#: Payments of one round: a round runs every few seconds, within the PG's own rate limits.
ROUND_MAX: Final = 20
_MINUTE_MS: Final = 60_000
#: Lease of one check, its cancel included; another worker may take the payment afterwards.
TAKEN_MS: Final = 3 * _MINUTE_MS
#: Checks of an open account in its first hour, then one per hour.
FIRST_LOOKS: Final = 6
#: Hourly checks of an order that Redis lacks: a rebuild may restore it.
MISSING_LOOKS_MAX: Final = 48
#: Transient failures.
_PASSING: Final = (ReservationError, StoreUnavailable, StoreUncertain, OSError)


class Recheck:
    """Works the list of payments to recheck."""

    def __init__(
        self,
        store: ReservationStore,
        sql: SqlStore,
        gateway: PaymentGateway,
        follow_up: FollowUp,
        *,
        clock: Clock,
        limits: PaymentTimeouts = DEFAULT_LIMITS,
    ) -> None:
        self._store = store
        self._sql = sql
        self._gateway = gateway
        self._follow_up = follow_up
        self._clock = clock
        self._limits = limits

    async def run_once(self) -> int:
        """Check the due payments; how many were checked.

        Raises:
            SQLAlchemyError: SQL is down.
        """
        now_ms, looked = self._clock.now_ms(), 0
        for due in await self._sql.payments.list_due_checks(now_ms, ROUND_MAX):
            check = await self._sql.payments.lease_check(due, self._clock.now_ms() + TAKEN_MS)
            if check is None:
                continue
            looked += 1
            try:
                pause_ms = await self._look(check)
            except _PASSING as error:
                log.info("recheck_waits", order_id=check.order_id, reason=str(error))
                continue
            if pause_ms is None:
                await self._sql.payments.remove_check(check)
            else:
                due_at_ms = self._clock.now_ms() + pause_ms
                await self._sql.payments.reschedule_check(check, due_at_ms, check.looks + 1)
        return looked

    async def _look(self, check: PaymentCheck) -> int | None:
        """Check once; the pause before the next check in ms, None if there is none."""
        order = await self._store.read(check.order_id)
        if order is None:
            return 60 * _MINUTE_MS if check.looks < MISSING_LOOKS_MAX else None
        if order.status is Status.CONFIRMING:
            return 15 * _MINUTE_MS
        answer = await self._gateway.look_up(check.payment_key)
        if not isinstance(answer, Answered | PaymentMissing):
            return 5 * _MINUTE_MS
        if isinstance(answer, Answered) and answer.payment.order_id == check.order_id:
            if not await self._follow_up.follow(order, answer, is_listed=True):
                return min(60, 2**check.looks) * _MINUTE_MS
            order = await self._store.read(check.order_id) or order
        if order.status is Status.AWAITING_DEPOSIT and order.payment_key == check.payment_key:
            share = 1 if check.looks < FIRST_LOOKS else FIRST_LOOKS
            return round(self._limits.deposit_look_seconds * 1000) * share
        if order.status is Status.CONFIRMED and order.payment_key == check.payment_key:
            return None
        return 24 * 60 * _MINUTE_MS if check.looks == 0 else None
