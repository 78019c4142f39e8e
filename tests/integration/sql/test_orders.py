"""Queries of orders in SQL: pages, an order's history, and the input of a rebuild."""

import json

import pytest

from reservation.adapters.sql.orders import LineRow
from reservation.adapters.sql.payment_intents import Intent
from reservation.adapters.sql.payments import AnswerRow
from reservation.adapters.sql.refunds import RefundRecord, RefundWish
from reservation.adapters.sql.store import SqlStore
from reservation.domain.events import Event
from reservation.domain.states import Status
from tests.support.outbox import START_MS, Tape


async def flushed(sql: SqlStore, tape: Tape) -> list[Event]:
    await sql.sales.register(tape.sale_id, "{}", 1)
    await sql.events.apply(tape.sale_id, tape.events)
    return tape.events


async def all_pages(sql: SqlStore, limit: int, **filters: str) -> list[list[str]]:
    pages: list[list[str]] = []
    cursor: str | None = None
    while True:
        rows, cursor = await sql.orders.page(cursor=cursor, limit=limit, **filters)
        pages.append([row.order_id for row in rows])
        if cursor is None:
            return pages


async def test_an_order_has_all_fields_of_its_events(sql: SqlStore) -> None:
    tape = Tape()
    tape.put(a=10, b=10)
    tape.prepare("o", buyer="ann", b=2, a=1)
    tape.claim("o", fence=3)
    await flushed(sql, tape)
    order = await sql.orders.get("o")
    assert order is not None
    assert order.lines == (
        LineRow(sku="b", quantity=2, price=100),
        LineRow(sku="a", quantity=1, price=100),
    )
    assert (order.status, order.buyer_id, order.sale_id) == ("CONFIRMING", "ann", "s")
    assert (order.amount, order.currency, order.order_name) == (300, "KRW", "A and more")
    assert (order.seq, order.fence, order.payment_key) == (3, 3, "key-o-3")
    assert (order.created_at_ms, order.updated_at_ms) == (START_MS + 2, START_MS + 3)
    assert order.expires_at_ms == START_MS + 60_000
    assert (order.claimed_at_ms, order.lease_until_ms) == (START_MS + 3, START_MS + 75_000)
    assert (order.digest, order.due_at_ms) == ("d" * 32, None)
    assert await sql.orders.get("unknown") is None


async def test_pages_show_each_order_once_newest_first(sql: SqlStore) -> None:
    tape = Tape()
    tape.put(a=100)
    for number in range(25):
        tape.prepare(f"o-{number:02}", a=1)
    await flushed(sql, tape)
    expected = [f"o-{number:02}" for number in reversed(range(25))]
    for limit in (1, 7, 25, 100, 1000):
        pages = await all_pages(sql, limit)
        assert [order_id for page in pages for order_id in page] == expected
        assert all(len(page) == min(limit, 25) for page in pages[:-1])


async def test_orders_of_one_millisecond_appear_once_across_pages(sql: SqlStore) -> None:
    tapes = [Tape(f"sale-{number}") for number in range(7)]
    for number, tape in enumerate(tapes):
        tape.put(a=1)
        tape.prepare(f"{'AbZ_-09'[number]}-order", a=1)
        await flushed(sql, tape)
    pages = await all_pages(sql, 2)
    ids = [order_id for page in pages for order_id in page]
    assert ids == sorted(ids, reverse=True)
    assert len(ids) == 7


async def test_orders_are_found_by_sale_status_and_buyer(sql: SqlStore) -> None:
    tape = Tape()
    tape.put(a=100)
    for number in range(6):
        tape.prepare(f"o-{number}", buyer=f"buyer-{number % 2}", a=1)
    tape.move("released", "o-0", "HELD", "RELEASED", cause="c")
    await flushed(sql, tape)
    other = Tape("other")
    other.put(a=1)
    other.prepare("p", buyer="buyer-0", a=1)
    await flushed(sql, other)
    assert await all_pages(sql, 10, sale_id="other") == [["p"]]
    assert await all_pages(sql, 10, status="RELEASED") == [["o-0"]]
    assert await all_pages(sql, 2, sale_id="s", buyer_id="buyer-0") == [["o-4", "o-2"], ["o-0"]]
    assert await all_pages(sql, 10, sale_id="s", status="HELD", buyer_id="nobody") == [[]]


@pytest.mark.parametrize("cursor", ["x", "e30=", "WyIxIiwxXQ==", "é", "WzEsICJvIl0", "="])
async def test_a_foreign_cursor_is_refused(sql: SqlStore, cursor: str) -> None:
    with pytest.raises(ValueError):
        await sql.orders.page(cursor=cursor)


WISH = RefundWish(
    order_id="o",
    idempotency_key="r",
    reason="broken",
    restock=True,
    operator="op",
    account_json='{"accountNumber":"110"}',
    digest="d",
)


