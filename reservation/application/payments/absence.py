"""Proof that no money of a payment can come, if the PG does not have the payment.

A 404 alone proves nothing: a faulty PG returns it, and an API key of another merchant gets it.
"""

from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.application.payments.gateway_health import GatewayHealth
from reservation.application.payments.resolve import AnswerKind, PaymentResolver
from reservation.application.payments.systems import PaymentSystems, PaymentUseCase
from reservation.domain.payment_gateway import (
    Answered,
    PaymentMissing,
    PaymentStatus,
)

__all__ = ["Absence", "AbsentPayment"]

log = structlog.get_logger(__name__)

#: No money now, and no confirm of ours that could bring it.
_WITHOUT_MONEY: Final = frozenset(
    {
        PaymentStatus.READY,
        PaymentStatus.IN_PROGRESS,
        PaymentStatus.EXPIRED,
        PaymentStatus.ABORTED,
        PaymentStatus.CANCELED,
    }
)


class AbsentPayment(msgspec.Struct, frozen=True):
    """A payment that the PG does not show as the payment of its order."""

    #: Of the order that requested it.
    order_id: str
    payment_key: str
    #: Another payment of the order may have money: its own attempt decides it.
    may_be_paid_otherwise: bool = False
    #: The PG has shown the payment before. A 404 then needs another payment of ours that the PG
    #: shows: else the API key may be another merchant's by now.
    was_shown: bool = False


class Absence(PaymentUseCase):
    """Collects the proof."""

    def __init__(
        self,
        systems: PaymentSystems,
        resolver: PaymentResolver,
        health: GatewayHealth,
    ) -> None:
        super().__init__(systems)
        self._resolver = resolver
        self._health = health

    async def is_proven(self, absent: AbsentPayment) -> bool:
        """Whether 404s prove that no money can come; see `shows_no_money`.

        They must be some time apart with no other answer in between, by key and by order, and from
        a PG that shows our other payments to this API key.
        """
        try:
            since_ms = await self._sql.payments.missing_since(absent.order_id, absent.payment_key)
        except (SQLAlchemyError, OSError) as error:
            log.warning("absence_check_failed", order_id=absent.order_id, reason=str(error))
            return False
        apart_ms = self._limits.missing_apart_seconds * 1000
        if since_ms is None or self._clock.now_ms() - since_ms < apart_ms:
            return False
        return await self.shows_no_money(absent)

    async def shows_no_money(self, absent: AbsentPayment) -> bool:
        """Whether the PG shows no payment of this order that has or may get money."""
        order_id, payment_key = absent.order_id, absent.payment_key
        answer = await self._gateway.look_up_order(order_id)
        await self._resolver.remember(order_id, payment_key, AnswerKind.LOOK_UP_ORDER, answer)
        match answer:
            case PaymentMissing():
                return await self._health.sees_own_payments(needs_canary=absent.was_shown)
            case Answered(payment):
                # Another payment window that the buyer opened: no confirm of it was ever sent.
                return (
                    payment.order_id == order_id
                    and payment.payment_key != payment_key
                    and (absent.may_be_paid_otherwise or payment.status in _WITHOUT_MONEY)
                )
            case _:
                return False
