"""Judgement on a run: the history checker, the books, the audit, and no work left undone."""

from collections.abc import Iterable
from typing import Any

from reservation.bootstrap import Service
from reservation.verification.balance_check import books_of, disagreements, unsettled
from reservation.verification.export import recorded
from reservation.verification.model.checker import HistoryChecker
from reservation.verification.model.history_format import End, History, MoneyLine, Operation
from reservation.verification.model.report import Judgement

__all__ = ["problems_of", "witnessed"]

#: Violations that are reported in full.
PROBLEMS_MAX = 10


async def witnessed(
    service: Service,
    sale_id: str,
    operations: Iterable[Operation],
    entries: list[dict[str, Any]],
) -> Judgement:
    """The model's judgement on every answer."""
    checker, line = HistoryChecker(), 0
    past = recorded(
        sale_id,
        sales=service.sale_store,
        sql=service.sql,
        outbox=service.outbox,
        clock=service.clock,
    )
    async for record in past:
        if isinstance(record, End):
            for entry in entries:
                line += 1
                checker.add(line, _money(sale_id, entry))
            record.money = True
        line += 1
        checker.add(line, record)
        if isinstance(record, History):
            for operation in operations:
                line += 1
                checker.add(line, operation)
    return checker.finish()


def _money(sale_id: str, entry: dict[str, Any]) -> MoneyLine:
    return MoneyLine(
        sale=sale_id, order=entry["orderId"], entry=entry["kind"], amount=entry["amount"]
    )


def problems_of(
    sale_id: str,
    judgement: Judgement,
    *,
    audit: dict[str, Any],
    orders: list[dict[str, Any]],
    entries: list[dict[str, Any]],
) -> list[str]:
    """All findings; empty if there are none."""
    books = books_of(sale_id, audit=audit, orders=orders, entries=entries)
    found = [*disagreements(books), *unsettled(books)]
    found += [f"{one.name}: {one.reason}" for one in judgement.violations[:PROBLEMS_MAX]]
    undone = [order for order in orders if order["status"] not in _ENDS]
    found += [f"{order['orderId']} is still {order['status']}" for order in undone]
    if judgement.undecided:
        found.append(f"{judgement.undecided} payments are undecided")
    return found


_ENDS = {"CONFIRMED", "RELEASED", "EXPIRED", "REFUNDED"}