async def test_the_history_lists_each_entry_by_time(sql: SqlStore) -> None:
    tape = Tape()
    tape.put(a=10)
    tape.prepare("o", a=1)
    tape.claim("o")
    await sql.sales.register("s", "{}", 1)
    await sql.intents.add(
        Intent(
            order_id="o",
            sale_id="s",
            fence=1,
            payment_key="key-o-1",
            amount=100,
            currency="KRW",
            idempotency_key="i",
            now_ms=START_MS + 3,
        )
    )
    await sql.intents.void(order_id="o", sale_id="s", fence=2, now_ms=START_MS + 3)
    for answer in ('{"type":"Unknown"}', '{"type":"Answered","cut'):
        await sql.payments.add_answer(
            AnswerRow(
                order_id="o",
                payment_key="key-o-1",
                kind="confirm",
                answer=answer,
                created_at_ms=START_MS + 3,
            )
        )
    tape.confirm("o")
    tape.sell("another", a=1)
    await sql.events.apply("s", tape.events)
    refund = await sql.refunds.begin(WISH, now_ms=START_MS + 5)
    assert isinstance(refund, RefundRecord)
    await sql.refunds.finish(refund, status="done", code=None, now_ms=START_MS + 6)

    history = await sql.orders.history("o")
    assert [(row.kind, row.what) for row in history] == [
        ("event", "prepared"),
        ("event", "claimed"),
        ("intent", "intent"),
        ("intent", "void"),
        ("answer", "confirm"),
        ("answer", "confirm"),
        ("event", "confirmed"),
        ("refund", "begun"),
        ("refund", "done"),
    ]
    facts = [json.loads(row.facts) for row in history]
    assert all(isinstance(fact, dict) for fact in facts)
    assert facts[4]["answer"] == {"type": "Unknown"}
    assert facts[5]["answer"] == '{"type":"Answered","cut'
    assert facts[7] == {"operator": "op", "reason": "broken", "restock": True, "account": True}
    assert await sql.orders.history("unknown") == []
    assert await sql.orders.history("") == []


async def test_the_audit_of_a_sale_unknown_to_sql_reads_no_rows(sql: SqlStore) -> None:
    assert await sql.sales.counters("s") is None
    assert await sql.events.cursor("s") == (0, "")
    await sql.sales.register("s", "{}", 1)
    fold = await sql.sales.counters("s")
    assert fold is not None
    assert (fold.flushed_seq, fold.chain, fold.skus) == (0, "", {})


async def test_a_rebuild_reads_live_orders_and_buyer_counts(sql: SqlStore) -> None:
    tape = Tape()
    tape.put(a=100, b=100)
    tape.prepare("s-held", buyer="ann", a=2, b=1)
    tape.sell("s-sold", buyer="ann", a=1)
    tape.prepare("s-unheld", buyer="ann", to="PREPARED", a=5)
    tape.prepare("s-ended", buyer="bob", a=1)
    tape.move("expired", "s-ended", "HELD", "EXPIRED", cause="deadline")
    tape.prepare("s-confirming", buyer="bob", b=1)
    tape.claim("s-confirming")
    await flushed(sql, tape)

    live = await sql.orders.scan("s")
    assert [row.order_id for row in live] == ["s-confirming", "s-held", "s-unheld"]
    first = await sql.orders.scan("s", limit=2)
    rest = await sql.orders.scan("s", after=first[-1].order_id, limit=2)
    assert [*first, *rest] == live
    sold = await sql.orders.scan("s", statuses={Status.CONFIRMED, Status.EXPIRED})
    assert [row.order_id for row in sold] == ["s-ended", "s-sold"]
    counts = {"ann": {"a": 3, "b": 1, ":paid": 1}, "bob": {"b": 1}}
    assert await sql.orders.count_by_buyer("s", ["ann", "bob", "none"]) == counts
    assert await sql.orders.count_by_buyer("s", ["bob"]) == {"bob": {"b": 1}}
    assert await sql.orders.count_by_buyer("unknown", ["ann"]) == {}
    assert await sql.orders.scan("unknown") == []


async def test_the_pages_of_a_sale_have_its_orders_and_no_others(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id of one sale may be the beginning of another's."""
    monkeypatch.setattr("reservation.adapters.sql.orders.PAGE_IDS", 2)
    for sale_id in ("s", "s-t", "s.t", "r"):
        tape = Tape(sale_id)
        tape.put(a=100)
        for number in range(5):
            tape.prepare(f"{sale_id}-{number}", buyer=f"buyer-{number}", a=1)
        tape.move("released", f"{sale_id}-0", "HELD", "RELEASED", cause="buyer")
        await flushed(sql, tape)
    pages = [page async for page in sql.orders.pages_with_buyers("s")]
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [one for page in pages for one in page] == [(f"s-{n}", f"buyer-{n}") for n in range(5)]
    assert [page async for page in sql.orders.pages_with_buyers("unknown")] == []


async def test_events_are_read_in_order_from_a_given_seq(sql: SqlStore) -> None:
    tape = Tape()
    tape.put(a=100)
    for number in range(9):
        tape.prepare(f"o-{number}", a=1)
    await flushed(sql, tape)
    assert await sql.events.list_after("s", 0, 4) == tape.events[:4]
    assert await sql.events.list_after("s", 4, 100) == tape.events[4:]
    assert await sql.events.list_after("s", 10, 100) == []
