"""Health check of the payment gateway's API key: accepted, and of our own merchant account.

Two failures seem to concern one payment and concern all of them:

- The PG refuses the key (401). If a confirm and the lookup after it are both refused, prepare
  closes under the name `gateway`: holds could not be paid for. It opens once the key is accepted.
- The key is another merchant's: the PG answers 404 for payments that exist. So a 404 counts only
  while this key can see a payment of ours that SQL has as DONE (the canary).
"""

import asyncio
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.sql.store import SqlStore
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.payment_gateway import (
    Answered,
    Misconfigured,
    PaymentGateway,
    PaymentMissing,
)
from reservation.telemetry.metrics import alarm

__all__ = ["GATEWAY", "GatewayHealth"]

log = structlog.get_logger(__name__)

#: The name under which prepare closes.
GATEWAY: Final = "gateway"
#: How long one visible payment of ours vouches for the key. Keys change only with a restart.
SEEN_SECONDS: Final = 60.0
#: Back-off of the canary after it was not visible.
UNSEEN_SECONDS: Final = 30.0
#: Between two probes of a refused key, by a lookup.
PROBE_SECONDS: Final = 5.0
#: A key of the PG's form that no payment has: a 404 for it shows that our API key is accepted.
_NO_PAYMENT: Final = "reservation-probe-0000000000000000"


class GatewayHealth:
    """One process's view of the gateway's API key."""

    def __init__(self, gateway: PaymentGateway, sql: SqlStore, *, clock: Clock) -> None:
        self._gateway = gateway
        self._sql = sql
        self._clock = clock
        self._seen_until = 0.0
        self._unseen_until = 0.0
        self._canary = asyncio.Lock()
        self._refused = False
        self._probe_at = 0.0
        self._probe: asyncio.Task[None] | None = None

    def note_own_payment(self) -> None:
        """Record that the PG showed a payment of ours."""
        self._seen_until = self._clock.monotonic() + SEEN_SECONDS

    def refuse(self) -> None:
        """Record that the PG refused our key at a confirm and at the lookup after it."""
        if not self._refused:
            log.error("gateway_key_refused")
        self._refused = True
        self._probe_at = self._clock.monotonic() + PROBE_SECONDS

    def missing(self) -> tuple[str, ...]:
        """`gateway` while the PG refuses our key; also starts the probe that ends this."""
        if not self._refused:
            return ()
        now = self._clock.monotonic()
        if now >= self._probe_at and (self._probe is None or self._probe.done()):
            self._probe_at = now + PROBE_SECONDS
            self._probe = asyncio.create_task(self._probe_key())
        return (GATEWAY,)

    async def _probe_key(self) -> None:
        match await self._gateway.look_up(_NO_PAYMENT):
            case Answered() | PaymentMissing():
                self._refused = False
                log.info("gateway_key_accepted")
            case answer:
                log.info("gateway_probed", answer=type(answer).__name__)

    async def sees_own_payments(self, *, needs_canary: bool = False) -> bool:
        """Whether a 404 of the PG is credible: this key sees a payment that SQL has as DONE.

        Args:
            needs_canary: false if SQL has no such payment; else true.
        """
        async with self._canary:
            now = self._clock.monotonic()
            if now < self._seen_until:
                return True
            if now < self._unseen_until:
                return False
            seen = await self._check_canary()
            if seen is None:
                return not needs_canary
            if seen:
                self.note_own_payment()
                return True
            self._unseen_until = now + UNSEEN_SECONDS
            return False

    async def _check_canary(self) -> bool | None:
        """Whether the PG shows the newest DONE payment; None if there is none."""
        try:
            payment_key = await self._sql.payments.newest_done()
        except (SQLAlchemyError, OSError) as error:
            log.warning("canary_read_failed", reason=type(error).__name__)
            return False
        if payment_key is None:
            return None
        answer = await self._gateway.look_up(payment_key)
        if isinstance(answer, Answered):
            return answer.payment.payment_key == payment_key
        if isinstance(answer, PaymentMissing | Misconfigured):
            alarm(Alarm.GATEWAY_MISCONFIGURED, canary=payment_key[-4:], code=answer.code)
        return False

    async def aclose(self) -> None:
        """Cancel a probe in flight."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
