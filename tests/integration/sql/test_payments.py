"""Sales, payments and refunds as SQL stores them."""

import asyncio
import json
import re
from typing import Any

import msgspec
import pytest
from sqlalchemy.exc import IntegrityError

from reservation.adapters.sql.payments import AnswerRow
from reservation.adapters.sql.refunds import OtherRefund, RefundRecord, RefundReused, RefundWish
from reservation.adapters.sql.store import SqlStore
from reservation.domain.clock import as_datetime
from reservation.domain.payment_gateway import Payment, VirtualAccount
from tests.support.outbox import Tape


async def test_a_sale_is_registered_once_and_keeps_its_epoch(sql: SqlStore) -> None:
    epoch, created = await sql.sales.register("s", '{"name":"first"}', 1)
    assert created
    assert re.fullmatch("[0-9a-f]{16}", epoch)
    assert await sql.sales.register("s", '{"name":"second"}', 2) == (epoch, False)
    row = await sql.sales.get("s")
    assert row is not None
    assert row.document == '{"name":"first"}'
    assert await sql.sales.epochs() == {"s": epoch}
    assert await sql.sales.get("unknown") is None


async def test_concurrent_registrations_create_one_sale(sql: SqlStore) -> None:
    answers = await asyncio.gather(*(sql.sales.register("s", "{}", 1) for _ in range(8)))
    assert len({epoch for epoch, _ in answers}) == 1
    assert [created for _, created in answers].count(True) == 1


def payment(payment_key: str = "k", **changes: Any) -> Payment:
    values: dict[str, Any] = {
        "payment_key": payment_key,
        "order_id": "o",
        "status": "DONE",
        "total_amount": 100,
        "balance_amount": 100,
        "currency": "KRW",
        "method": "카드",
        "approved_at": as_datetime(5),
        "secret": "ps_1",
        "due_at": as_datetime(9),
        "virtual_account": VirtualAccount(bank="20", account_number="X1", holder_name="Kim"),
        **changes,
    }
    return Payment(**values)


