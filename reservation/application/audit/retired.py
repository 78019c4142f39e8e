"""Audit of a retired sale: compares its counters, orders and events in SQL."""

from typing import Final

from reservation.adapters.sql.sales import ItemRow, SkuFold
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.counters import AuditReport, SkuAudit
from reservation.domain.clock import Clock
from reservation.domain.errors import Unavailable
from reservation.domain.events import chain_of

__all__ = ["RetiredAudit"]

#: Events read at once: a reply of about 3 MB.
PAGE_EVENTS: Final = 5_000
#: Number of comparisons of a sale whose orders change meanwhile.
ROUNDS_MAX: Final = 5


class RetiredAudit:
    """Audits sales that only SQL has."""

    def __init__(self, sql: SqlStore, *, clock: Clock) -> None:
        self._sql = sql
        self._clock = clock

    async def compare(self, sale_id: str) -> AuditReport | None:
        """Check one sale; None if it is not retired.

        Raises:
            Unavailable: an order of the sale changed during each comparison.
        """
        row = await self._sql.sales.get(sale_id)
        if row is None or row.retired_at_ms is None:
            return None
        for _ in range(ROUNDS_MAX):
            head = await self._sql.events.cursor(sale_id)
            report = await self._compare(sale_id)
            if report.ok or await self._sql.events.cursor(sale_id) == head:
                return report
            # An order changed between two reads.
        raise Unavailable(retryAfter=1)

    async def _compare(self, sale_id: str) -> AuditReport:
        items = await self._sql.sales.list_items(sale_id)
        fold = await self._sql.sales.counters(sale_id)
        problems: list[str] = []
        rows: list[SkuAudit] = []
        for sku, item in items.items():
            counted = fold.skus.get(sku) if fold else None
            wrong = _differences(item, counted)
            problems += wrong
            rows.append(
                SkuAudit(
                    sku=sku,
                    total=item.total,
                    available=item.available,
                    held=item.held,
                    confirming=counted.confirming if counted else 0,
                    sold=item.sold,
                    ok=not wrong,
                )
            )
        problems += await self._broken_chain(sale_id)
        return AuditReport(
            ok=not problems,
            checked_at_ms=self._clock.now_ms(),
            lag=0,
            skus=tuple(rows),
            problems=tuple(problems),
        )

    async def _broken_chain(self, sale_id: str) -> list[str]:
        """The first event that does not follow the one before it."""
        last_seq, last_chain = await self._sql.events.cursor(sale_id)
        purged = await self._sql.purges.get(sale_id)
        # A purge leaves gaps before it.
        seq, chain = (purged.seq, purged.chain) if purged is not None else (0, "")
        while page := await self._sql.events.list_after(sale_id, seq, PAGE_EVENTS):
            for event in page:
                expected = chain_of(
                    chain,
                    seq=event.seq,
                    event=event.event,
                    order_id=event.order_id,
                    at_ms=event.at_ms,
                    data=event.data,
                )
                if event.seq != seq + 1 or event.chain != expected:
                    return [f"the hash chain breaks at event {event.seq}"]
                seq, chain = event.seq, event.chain
        if (seq, chain) != (last_seq, last_chain):
            return [f"the events end at {seq}, the sale's cursor at {last_seq}"]
        return []


def _differences(item: ItemRow, counted: SkuFold | None) -> list[str]:
    """The counters of an item that differ from its orders."""
    found = [
        f"{item.sku}: {name} is {value}, {expected} by the orders"
        for name, value, expected in (
            ("held", item.held, counted.held if counted else 0),
            ("sold", item.sold, counted.sold if counted else 0),
        )
        if value != expected
    ]
    if item.total != item.available + item.held + item.sold:
        found.append(
            f"{item.sku}: {item.total} is not {item.available} + {item.held} + {item.sold}"
        )
    return found
