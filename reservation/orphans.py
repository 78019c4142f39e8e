"""Payments without an order: asked for in the last moments before Redis lost the order itself.

The intent is in SQL before the PG is asked, the order only once it is flushed. What is left of such
an order is a payment that nobody can serve: its money goes back.
"""

from typing import Final

from reservation.conclude import AnswerKind, Conclude
from reservation.domain.alarms import Alarm
from reservation.domain.ids import sale_of
from reservation.domain.states import ENDED
from reservation.metrics import alarm
from reservation.payments.gateway import Answered, PaymentGateway, PaymentStatus
from reservation.persistence.ledger import Ledger
from reservation.persistence.recovery import UnmetIntent
from reservation.redis.store import Store

__all__ = ["Orphans"]

#: A payment that will not take money any more, or has given it back.
_OVER: Final = (PaymentStatus.CANCELED, PaymentStatus.ABORTED, PaymentStatus.EXPIRED)


#: Orders read at once.
PAGE: Final = 500


class Orphans:
    """Finds them and gives their money back."""

    def __init__(
        self, store: Store, ledger: Ledger, gateway: PaymentGateway, conclude: Conclude
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._gateway = gateway
        self._conclude = conclude

    async def of(self, sale_id: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Look after the sale's payments whose order neither SQL nor Redis has."""
        return await self.look_after(await self._without_order(sale_id))

    async def _without_order(self, sale_id: str) -> list[UnmetIntent]:
        """Intents that no order will follow: it is gone, or has ended and the claim is not in it.

        A claim is in Redis before its intent is in SQL, so a fence below it means a lost claim.
        """
        unmet = await self._ledger.unmet_intents(sale_id)
        without: list[UnmetIntent] = []
        for start in range(0, len(unmet), PAGE):
            page = unmet[start : start + PAGE]
            found = await self._store.read_many([intent.order_id for intent in page])
            without += [
                intent
                for intent, order in zip(page, found, strict=True)
                if order is None or (order.status in ENDED and order.fence < intent.fence)
            ]
        return without

    async def look_after(
        self, intents: list[UnmetIntent]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Give back money that came for what is gone; who got it, and what cannot be told yet."""
        given_back: list[str] = []
        undecided: list[str] = []
        for intent in intents:
            match await self._give_back(intent):
                case True:
                    given_back.append(intent.order_id)
                case None:
                    undecided.append(intent.order_id)
                    alarm(Alarm.PAYMENT_WITHOUT_ORDER, order_id=intent.order_id)
                case False:
                    pass
        return tuple(given_back), tuple(undecided)

    async def _give_back(self, intent: UnmetIntent) -> bool | None:
        """Whether money was given back; None where the PG cannot tell yet."""
        order_id, payment_key = intent.order_id, intent.payment_key
        kept = await self._ledger.payment_by_key(payment_key)
        if kept is not None and kept.status in _OVER:
            return False
        answer = await self._gateway.look_up(payment_key)
        await self._conclude.remember(order_id, payment_key, AnswerKind.LOOK_UP, answer)
        if not isinstance(answer, Answered) or answer.payment.order_id != order_id:
            return None
        if answer.payment.status in _OVER:
            await self._conclude.keep_payment(answer.payment)
            return False
        if answer.payment.status != PaymentStatus.DONE:
            return None
        # The buyer's own key makes the same order again: it must not be sold for this payment.
        sale_id = sale_of(order_id) or ""
        if not await self._conclude.bar(order_id, sale_id, intent.fence, payment_key):
            return None
        cancelled = await self._conclude.cancel_at_pg(
            order_id, payment_key, "the reservation was lost"
        )
        if isinstance(cancelled, Answered) and cancelled.payment.balance_amount == 0:
            await self._conclude.keep_payment(cancelled.payment)
            return True
        return None
