"""Audit: reconciliation of Redis, SQL and the PG; every mismatch is named."""

from typing import Final

import msgspec

from reservation.application.audit.counters import AuditReport, CounterAudit, SkuAudit
from reservation.application.audit.orders import OrderAudit
from reservation.application.audit.records import RecordAudit
from reservation.application.audit.retired import RetiredAudit
from reservation.application.audit.tombstones import TombstoneAudit
from reservation.domain.clock import Clock
from reservation.domain.errors import BrokenInvariant

__all__ = ["Audit", "AuditReport", "SkuAudit"]

#: Errors of reading a hash that no script wrote: a manual edit or a disk error.
_UNREADABLE: Final = (BrokenInvariant, KeyError, ValueError, msgspec.MsgspecError)


class Audit:
    """Checks sales: each record, then the counters and the chain, then orders and buyers."""

    def __init__(
        self,
        counters: CounterAudit,
        orders: OrderAudit,
        records: RecordAudit,
        tombstones: TombstoneAudit,
        retired: RetiredAudit,
        *,
        clock: Clock,
    ) -> None:
        self._retired = retired
        self._counters = counters
        self._orders = orders
        self._records = records
        self._tombstones = tombstones
        self._clock = clock

    async def run(self, sale_id: str) -> AuditReport:
        """Check one sale.

        Raises:
            SaleNotFound: neither Redis nor SQL has it.
            Unavailable: the outbox was trimmed during every attempt.
        """
        retired = await self._retired.compare(sale_id)
        if retired is not None:
            problems = (*retired.problems, *await self._orders.compare_money(sale_id))
            return msgspec.structs.replace(retired, ok=not problems, problems=problems)
        unreadable: tuple[str, ...] = ()
        try:
            report = await self._counters.compare(sale_id)
            if not report.skus:
                return report
            problems = (*report.problems, *await self._orders.compare(sale_id))
        except _UNREADABLE as error:
            # The record audit names the key; the rest of the sale cannot be audited.
            unreadable = (f"the sale's data in Redis is unreadable: {error!r}",)
            report, problems = self._nothing(), ()
        records = await self._records.compare(sale_id)
        tombstones = await self._tombstones.compare(sale_id)
        problems = (*unreadable, *problems, *records, *tombstones)
        return msgspec.structs.replace(report, ok=not problems, problems=problems)

    def _nothing(self) -> AuditReport:
        return AuditReport(
            ok=False, checked_at_ms=self._clock.now_ms(), lag=0, skus=(), problems=()
        )
