"""Webhooks of the PG: only their ids are trusted, and the PG is queried for the payment.

Anyone can post a webhook, so lookups have separate rate limits: for the payment of a paid order,
for attempts that the order or SQL has, and for any other key. No confirm of ours is sent without
its attempt, so the last kind is nearly always forged and gets the lowest limit. Over a limit a
known payment is put on the worker's list in SQL (`reservation.application.payments.recheck`); any
other webhook is answered 503, so that the PG sends it again.
"""

import hmac
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.application.payments.confirm import PaymentConfirmation
from reservation.application.payments.follow_up import FollowUp
from reservation.application.payments.settle import PaymentSettlement
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.application.readiness.clock_skew import EXPIRE_OFFSET_MS_MAX
from reservation.application.readiness.conditions import CLOCK_MS_MAX
from reservation.application.reservations.acknowledged_reads import AcknowledgedReads
from reservation.domain.errors import Unavailable
from reservation.domain.ids import sale_of
from reservation.domain.payment_gateway import (
    CANCELLED_PAYMENT,
    Answered,
    PaymentMissing,
    PaymentStatus,
)
from reservation.domain.rate_limit import Limiter, Rate
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.telemetry.log_rate_limit import LogRateLimit
from reservation.telemetry.metrics import WEBHOOKS

__all__ = ["PaymentNotifications"]

log = structlog.get_logger(__name__)

_forged: Final = LogRateLimit(1)
#: Rate limits of lookups by webhooks: of each kind for one order, and in one process. No kind can
#: starve another.
LOOK_UPS_PER_ORDER: Final = Rate(count=5, per_seconds=60)
LOOK_UPS_PAID: Final = Rate(count=50, per_seconds=1)
LOOK_UPS_TRIED: Final = Rate(count=10, per_seconds=1)
LOOK_UPS_UNKNOWN: Final = Rate(count=2, per_seconds=1)
#: Rate limit of SQL queries for an order, or a payment key, that Redis does not have.
SQL_ALL: Final = Rate(count=50, per_seconds=1)
#: Delay before the recheck of a payment whose webhook exceeded a limit.
LATER_MS: Final = 15_000
#: How far the clocks of two processes may differ: this one's, which is ready near that of Redis,
#: and a worker's, which raises `worker_clock` beyond its own limit. Neither the clock of Redis nor
#: the PG's is read here.
CLOCKS_MS: Final = CLOCK_MS_MAX + EXPIRE_OFFSET_MS_MAX
#: Scheduled rechecks that one process remembers.
SCHEDULED_MAX: Final = 10_000
_UNACKNOWLEDGED: Final = "Too few replicas have the order's state; retry the webhook."
_RESTORED_SOON: Final = "The order is being restored; retry the webhook."
#: Orders whose payment the PG has shown as theirs.
_PAID: Final = (Status.CONFIRMED, Status.AWAITING_DEPOSIT, Status.REFUNDED)


class _Budget:
    """The rate limits of one kind of lookup."""

    def __init__(self, rate: Rate) -> None:
        self.all = Limiter(rate)
        self.per_order = Limiter(LOOK_UPS_PER_ORDER)


