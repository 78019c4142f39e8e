"""The audit: what must agree in Redis, in SQL and with the PG, and what does not by name."""

import msgspec

from reservation.audit.counters import AuditReport, CounterAudit, SkuAudit
from reservation.audit.orders import OrderAudit

__all__ = ["Audit", "AuditReport", "SkuAudit"]


class Audit:
    """Checks sales: the counters and the chain, then every order and buyer."""

    def __init__(self, counters: CounterAudit, orders: OrderAudit) -> None:
        self._counters = counters
        self._orders = orders

    async def __call__(self, sale_id: str) -> AuditReport:
        """Check one sale.

        Raises:
            SaleNotFound: neither Redis nor SQL knows it.
            Unavailable: the outbox was trimmed under the audit's feet each time.
        """
        report = await self._counters(sale_id)
        if not report.skus:
            return report
        problems = (*report.problems, *await self._orders(sale_id))
        return msgspec.structs.replace(report, ok=not problems, problems=problems)
