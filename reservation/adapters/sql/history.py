"""The rows of an order's history, from what SQL has of the order."""

from collections.abc import Iterable
from typing import Any

import msgspec

from reservation.adapters.sql.order_requests import OrderRequest
from reservation.adapters.sql.payment_intents import IntentRow
from reservation.adapters.sql.payments import AnswerRow
from reservation.adapters.sql.refunds import EarlierWish, RefundRecord, RefundWish
from reservation.domain.events import Event

__all__ = ["HistoryRow", "timeline"]


class HistoryRow(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of an order's history."""

    at_ms: int
    #: event, intent, answer, refund or request.
    kind: str
    #: The event's name; `intent`, `void` or `cancel`; the operation that was answered; the refund's
    #: status; `release` or `resolve`, and `ended`.
    what: str
    #: A JSON object with unmasked payment keys and secrets: every view must mask them.
    facts: str


def timeline(
    events: Iterable[Event],
    intents: Iterable[IntentRow],
    cancels: Iterable[tuple[int, str]],
    answers: Iterable[AnswerRow],
    refund: RefundRecord | None,
    requests: Iterable[OrderRequest] = (),
) -> list[HistoryRow]:
    """The rows of one order in time order; those of one millisecond stay in causal order.

    Args:
        events: the order's.
        intents: its intents and voids.
        cancels: its intended cancels: Unix milliseconds, and the payment key.
        answers: the PG's answers about its payments.
        refund: its refund.
        requests: the requests to end its account, or to look its payment up.
    """
    rows = [
        HistoryRow(at_ms=event.at_ms, kind="event", what=event.event, facts=event.data)
        for event in events
    ]
    rows += [_of_intent(row) for row in intents]
    rows += [
        HistoryRow(
            at_ms=at_ms, kind="intent", what="cancel", facts=_facts({"paymentKey": payment_key})
        )
        for at_ms, payment_key in cancels
    ]
    rows += [
        HistoryRow(
            at_ms=row.created_at_ms,
            kind="answer",
            what=row.kind,
            facts=_facts({"paymentKey": row.payment_key, "answer": _as_json(row.answer)}),
        )
        for row in answers
    ]
    if refund is not None:
        rows += _of_refund(refund)
    for request in requests:
        rows += _of_request(request)
    # The sort is stable.
    return sorted(rows, key=lambda row: row.at_ms)


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


def _of_request(request: OrderRequest) -> list[HistoryRow]:
    by = {"operator": request.operator} if request.operator else {"by": "buyer"}
    why = {"reason": request.reason} if request.reason else {}
    made = HistoryRow(
        at_ms=request.created_at_ms, kind="request", what=request.kind, facts=_facts(by | why)
    )
    if request.ended_at_ms is None:
        return [made]
    ended = HistoryRow(
        at_ms=request.ended_at_ms,
        kind="request",
        what="ended",
        facts=_facts({"request": request.kind, "status": request.status, **by}),
    )
    return [made, ended]


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
