"""What the PG's webhooks lead to: nothing in them is believed but the ids, and the PG is asked."""

import hmac
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.catalog import Catalog
from reservation.conclude import Case, Conclude
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.errors import Unavailable
from reservation.domain.ids import sale_of
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.rate import Limiter, Rate
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.judge import Asked
from reservation.metrics import WEBHOOKS, alarm
from reservation.payments.gateway import (
    Answered,
    Payment,
    PaymentGateway,
    PaymentMissing,
    PaymentStatus,
)
from reservation.persistence.ledger import Ledger
from reservation.redis.store import Store
from reservation.settle import Settle

__all__ = ["Webhook"]

log = structlog.get_logger(__name__)

#: Look-ups that webhooks may cause: for one order, and in one process. A storm of forged ones must
#: not turn us into a hammer on the PG. What is skipped, the PG tells again.
LOOK_UPS_PER_ORDER: Final = Rate(count=5, per_seconds=60)
LOOK_UPS_ALL: Final = Rate(count=50, per_seconds=1)
#: Orders that Redis does not have and SQL is asked for. A count of their own: names that somebody
#: made up must not use up what orders that are there need.
LOST_ALL: Final = Rate(count=20, per_seconds=1)


class Webhook:
    """Brings an order in line with what the PG shows of its payment."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        ledger: Ledger,
        gateway: PaymentGateway,
        conclude: Conclude,
        settle: Settle,
        *,
        clock: Clock,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._ledger = ledger
        self._gateway = gateway
        self._conclude = conclude
        self._settle = settle
        self._clock = clock
        self._per_order = Limiter(LOOK_UPS_PER_ORDER)
        self._all = Limiter(LOOK_UPS_ALL)
        self._lost = Limiter(LOST_ALL)

    async def __call__(
        self, order_id: str, payment_key: str | None, *, secret: str | None = None
    ) -> None:
        """Look at one order that a webhook names; harmless however often and late it comes.

        Args:
            order_id: as the body names it.
            payment_key: likewise; a deposit's webhook has none.
            secret: of a deposit's webhook: only the PG knows it beside us.

        Raises:
            Unavailable: it could not be acted on now; the PG sends what is not answered 200 again.
        """
        if sale_of(order_id) is None:
            return
        order = await self._store.read(order_id)
        if order is None:
            await self._refuse_while_lost(order_id)
            return
        WEBHOOKS.inc()
        key = payment_key or order.payment_key
        if key is None:
            return
        if order.status is Status.CONFIRMING:
            # Whoever has the lease decides; where nobody has, this does it a little sooner.
            await self._settle(order_id)
            return
        now = self._clock.monotonic()
        if self._per_order.wait(order_id, now) or self._all.wait("", now):
            log.info("webhook_look_up_skipped", order_id=order_id)
            if order.status is Status.CONFIRMED and secret is None:
                # Nearly all are of this kind, and tell what the confirm has told before.
                return
            raise Unavailable("Too many at once; send this again.")
        if secret is not None and not await self._is_secret_of(order_id, secret):
            log.warning("webhook_forged", order_id=order_id)
            return
        answer = await self._gateway.look_up(key)
        if isinstance(answer, Answered) and answer.payment.payment_key == key:
            if answer.payment.order_id == order_id:
                await self._bring_in_line(order, answer)
                return
        elif not isinstance(answer, PaymentMissing):
            # Nobody else looks at an order that has ended, so the PG has to tell again.
            raise Unavailable("The payment could not be looked up; send this again.")
        if key == order.payment_key:
            # With a key that is not ours a webhook is forged; with our own the PG is mistaken.
            raise Unavailable("The payment is not the one it was; send this again.")

    async def _refuse_while_lost(self, order_id: str) -> None:
        """Have the PG tell again what a Redis that lost the order cannot be told now."""
        if self._lost.wait("", self._clock.monotonic()):
            raise Unavailable("Too many at once; send this again.")
        try:
            lost = await self._ledger.order(order_id)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("The order could not be looked up; send this again.") from error
        if lost is not None:
            raise Unavailable("The order is being restored; send this again.")

    async def _is_secret_of(self, order_id: str, secret: str) -> bool:
        try:
            payment = await self._ledger.payment_of(order_id)
        except (SQLAlchemyError, OSError) as error:
            raise Unavailable("The payment could not be looked up; send this again.") from error
        if payment is None or payment.secret is None:
            # Never shown to us: the look-up alone decides, as for every other webhook.
            return True
        return hmac.compare_digest(payment.secret.encode(), secret.encode())

    async def _bring_in_line(self, order: Reservation, answer: Answered) -> None:
        payment = answer.payment
        known = await self._catalog.get(order.sale_id)
        case = Case(order, known, order.fence, payment.payment_key)
        ours = payment.payment_key == order.payment_key
        match order.status:
            case Status.AWAITING_DEPOSIT if ours:
                await self._decide(case, answer)
            case Status.CONFIRMED if ours:
                await self._confirmed(case, payment, answer)
            case Status.CONFIRMED | Status.AWAITING_DEPOSIT:
                # A second payment of a paid order: nobody confirmed it here.
                if payment.status == PaymentStatus.DONE:
                    alarm(Alarm.SECOND_PAYMENT, order_id=order.order_id)
            case Status.RELEASED | Status.EXPIRED:
                await self._ended(case, payment, answer)
            case _:
                pass

    async def _decide(self, case: Case, answer: Answered) -> None:
        """Whoever paid into an account would wait for its due date otherwise, which is days away.

        Raises:
            Unavailable: it is still open: SQL did not take it, or the PG contradicts itself.
        """
        if await self._conclude(case, answer, Asked.LOOK_UP) is None:
            raise Unavailable("The payment is not decided yet; send this again.")

    async def _ended(self, case: Case, payment: Payment, answer: Answered) -> None:
        """Money that came after the end goes back, however often that has to be tried."""
        outcome = Outcome(
            name=PaymentOutcome.REFUNDED,
            reason=Reason(Cause.PAID_AFTER_END),
            members={"restock": True},
        )
        if payment.status == PaymentStatus.DONE:
            if await self._conclude.cancel(case, outcome, "money came after the end") is None:
                raise Unavailable("The payment is not given back yet; send this again.")
        elif payment.status == PaymentStatus.CANCELED and payment.approved_at is not None:
            # A cancel of ours whose answer was lost.
            await self._conclude.finish(case, outcome, answer)

    async def _confirmed(self, case: Case, payment: Payment, answer: Answered) -> None:
        match payment.status:
            case PaymentStatus.WAITING_FOR_DEPOSIT:
                # The bank took a deposit back after an error of its own.
                await self._decide(case, answer)
            case PaymentStatus.CANCELED:
                # By someone else, or by a refund of ours on its way, which finishes by itself.
                refund = await self._ledger.refund_of(case.order.order_id)
                if refund is None or refund.status == "refused":
                    alarm(Alarm.CANCELLED_AT_THE_PG, order_id=case.order.order_id)
            case _:
                pass
