"""An order's history, and a sale's counters computed from its orders."""

from collections.abc import Collection
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, Row, Select, case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql.bulk import among
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.orders import HistoryRow
from reservation.adapters.sql.payment_intents import IntentRow
from reservation.adapters.sql.refunds import EarlierWish, RefundRecord, RefundWish
from reservation.adapters.sql.tables import (
    cursors,
    events,
    items,
    order_lines,
    orders,
    payment_answers,
    payment_attempts,
    payment_intents,
    refunds,
)
from reservation.domain.states import HOLDING, Status

__all__ = ["SaleFold", "SkuFold", "fold", "history"]

#: Rows of each kind in one history: five attempts, polled every second at first, need far fewer.
HISTORY_MAX: Final = 2_000


class SkuFold(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of one item; `confirming` is part of `held`."""

    total: int
    available: int
    held: int
    confirming: int
    sold: int


class SaleFold(msgspec.Struct, frozen=True, kw_only=True):
    """A sale's counters in SQL, from one snapshot."""

    flushed_seq: int
    chain: str
    skus: dict[str, SkuFold]


async def fold(database: Database, sale_id: str) -> SaleFold | None:
    """The sale's counters up to its last written event; None where SQL does not know the sale.

    Held and sold are counted from the orders, total and available come from the items'
    rows: an error in either one breaks the sum.
    """
    async with database.snapshot() as connection:
        cursor = (
            await connection.execute(
                select(cursors.c.flushed_seq, cursors.c.flushed_chain).where(
                    cursors.c.sale_id == sale_id
                )
            )
        ).one_or_none()
        if cursor is None:
            return None
        known = (
            await connection.execute(
                select(items.c.sku, items.c.total, items.c.available).where(
                    items.c.sale_id == sale_id
                )
            )
        ).all()
        counted = {row.sku: row for row in await connection.execute(_counted(sale_id))}
    skus = {
        row.sku: SkuFold(total=row.total, available=row.available, **_units(counted.get(row.sku)))
        for row in known
    }
    return SaleFold(flushed_seq=cursor.flushed_seq, chain=cursor.flushed_chain, skus=skus)


def _units(row: Row[str, int, int, int] | None) -> dict[str, int]:
    # PostgreSQL's sum of a BIGINT is a Decimal.
    return {
        name: int(getattr(row, name)) if row is not None else 0
        for name in ("held", "confirming", "sold")
    }


def _counted(sale_id: str) -> Select[str, int, int, int]:
    def units(name: str, *statuses: Status) -> ColumnElement[int]:
        wanted = orders.c.status.in_(sorted(statuses))
        return func.sum(case((wanted, order_lines.c.quantity), else_=0)).label(name)

    return (
        select(
            order_lines.c.sku,
            units("held", *HOLDING),
            units("confirming", Status.CONFIRMING),
            units("sold", Status.CONFIRMED),
        )
        .join(orders, orders.c.order_id == order_lines.c.order_id)
        .where(
            orders.c.sale_id == sale_id, orders.c.status.in_(sorted({*HOLDING, Status.CONFIRMED}))
        )
        .group_by(order_lines.c.sku)
    )


async def history(database: Database, order_id: str) -> list[HistoryRow]:
    """An order's events, intents, answers of the PG and refund, in time order."""
    async with database.snapshot() as connection:
        happened = (
            await connection.execute(
                select(events.c.at_ms, events.c.event, events.c.data)
                .where(events.c.order_id == order_id, events.c.order_id != "")
                .order_by(events.c.seq)
                .limit(HISTORY_MAX)
            )
        ).all()
        intents = await connection.execute(
            select(*(payment_intents.c[name] for name in IntentRow.__struct_fields__))
            .where(payment_intents.c.order_id == order_id)
            .order_by(payment_intents.c.fence)
            .limit(HISTORY_MAX)
        )
        intended = [IntentRow(**row) for row in intents.mappings()]
        answered = (
            await connection.execute(
                select(payment_answers)
                .where(payment_answers.c.order_id == order_id)
                .order_by(payment_answers.c.answer_id)
                .limit(HISTORY_MAX)
            )
        ).all()
        keys = {row.payment_key for row in [*intended, *answered] if row.payment_key}
        cancelled = await _cancelled(connection, keys)
        refund = (
            (
                await connection.execute(
                    select(*(refunds.c[name] for name in RefundRecord.__struct_fields__)).where(
                        refunds.c.order_id == order_id
                    )
                )
            )
            .mappings()
            .one_or_none()
        )
    rows = [
        HistoryRow(at_ms=at_ms, kind="event", what=name, facts=data)
        for at_ms, name, data in happened
    ]
    rows += [_of_intent(row) for row in intended]
    rows += cancelled
    rows += [
        HistoryRow(
            at_ms=row.created_at_ms,
            kind="answer",
            what=row.kind,
            facts=_facts({"paymentKey": row.payment_key, "answer": _as_json(row.answer)}),
        )
        for row in answered
    ]
    if refund is not None:
        rows += _of_refund(RefundRecord(**refund))
    # Rows of one millisecond stay in causal order: the sort is stable.
    return sorted(rows, key=lambda row: row.at_ms)


async def _cancelled(connection: AsyncConnection, keys: Collection[str]) -> list[HistoryRow]:
    """Those of these payments with an intended cancel, and since when."""
    found = await connection.execute(
        select(payment_attempts).where(
            among(connection, payment_attempts.c.payment_key, keys),
            payment_attempts.c.cancel_intended_at_ms.is_not(None),
        )
    )
    return [
        HistoryRow(
            at_ms=row.cancel_intended_at_ms,
            kind="intent",
            what="cancel",
            facts=_facts({"paymentKey": row.payment_key}),
        )
        for row in found
    ]


def _of_intent(row: IntentRow) -> HistoryRow:
    facts: dict[str, Any] = {"fence": row.fence}
    if row.kind == "intent":
        facts |= {
            "paymentKey": row.payment_key,
            "amount": row.amount,
            "currency": row.currency,
            "idempotencyKey": row.idempotency_key,
        }
    return HistoryRow(at_ms=row.created_at_ms, kind="intent", what=row.kind, facts=_facts(facts))


def _of_refund(record: RefundRecord) -> list[HistoryRow]:
    wishes: list[HistoryRow] = []
    for wish in record.earlier():
        ended = {"status": wish.status} | ({"code": wish.code} if wish.code else {})
        wishes += [
            _begun(wish, wish.created_at_ms),
            HistoryRow(
                at_ms=wish.replaced_at_ms, kind="refund", what="replaced", facts=_facts(ended)
            ),
        ]
    wishes.append(_begun(record, record.created_at_ms))
    if record.status == "pending":
        return wishes
    ended = HistoryRow(
        at_ms=record.updated_at_ms,
        kind="refund",
        what=record.status,
        facts=_facts({"code": record.code} if record.code else {}),
    )
    return [*wishes, ended]


def _begun(wish: RefundWish | EarlierWish, at_ms: int) -> HistoryRow:
    asked = {
        "operator": wish.operator,
        "reason": wish.reason,
        "restock": wish.restock,
        "account": wish.account_json is not None,
    }
    return HistoryRow(at_ms=at_ms, kind="refund", what="begun", facts=_facts(asked))


def _facts(facts: dict[str, Any]) -> str:
    return msgspec.json.encode(facts).decode()


def _as_json(answer: str) -> Any:
    """The answer as JSON, or as text where it was truncated."""
    try:
        return msgspec.json.decode(answer)
    except msgspec.DecodeError:
        return answer
