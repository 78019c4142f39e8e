"""Refunder: resumes pending refunds, several at once."""

import asyncio
from typing import Final

import structlog

from reservation.adapters.sql.refunds import RefundRecord
from reservation.adapters.sql.store import SqlStore
from reservation.application.payments.refunds import RefundService
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.domain.payment_timeouts import DEFAULT_LIMITS, PaymentTimeouts
from reservation.telemetry.metrics import PENDING_REFUNDS, PENDING_REFUNDS_AGE, alarm
from reservation.workers.loops import TRANSIENT
from reservation.workers.pauses import Pauses

__all__ = ["Refunder"]

log = structlog.get_logger(__name__)

#: Refunds in flight. A quarter of the gateway's connections for lookups and cancels, which
#: undecided payments need as well.
AT_ONCE: Final = 16
#: Refunds that one round names in an alarm, oldest first: the gauge counts the rest.
WARNED_MAX: Final = 20
#: How long a round waits for the refunds in flight. A cancel that hangs delays no other refund.
ROUND_SECONDS: Final = 1.0
_MINUTE_MS: Final = 60_000


class Refunder:
    """Resumes pending refunds, each in its own task."""

    def __init__(
        self,
        sql: SqlStore,
        refund: RefundService,
        *,
        clock: Clock,
        limits: PaymentTimeouts = DEFAULT_LIMITS,
    ) -> None:
        self._sql = sql
        self._refunds = refund
        self._clock = clock
        self._alarm_ms = round(limits.alarm_seconds * 1000)
        self._pauses = Pauses(clock, limits.pause_least_seconds, limits.pause_most_seconds)
        self._running: dict[str, asyncio.Task[bool]] = {}

    async def run_once(self, *, start: bool = True) -> int:
        """Start due refunds while slots are free; how many finished meanwhile.

        Args:
            start: whether this worker starts refunds, and not another one.

        Raises:
            Exception: the error of the first damaged refund, after all the others.
        """
        await self._measure()
        free = AT_ONCE - len(self._running)
        if free and start:
            found = await self._sql.refunds.list_pending(AT_ONCE + len(self._pauses))
            records = {record.order_id: record for record in found}
            self._warn(found)
            for order_id in self._pauses.take(list(records), free, busy=self._running):
                self._running[order_id] = asyncio.create_task(self._resume(records[order_id]))
        if self._running:
            await asyncio.wait(self._running.values(), timeout=ROUND_SECONDS)
        return self._ended()

    async def aclose(self) -> None:
        """Cancel the refunds in flight: the next worker resumes them."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _measure(self) -> None:
        backlog = await self._sql.refunds.backlog()
        age_ms = self._clock.now_ms() - backlog.oldest_at_ms if backlog.oldest_at_ms else 0
        PENDING_REFUNDS.set(backlog.count)
        PENDING_REFUNDS_AGE.set(max(0, age_ms) / 1000)

    def _warn(self, found: list[RefundRecord]) -> None:
        """Raise the alarm for each refund that has been pending too long."""
        now_ms = self._clock.now_ms()
        for record in found[:WARNED_MAX]:
            age_ms = now_ms - record.created_at_ms
            if age_ms >= self._alarm_ms:
                alarm(
                    Alarm.REFUND_PENDING,
                    order_id=record.order_id,
                    minutes=age_ms // _MINUTE_MS,
                    code=record.code,
                )

    def _ended(self) -> int:
        done = [order_id for order_id, task in self._running.items() if task.done()]
        tasks = [self._running.pop(order_id) for order_id in done]
        errors = [error for task in tasks if (error := task.exception())]
        if errors:
            raise errors[0]
        return sum(task.result() for task in tasks)

    async def _resume(self, record: RefundRecord) -> bool:
        try:
            return await self._refunds.resume(record)
        except TRANSIENT as error:
            log.warning("refund_deferred", order_id=record.order_id, reason=str(error))
            return False
        except Exception:
            log.exception("refund_crashed", order_id=record.order_id)
            raise