async def test_concurrent_payments_share_a_transaction_and_fail_alone(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    transactions = 0
    write = sql.database.write

    def counting() -> Any:
        nonlocal transactions
        transactions += 1
        return write()

    monkeypatch.setattr(sql.database, "write", counting)
    wishes = [payment(f"k-{number}", order_id=f"o-{number}") for number in range(40)]
    answers = [
        {"order_id": f"o-{number}", "payment_key": f"k-{number}", "kind": "confirm"}
        for number in range(40)
    ]
    await asyncio.gather(
        *(sql.payments.put(wish, 10) for wish in wishes),
        *(
            sql.payments.add_answer(AnswerRow(**answer, answer="{}", created_at_ms=1))
            for answer in answers
        ),
    )
    assert transactions <= 3
    found = [await sql.payments.list_by_order(f"o-{number}") for number in range(40)]
    assert [[row.payment_key for row in rows] for rows in found] == [
        [wish.payment_key] for wish in wishes
    ]
    bad = payment("bad", order_id="o-bad", total_amount=-1)
    outcomes = await asyncio.gather(
        *(sql.payments.put(wish, 10) for wish in (payment("a"), bad, payment("b"))),
        return_exceptions=True,
    )
    assert outcomes[0] is None
    assert outcomes[2] is None
    assert isinstance(outcomes[1], IntegrityError)
    assert await sql.payments.list_by_order("o-bad") == []


async def test_a_payment_is_stored_as_last_shown(sql: SqlStore) -> None:
    await sql.payments.put(payment(), 10)
    absent = dict.fromkeys(("method", "approved_at", "secret", "due_at", "virtual_account"))
    await sql.payments.put(payment(status="CANCELED", balance_amount=0, **absent), 11)
    assert await sql.payments.get("k") == payment(status="CANCELED", balance_amount=0)
    account = VirtualAccount(
        bank="20", account_number="X1", holder_name="Kim", refund_status="PENDING"
    )
    refunding = payment(status="CANCELED", balance_amount=0, virtual_account=account)
    await sql.payments.put(refunding, 12)
    assert await sql.payments.get("k") == refunding
    assert await sql.payments.get("unknown") is None


async def test_a_payment_without_an_account_is_read_without_one(sql: SqlStore) -> None:
    card = payment(virtual_account=None, secret=None, due_at=None)
    await sql.payments.put(card, 10)
    assert await sql.payments.get("k") == card
    assert await sql.payments.list_by_order("o") == [card]


async def test_an_older_or_foreign_answer_changes_no_payment(sql: SqlStore) -> None:
    await sql.payments.put(payment(), 10)
    await sql.payments.put(payment(status="READY"), 9)
    await sql.payments.put(payment(order_id="thief", status="CANCELED"), 20)
    assert await sql.payments.get("k") == payment()
    assert await sql.payments.list_by_order("thief") == []


async def test_payments_of_an_order_are_sorted_by_their_newest_answer(sql: SqlStore) -> None:
    assert await sql.payments.list_by_order("o") == []
    await sql.payments.put(payment("paid"), 20)
    await sql.payments.put(payment("first", approved_at=None, status="ABORTED"), 30)
    await sql.payments.put(payment("other", order_id="p"), 40)
    assert [row.payment_key for row in await sql.payments.list_by_order("o")] == ["first", "paid"]


async def test_answers_bound_to_their_key_are_counted(sql: SqlStore) -> None:
    bound = json.dumps(
        {"type": "Unknown", "reason": "x", "bound_to_key": True}, separators=(",", ":")
    )
    free = bound.replace("true", "false")
    quoted = json.dumps({"type": "Unknown", "reason": bound}, separators=(",", ":"))
    for payment_key, kind, answer in (
        ("k", "confirm", bound),
        ("k", "confirm", bound),
        ("k", "confirm", free),
        ("k", "confirm", quoted),
        ("k", "confirm", bound.replace("bound_to_key", "boundXtoXkey")),
        ("k", "look_up", bound),
        ("other", "confirm", bound),
    ):
        await sql.payments.add_answer(
            AnswerRow(
                order_id="o", payment_key=payment_key, kind=kind, answer=answer, created_at_ms=1
            )
        )
    assert await sql.payments.count_bound_confirms("o", "k") == 2
    assert await sql.payments.count_bound_confirms("o", "other") == 1
    assert await sql.payments.count_bound_confirms("p", "k") == 0


async def test_each_cancel_key_is_counted_once(sql: SqlStore) -> None:
    def answer_json(kind: str, **members: Any) -> str:
        return json.dumps({"type": kind, **members}, separators=(",", ":"))

    broken_off = answer_json("Unknown", reason="400 PROVIDER_ERROR", bound_to_key=True)
    for kind, answer in (
        ("cancel", broken_off),
        ("cancel", broken_off),
        (
            "cancel",
            answer_json("Unknown", reason="400 PROVIDER_ERROR", bound_to_key=True, attempt=1),
        ),
        ("cancel", answer_json("PaymentMissing", code="NOT_FOUND_PAYMENT", attempt=2)),
        ("cancel", answer_json("Unknown", reason="timeout", bound_to_key=False, attempt=3)),
        (
            "cancel",
            answer_json("Misconfigured", code="UNAUTHORIZED_KEY", bound_to_key=False, attempt=3),
        ),
        ("cancel", answer_json("Declined", code="INVALID_BANK", message="", attempt=3)),
        ("confirm", broken_off.replace("PROVIDER", "OTHER")),
    ):
        await sql.payments.add_answer(
            AnswerRow(order_id="o", payment_key="k", kind=kind, answer=answer, created_at_ms=1)
        )
    assert await sql.payments.count_bound_cancels("o", "k") == 4
    assert await sql.payments.count_bound_cancels("o", "other") == 0


def wish(order_id: str = "o", key: str = "r", **changes: Any) -> RefundWish:
    values = {
        "order_id": order_id,
        "idempotency_key": key,
        "reason": "broken",
        "restock": True,
        "operator": "op",
        "account_json": None,
        "digest": f"digest-{order_id}",
        **changes,
    }
    return RefundWish(**values)


async def begun(sql: SqlStore, now_ms: int = 1, **changes: Any) -> RefundRecord:
    record = await sql.refunds.begin(wish(**changes), now_ms=now_ms)
    assert isinstance(record, RefundRecord)
    return record


async def test_a_repeated_refund_request_gets_the_first_refund(sql: SqlStore) -> None:
    record = await begun(sql)
    assert (record.status, record.reason, record.restock) == ("pending", "broken", True)
    assert await begun(sql, now_ms=2) == record
    assert await begun(sql, key="another", now_ms=3) == record
    assert await sql.refunds.get("o") == record
    assert await sql.refunds.get("p") is None


async def test_a_second_refund_request_is_not_stored(sql: SqlStore) -> None:
    record = await begun(sql)
    other = wish(key="another", restock=False, digest="other")
    assert await sql.refunds.begin(other, now_ms=2) == OtherRefund(record)
    await sql.refunds.finish(record, status="done", code=None, now_ms=3)
    found = await sql.refunds.begin(other, now_ms=4)
    assert isinstance(found, OtherRefund)
    assert (found.existing.status, found.existing.restock) == ("done", True)


async def test_a_refund_is_leased_to_one_process(sql: SqlStore) -> None:
    record = await begun(sql)
    wishes = [{"asks": True, "now_ms": 10, "until_ms": 60 + number} for number in range(6)]
    taken = await asyncio.gather(*(sql.refunds.lease(record, **wish) for wish in wishes))
    (held,) = [lease for lease in taken if lease]
    assert await sql.refunds.lease(record, asks=True, now_ms=59, until_ms=99) is None
    # The lease of a dead process expires, and the outcome of its request is unknown.
    other = await sql.refunds.lease(record, asks=True, now_ms=70, until_ms=130)
    assert other is not None
    assert other.unanswered
    # It wakes up and changes nothing.
    await sql.refunds.release(held, code="late", unanswered=False, now_ms=71)
    assert await sql.refunds.replace(held, wish(key="new", digest="new"), now_ms=71) is None
    await sql.refunds.release(other, code="500 COMMON_ERROR", unanswered=False, now_ms=72)
    existing = await sql.refunds.get("o")
    assert existing is not None
    assert (existing.lease_until_ms, existing.code) == (0, "500 COMMON_ERROR")
    assert not existing.unanswered


async def test_only_the_holder_of_its_lease_ends_a_refund(sql: SqlStore) -> None:
    record = await begun(sql)
    late = await sql.refunds.lease(record, asks=True, now_ms=5, until_ms=50)
    held = await sql.refunds.lease(record, asks=True, now_ms=60, until_ms=110)
    assert late is not None
    assert held is not None
    for status in ("done", "refused"):
        assert not await sql.refunds.finish(late, status=status, code=None, now_ms=61)
    assert await sql.refunds.list_pending(2) == [msgspec.structs.replace(held, unanswered=True)]
    assert await sql.refunds.finish(held, status="done", code=None, now_ms=62)
    # The late process gets the recorded outcome.
    assert await sql.refunds.finish(late, status="done", code=None, now_ms=63)
    assert not await sql.refunds.finish(late, status="refused", code="NO", now_ms=63)
    ended = await sql.refunds.get("o")
    assert ended is not None
    assert (ended.status, ended.updated_at_ms, ended.unanswered) == ("done", 62, False)


async def test_a_rebuild_reopens_the_refunds_of_sold_orders(sql: SqlStore) -> None:
    await sql.sales.register("s", "{}", 1)
    tape = Tape()
    tape.put(a=10)
    for order_id in ("done", "leased", "refused"):
        tape.sell(order_id, a=1)
    tape.prepare("unsold", a=1)
    await sql.events.apply("s", tape.events)
    held: dict[str, RefundRecord] = {}
    for order_id in ("done", "leased", "refused", "unsold"):
        record = await begun(sql, order_id=order_id, key=order_id)
        leased = await sql.refunds.lease(record, asks=True, now_ms=5, until_ms=50)
        assert leased is not None
        held[order_id] = leased
    for order_id, status in (("done", "done"), ("refused", "refused"), ("unsold", "done")):
        assert await sql.refunds.finish(held[order_id], status=status, code=None, now_ms=6)

    await sql.refunds.reopen("s")

    rows = {order_id: await sql.refunds.get(order_id) for order_id in held}
    states = {key: (row.status, row.lease_until_ms) for key, row in rows.items() if row is not None}
    assert states == {
        "done": ("pending", 0),
        "leased": ("pending", 0),
        "refused": ("refused", 0),
        "unsold": ("done", 0),
    }
    # A process that called the PG before the rebuild: its cancel may still be carried out.
    assert not await sql.refunds.finish(held["leased"], status="done", code=None, now_ms=7)
    again = await sql.refunds.lease(held["leased"], asks=True, now_ms=8, until_ms=90)
    assert again is not None
    assert again.unanswered


async def test_a_pending_refund_accepts_a_new_wish_and_keeps_the_old_one(sql: SqlStore) -> None:
    record = await begun(sql, account_json='{"accountNumber":"1"}')
    held = await sql.refunds.lease(record, asks=False, now_ms=5, until_ms=50)
    assert held is not None
    right = wish(key="new", account_json='{"accountNumber":"2"}', digest="new", operator="eve")
    assert await sql.refunds.replace(held, wish("p", digest="new"), now_ms=6) == RefundReused("o")
    replaced = await sql.refunds.replace(held, right, now_ms=6)
    assert isinstance(replaced, RefundRecord)
    assert await sql.refunds.get("o") == replaced
    assert (replaced.operator, replaced.account_json) == ("eve", '{"accountNumber":"2"}')
    (earlier,) = replaced.earlier()
    assert (earlier.operator, earlier.account_json) == ("op", '{"accountNumber":"1"}')
    assert (earlier.status, earlier.created_at_ms, earlier.replaced_at_ms) == ("pending", 1, 6)
    # The replaced request is not continued, even by a process that has read it.
    assert await sql.refunds.lease(record, asks=True, now_ms=99, until_ms=150) is None


async def test_a_cancel_in_flight_bars_another_wish(sql: SqlStore) -> None:
    record = await begun(sql)
    held = await sql.refunds.lease(record, asks=True, now_ms=5, until_ms=50)
    assert held is not None
    assert await sql.refunds.replace(held, wish(key="new", digest="new"), now_ms=6) is None


async def test_refunds_are_listed_a_page_at_a_time(sql: SqlStore) -> None:
    for number in range(5):
        record = await begun(sql, order_id=f"o{number}", key=f"r{number}", now_ms=10 + number)
        if number > 2:
            await sql.refunds.finish(record, status="done", code=None, now_ms=20)
    backlog = await sql.refunds.backlog()
    assert (backlog.count, backlog.oldest_at_ms) == (3, 10)
    for status, wanted in (("pending", "012"), ("done", "43"), ("refused", ""), (None, "43210")):
        found: list[str] = []
        cursor = None
        while True:
            page, cursor = await sql.refunds.page(status=status, cursor=cursor, limit=2)
            found += [row.order_id for row in page]
            if cursor is None:
                break
        assert found == [f"o{number}" for number in wanted]
    with pytest.raises(ValueError, match=r"JSON|base64|pad|array"):
        await sql.refunds.page(cursor="made-up")


async def test_a_refund_key_reused_for_another_wish_is_refused(sql: SqlStore) -> None:
    await begun(sql)
    for changes in ({"digest": "other"}, {"order_id": "p", "digest": "digest-p"}):
        assert await sql.refunds.begin(wish(**changes), now_ms=1) == RefundReused("o")
    assert await sql.refunds.get("p") is None


async def test_only_one_of_concurrent_refunds_is_accepted(sql: SqlStore) -> None:
    records = await asyncio.gather(*(begun(sql, key=f"r-{n}", now_ms=n) for n in range(8)))
    assert len({record.idempotency_key for record in records}) == 1


async def test_pending_refunds_are_listed_oldest_first_until_done(sql: SqlStore) -> None:
    records = {
        order_id: await begun(sql, order_id=order_id, key=order_id, now_ms=10 - number * 2)
        for number, order_id in enumerate(("late", "early", "middle"))
    }
    found = await sql.refunds.list_pending(10)
    assert [row.order_id for row in found] == ["middle", "early", "late"]
    assert [row.order_id for row in await sql.refunds.list_pending(1)] == ["middle"]
    await sql.refunds.finish(records["middle"], status="done", code=None, now_ms=20)
    await sql.refunds.finish(records["early"], status="refused", code="NO", now_ms=20)
    assert [row.order_id for row in await sql.refunds.list_pending(10)] == ["late"]


async def test_a_completed_refund_is_final(sql: SqlStore) -> None:
    first = await begun(sql)
    await sql.refunds.finish(first, status="done", code=None, now_ms=5)
    await sql.refunds.finish(first, status="refused", code="NO", now_ms=6)
    record = await begun(sql, key="another")
    assert (record.status, record.code, record.updated_at_ms) == ("done", None, 5)


async def test_a_refused_refund_can_be_begun_anew(sql: SqlStore) -> None:
    first = await begun(sql)
    await sql.refunds.finish(first, status="refused", code="NO", now_ms=5)
    assert (await begun(sql)).status == "refused"
    account = '{"bank":"88"}'
    again = await begun(sql, key="anew", account_json=account, digest="anew", now_ms=6)
    assert (again.status, again.account_json, again.code) == ("pending", account, None)
    assert await sql.refunds.list_pending(10) == [again]
    # A process that was paused with the first one's answer.
    await sql.refunds.finish(first, status="refused", code="NO", now_ms=6)
    assert await sql.refunds.list_pending(10) == [again]
    await sql.refunds.finish(again, status="done", code=None, now_ms=7)
    assert (await begun(sql, key="anew", digest="anew")).status == "done"


@pytest.mark.parametrize("status", ["paid", ""])
async def test_a_refund_has_no_other_outcome(sql: SqlStore, status: str) -> None:
    record = await begun(sql)
    with pytest.raises(Exception, match="ck_refunds_status"):
        await sql.refunds.finish(record, status=status, code=None, now_ms=5)