class PaymentNotifications(PaymentUseCase):
    """Handles the payments that webhooks name."""

    def __init__(
        self,
        systems: PaymentSystems,
        confirmation: PaymentConfirmation,
        follow_up: FollowUp,
        settlement: PaymentSettlement,
    ) -> None:
        super().__init__(systems)
        self._reads = AcknowledgedReads(systems.catalog, systems.store, systems.sql)
        self._confirmation = confirmation
        self._follow_up = follow_up
        self._settlement = settlement
        self._paid, self._tried = _Budget(LOOK_UPS_PAID), _Budget(LOOK_UPS_TRIED)
        self._unknown = _Budget(LOOK_UPS_UNKNOWN)
        self._sql_rate = Limiter(SQL_ALL)
        self._later = Limiter(SQL_ALL)
        self._acked = Limiter(LOOK_UPS_PER_ORDER)
        #: Payment key -> the due time of its recheck.
        self._scheduled: dict[str, int] = {}

    async def receive(
        self,
        order_id: str,
        payment_key: str | None,
        *,
        secret: str | None = None,
        status: str | None = None,
    ) -> None:
        """Handle one webhook; idempotent, and safe at any time.

        Args:
            order_id: from the body.
            payment_key: from the body; a deposit's webhook has none.
            secret: of a deposit's webhook, shared only with the PG.
            status: from the body. DONE changes nothing for a payment that sold the order; for one
                that is being confirmed, only a cancel changes anything.

        Raises:
            Unavailable: it could not be handled now, or too few replicas have its outcome; the PG
                retries a webhook not answered 200.
        """
        if not await self._handle(order_id, payment_key, secret=secret, status=status):
            return
        if self._store.requires_acks:
            await self._acknowledge(order_id)

    async def _acknowledge(self, order_id: str) -> None:
        """Check the state in which the webhook changed nothing: a failover must not lose it.

        Raises:
            Unavailable: it may be lost, or the order has had too many webhooks.
        """
        if self._acked.wait(order_id, self._clock.monotonic()):
            raise Unavailable("Too many webhooks of one order; retry the webhook.")
        try:
            order = await self._store.read(order_id)
            if order is not None:
                await self._reads.state(order)
        except (StoreUnavailable, StoreUncertain) as error:
            raise Unavailable(_UNACKNOWLEDGED) from error

    async def _handle(
        self, order_id: str, payment_key: str | None, *, secret: str | None, status: str | None
    ) -> bool:
        """Handle the webhook; returns whether it is about an order of ours."""
        sale_id = sale_of(order_id)
        if sale_id is None:
            return False
        if self._is_being_decided(sale_id, order_id, payment_key, status):
            WEBHOOKS.inc()
            return False
        order = None
        if not self._catalog.is_retired(sale_id):
            order = await self._store.read_in_redis(order_id)
        if order is None:
            self._count_sql()
            order = await self._store.read(order_id)
        if order is None:
            await self._refuse_while_lost(order_id, payment_key)
            return False
        WEBHOOKS.inc()
        if order.sale_id in self._catalog.closed:
            # Redis may have an older state of it, in which the webhook changes nothing.
            raise Unavailable(_RESTORED_SOON)
        key = await self._key_of(order, payment_key, secret)
        if key is None:
            return False
        if order.status is Status.CONFIRMING:
            await self._of_confirming(order, key, status)
            return True
        is_order_payment = key == order.payment_key
        if is_order_payment and order.status is Status.CONFIRMED and status == PaymentStatus.DONE:
            return True
        budget = await self._budget_of(order, key)
        if budget is self._unknown and order.status in (Status.HELD, Status.PREPARED):
            # The buyer returns with this key, or the hold ends and the PG's next webhook counts.
            return True
        if not self._within_limits(order_id, budget):
            await self._schedule_recheck(order_id, key, budget)
            return True
        await self._reconcile(order, key)
        return True

    def _is_being_decided(
        self, sale_id: str, order_id: str, payment_key: str | None, status: str | None
    ) -> bool:
        """Whether this process is confirming the payment that the webhook reports as done.

        The PG's answer to the confirm, or a lookup by the settler, decides the payment.
        """
        return (
            status == PaymentStatus.DONE
            and payment_key is not None
            and sale_id not in self._catalog.closed
            and self._confirmation.is_requested(order_id, payment_key)
        )

    async def _key_of(
        self, order: Reservation, payment_key: str | None, secret: str | None
    ) -> str | None:
        """The payment that a webhook is about; None if there is none, or if the secret is wrong.

        A deposit's webhook names its payment by the secret alone, and an order may have had another
        account before.
        """
        key = payment_key or order.payment_key
        if secret is None:
            return key
        self._count_sql()
        try:
            payments = await self._sql.payments.list_by_order(order.order_id)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("The payment look-up failed; retry the webhook.") from error
        secrets = {row.payment_key: row.secret for row in payments if row.secret is not None}
        for of_payment, known in secrets.items():
            if hmac.compare_digest(known.encode(), secret.encode()):
                return of_payment
        if key is None or key not in secrets:
            # The PG never showed us one: the lookup alone decides, as for every other webhook.
            return key
        left_out = _forged.should_suppress()
        if left_out is not None:
            log.warning("webhook_forged", order_id=order.order_id, left_out=left_out)
        return None

    async def _of_confirming(
        self, order: Reservation, payment_key: str, status: str | None
    ) -> None:
        """Settle the payment, unless another process has its lease; keep what that one may miss.

        Raises:
            Unavailable: neither was possible.
        """
        if payment_key != order.payment_key:
            # Another payment of the order: it can be followed once this one is decided.
            budget = await self._budget_of(order, payment_key)
            await self._schedule_recheck(order.order_id, payment_key, budget)
            return
        settled = await self._settlement.settle(order.order_id, order=order)
        if settled is None and status in CANCELLED_PAYMENT:
            # The lease holder may have the PG's answer from before the cancel.
            await self._schedule_recheck(order.order_id, payment_key, self._tried)

    async def _budget_of(self, order: Reservation, payment_key: str) -> _Budget:
        if payment_key == order.payment_key:
            return self._paid if order.status in _PAID else self._tried
        if payment_key in order.attempts:
            return self._tried
        if self._sql_rate.wait("", self._clock.monotonic()):
            return self._unknown
        owner = await self._owner_of(payment_key)
        return self._tried if owner == order.order_id else self._unknown

    async def _owner_of(self, payment_key: str) -> str | None:
        try:
            return await self._sql.intents.owner(payment_key)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("The payment look-up failed; retry the webhook.") from error

    def _count_sql(self) -> None:
        if self._sql_rate.wait("", self._clock.monotonic()):
            raise Unavailable("Too many concurrent webhooks; retry the webhook.")

    def _within_limits(self, order_id: str, budget: _Budget) -> bool:
        """Whether the limits allow one more lookup; counts it if so."""
        now = self._clock.monotonic()
        if budget.per_order.peek(order_id, now) or budget.all.peek("", now):
            return False
        budget.per_order.wait(order_id, now)
        budget.all.wait("", now)
        return True

    async def _schedule_recheck(self, order_id: str, payment_key: str, budget: _Budget) -> None:
        """Schedule a recheck of the payment: at most one row per payment.

        Raises:
            Unavailable: the key is not a known attempt, or the limit of writes to SQL is exceeded.
        """
        now_ms = self._clock.now_ms()
        if now_ms < self._scheduled.get(payment_key, 0) - CLOCKS_MS:
            # No worker has begun the scheduled recheck: it covers this webhook as well.
            return
        if budget is self._unknown or self._later.wait("", self._clock.monotonic()):
            raise Unavailable("Too many concurrent webhooks; retry the webhook.")
        if len(self._scheduled) >= SCHEDULED_MAX:
            self._scheduled.clear()
        try:
            self._scheduled[payment_key] = await self._sql.payments.schedule_check(
                payment_key, order_id, now_ms + LATER_MS
            )
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("Too many concurrent webhooks; retry the webhook.") from error
        log.info("webhook_recheck_scheduled", order_id=order_id)

    async def _reconcile(self, order: Reservation, payment_key: str) -> None:
        """Query the PG, and reconcile the order with the payment.

        Raises:
            Unavailable: it must be checked again.
        """
        answer = await self._gateway.look_up(payment_key)
        if isinstance(answer, Answered) and answer.payment.payment_key == payment_key:
            if answer.payment.order_id == order.order_id:
                await self._follow(order, answer)
                return
        elif not isinstance(answer, PaymentMissing):
            raise Unavailable("The payment look-up failed; retry the webhook.")
        if payment_key == order.payment_key:
            # The order's own payment: the PG's answer is wrong.
            raise Unavailable("The payment does not match the stored one; retry the webhook.")

    async def _follow(self, order: Reservation, answer: Answered) -> None:
        try:
            settled = await self._follow_up.follow(order, answer)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("The payment could not be stored; retry the webhook.") from error
        if not settled:
            raise Unavailable("The payment is not settled yet; retry the webhook.")

    async def _refuse_while_lost(self, order_id: str, payment_key: str | None) -> None:
        """Make the PG retry a webhook of an order that Redis lost and SQL still has."""
        try:
            lost = await self._sql.orders.get(order_id) is not None
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("The order look-up failed; retry the webhook.") from error
        if payment_key is not None and await self._owner_of(payment_key) == order_id:
            # The order may have left no event, but its payment was requested. A rebuild restores no
            # order that ended long ago, and the PG sends a webhook for some days only.
            await self._schedule_recheck(order_id, payment_key, self._tried)
            lost = True
        if lost:
            raise Unavailable(_RESTORED_SOON)
