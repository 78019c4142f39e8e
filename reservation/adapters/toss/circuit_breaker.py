"""Circuit breakers for the PG: while it does not respond, calls fail fast.

Confirms and look-ups have separate breakers, so that look-ups still work while the PG's confirms
hang. An open breaker sends nothing, and its answer says that.
"""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, TypeVar

import structlog
from purgatory import AsyncCircuitBreakerFactory
from purgatory.domain.model import OpenedState

from reservation.domain.payment_gateway import (
    Answer,
    GatewayLimits,
    PaymentGateway,
    RefundAccount,
    TransactionList,
    TransactionPage,
    TryAgain,
    Unknown,
)

__all__ = ["GuardedGateway"]

log = structlog.get_logger(__name__)

#: Consecutive unanswered calls that open the breaker. A single slow card company must not open it,
#: so the threshold is above a chance run of failures.
FAILURES_MAX: Final = 20
#: How long the breaker stays open before one trial call: short, because buyers wait.
OPEN_SECONDS: Final = 2.0


_AnswerT = TypeVar("_AnswerT", bound=Answer | TransactionPage)


class _Unanswered(Exception):
    """Carries an unknown outcome through the breaker, which counts exceptions."""

    def __init__(self, answer: Unknown) -> None:
        super().__init__()
        self.answer = answer


class GuardedGateway(PaymentGateway):
    """A gateway behind circuit breakers."""

    def __init__(self, gateway: PaymentGateway) -> None:
        self._gateway = gateway
        self._breakers = AsyncCircuitBreakerFactory(
            default_threshold=FAILURES_MAX, default_ttl=OPEN_SECONDS
        )

    @property
    def limits(self) -> GatewayLimits:
        return self._gateway.limits

    async def confirm(
        self, *, payment_key: str, order_id: str, amount: int, idempotency_key: str
    ) -> Answer:
        return await self._guard(
            "confirm",
            lambda: self._gateway.confirm(
                payment_key=payment_key,
                order_id=order_id,
                amount=amount,
                idempotency_key=idempotency_key,
            ),
        )

    async def look_up(self, payment_key: str) -> Answer:
        return await self._guard("look_up", lambda: self._gateway.look_up(payment_key))

    async def look_up_order(self, order_id: str) -> Answer:
        return await self._guard("look_up", lambda: self._gateway.look_up_order(order_id))

    async def cancel(
        self,
        *,
        payment_key: str,
        reason: str,
        idempotency_key: str,
        refund_account: RefundAccount | None = None,
    ) -> Answer:
        return await self._guard(
            "cancel",
            lambda: self._gateway.cancel(
                payment_key=payment_key,
                reason=reason,
                idempotency_key=idempotency_key,
                refund_account=refund_account,
            ),
        )

    async def aclose(self) -> None:
        await self._gateway.aclose()

    async def _guard(
        self, name: str, ask: Callable[[], Awaitable[_AnswerT]]
    ) -> _AnswerT | Unknown | TryAgain:
        breaker = await self._breakers.get_breaker(name)
        try:
            async with breaker:
                answer = await ask()
                # A response bound to the idempotency key is an answer, even where the outcome is
                # unknown; only other Unknowns count as failures.
                if isinstance(answer, Unknown) and not answer.bound_to_key:
                    raise _Unanswered(answer)
                return answer
        except _Unanswered as unanswered:
            return unanswered.answer
        except OpenedState:
            log.info("gateway_circuit_opened", call=name)
            return TryAgain(code="GATEWAY_LEFT_ALONE")


class GuardedListingGateway(GuardedGateway, TransactionList):
    """A gateway behind circuit breakers that also lists its transactions."""

    def __init__(self, gateway: PaymentGateway, transactions: TransactionList) -> None:
        super().__init__(gateway)
        self._transactions = transactions

    async def list_transactions(
        self, *, since: datetime, until: datetime, after: str
    ) -> TransactionPage | Answer:
        return await self._guard(
            "list",
            lambda: self._transactions.list_transactions(since=since, until=until, after=after),
        )
