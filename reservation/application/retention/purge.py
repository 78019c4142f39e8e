"""Purge: removes from SQL the rows that a sale no longer needs long after its retirement.

    check     retired for at least the configured days, and nothing of it in progress
    record    the purge begins, with the operator and the reason
    remove    in small transactions, so that live sales are not delayed
    record    all was removed, with the number of rows

It may be interrupted anywhere and repeated.
"""

from typing import Final

import msgspec
import structlog

from reservation.adapters.sql.purges import PurgeCounts, PurgeRow
from reservation.adapters.sql.store import SqlStore
from reservation.domain.clock import Clock
from reservation.domain.errors import SaleNotFound

__all__ = ["Purge", "PurgeReport"]

log = structlog.get_logger(__name__)

_DAY_MS: Final = 86_400_000


class PurgeReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result for one sale: the removed rows, or the reason why all of them stay."""

    sale_id: str
    refusal: str = ""
    orders: int = 0
    events: int = 0
    movements: int = 0
    answers: int = 0


class Purge:
    """Purges retired sales."""

    def __init__(self, sql: SqlStore, *, days: int, clock: Clock) -> None:
        self._sql = sql
        self._days = days
        self._clock = clock

    async def due(self) -> list[str]:
        """The sales that were retired long enough ago, and are not purged yet."""
        return await self._sql.purges.list_due(self._before_ms())

    async def preview(self, sale_id: str) -> PurgeReport:
        """The rows that a purge would remove now; changes nothing.

        Raises:
            SaleNotFound: there is no such sale.
        """
        row = await self._sql.sales.get(sale_id)
        if row is None:
            raise SaleNotFound
        if row.retired_at_ms is None:
            return PurgeReport(sale_id=sale_id, refusal="the sale is not retired")
        if row.retired_at_ms >= self._before_ms():
            return PurgeReport(sale_id=sale_id, refusal="the sale was retired too recently")
        if (obstacle := await self._sql.purges.obstacle(sale_id)) is not None:
            return PurgeReport(sale_id=sale_id, refusal=obstacle)
        return _report(sale_id, await self._sql.purges.count(sale_id))

    async def run(self, sale_id: str, *, operator: str, reason: str) -> PurgeReport:
        """Purge one sale; a purged one stays as it is.

        Raises:
            SaleNotFound: there is no such sale.
        """
        if await self._sql.sales.get(sale_id) is None:
            raise SaleNotFound
        done = await self._sql.purges.get(sale_id)
        if done is not None and done.done_at_ms is not None:
            return _report(sale_id, done)
        refusal = await self._sql.purges.begin(
            sale_id,
            retired_before_ms=self._before_ms(),
            operator=operator,
            reason=reason,
            now_ms=self._clock.now_ms(),
        )
        if refusal is not None:
            return PurgeReport(sale_id=sale_id, refusal=refusal)
        unpaid: str | None = ""
        while unpaid is not None:
            unpaid = await self._sql.purges.remove_unpaid(sale_id, unpaid)
        seq: int | None = 0
        while seq is not None:
            seq = await self._sql.purges.remove_movements(sale_id, seq)
        answered: str | None = ""
        while answered is not None:
            answered = await self._sql.purges.remove_answers(sale_id, answered)
        row = await self._sql.purges.finish(sale_id, self._clock.now_ms())
        report = _report(sale_id, row)
        log.info("sale_purged", operator=operator, reason=reason, **msgspec.structs.asdict(report))
        return report

    def _before_ms(self) -> int:
        return self._clock.now_ms() - self._days * _DAY_MS


def _report(sale_id: str, counts: PurgeCounts | PurgeRow) -> PurgeReport:
    return PurgeReport(
        sale_id=sale_id,
        orders=counts.orders,
        events=counts.events,
        movements=counts.movements,
        answers=counts.answers,
    )
