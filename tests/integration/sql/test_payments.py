"""Sales, payments and refunds as SQL stores them."""

import asyncio
import json
import re
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from reservation.adapters.sql.ledger import Ledger
from reservation.adapters.sql.payments import PaymentRow
from reservation.adapters.sql.refunds import OtherRefund, RefundRecord, RefundReused, RefundWish
from reservation.domain.errors import SaleRecovering


async def test_a_sale_is_registered_once_and_keeps_its_epoch(ledger: Ledger) -> None:
    epoch, created = await ledger.register_sale("s", '{"name":"first"}', 1)
    assert created
    assert re.fullmatch("[0-9a-f]{16}", epoch)
    assert await ledger.register_sale("s", '{"name":"second"}', 2) == (epoch, False)
    assert await ledger.sale_document("s") == '{"name":"first"}'
    assert await ledger.known_sales() == {"s": epoch}
    assert await ledger.sale_document("unknown") is None
    assert await ledger.sale("unknown") is None


async def test_of_many_that_register_a_sale_at_once_one_makes_it(ledger: Ledger) -> None:
    answers = await asyncio.gather(*(ledger.register_sale("s", "{}", 1) for _ in range(8)))
    assert len({epoch for epoch, _ in answers}) == 1
    assert [created for _, created in answers].count(True) == 1


async def test_a_rebuild_gives_a_sale_another_epoch(ledger: Ledger) -> None:
    first, _ = await ledger.register_sale("s", "{}", 1)
    await ledger.register_sale("t", "{}", 1)
    await ledger.set_epoch("s", "f" * 16, instead_of=first)
    known = await ledger.known_sales()
    assert known["s"] == "f" * 16 != first
    assert known["t"] != known["s"]
    with pytest.raises(SaleRecovering):
        await ledger.set_epoch("s", "a" * 16, instead_of=first)
    assert await ledger.known_sales() == known


def payment(payment_key: str = "k", **changes: Any) -> PaymentRow:
    values = {
        "payment_key": payment_key,
        "order_id": "o",
        "status": "DONE",
        "total_amount": 100,
        "balance_amount": 100,
        "currency": "KRW",
        "method": "카드",
        "approved_at_ms": 5,
        "secret": "ps_1",
        "due_at_ms": 9,
        "account_bank": "20",
        "account_number": "X1",
        "account_holder": "Kim",
        "updated_at_ms": 10,
        **changes,
    }
    return PaymentRow(**values)


async def test_payments_of_one_moment_share_a_transaction_and_a_bad_one_is_alone(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    transactions = 0
    write = ledger._database.write

    def counting() -> Any:
        nonlocal transactions
        transactions += 1
        return write()

    monkeypatch.setattr(ledger._database, "write", counting)
    wishes = [payment(f"k-{number}", order_id=f"o-{number}") for number in range(40)]
    answers = [
        {"order_id": f"o-{number}", "payment_key": f"k-{number}", "kind": "confirm"}
        for number in range(40)
    ]
    await asyncio.gather(
        *(ledger.put_payment(wish) for wish in wishes),
        *(ledger.record_answer(**answer, answer="{}", now_ms=1) for answer in answers),
    )
    assert transactions <= 3
    found = [await ledger.payment_of(f"o-{number}") for number in range(40)]
    assert [row.payment_key if row else None for row in found] == [w.payment_key for w in wishes]
    bad = payment("bad", order_id="o-bad", total_amount=-1)
    outcomes = await asyncio.gather(
        *(ledger.put_payment(wish) for wish in (payment("a"), bad, payment("b"))),
        return_exceptions=True,
    )
    assert outcomes[0] is None
    assert outcomes[2] is None
    assert isinstance(outcomes[1], IntegrityError)
    assert await ledger.payment_of("o-bad") is None


async def test_a_payment_is_kept_as_it_was_shown_last(ledger: Ledger) -> None:
    await ledger.put_payment(payment())
    await ledger.put_payment(
        payment(
            status="CANCELED",
            balance_amount=0,
            method=None,
            approved_at_ms=None,
            secret=None,
            due_at_ms=None,
            account_bank=None,
            account_number=None,
            account_holder=None,
            updated_at_ms=11,
        )
    )
    row = await ledger.payment_by_key("k")
    assert row is not None
    assert (row.status, row.balance_amount, row.updated_at_ms) == ("CANCELED", 0, 11)
    assert (row.method, row.approved_at_ms, row.secret, row.due_at_ms) == ("카드", 5, "ps_1", 9)
    account = (row.account_bank, row.account_number, row.account_holder)
    assert account == ("20", "X1", "Kim")
    assert await ledger.payment_by_key("unknown") is None


async def test_an_older_answer_or_another_order_changes_no_payment(ledger: Ledger) -> None:
    await ledger.put_payment(payment())
    await ledger.put_payment(payment(status="READY", updated_at_ms=9))
    await ledger.put_payment(payment(order_id="thief", status="CANCELED", updated_at_ms=20))
    row = await ledger.payment_by_key("k")
    assert row is not None
    assert (row.status, row.order_id) == ("DONE", "o")
    assert await ledger.payment_of("thief") is None


async def test_of_an_orders_payments_the_approved_one_is_the_payment(ledger: Ledger) -> None:
    assert await ledger.payment_of("o") is None
    await ledger.put_payment(
        payment("first", approved_at_ms=None, status="ABORTED", updated_at_ms=30)
    )
    await ledger.put_payment(payment("paid", updated_at_ms=20))
    row = await ledger.payment_of("o")
    assert row is not None
    assert row.payment_key == "paid"


async def test_answers_that_stay_bound_to_their_key_are_counted(ledger: Ledger) -> None:
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
        await ledger.record_answer(
            order_id="o", payment_key=payment_key, kind=kind, answer=answer, now_ms=1
        )
    assert await ledger.evidence.bound_answers("o", "k") == 2
    assert await ledger.evidence.bound_answers("o", "other") == 1
    assert await ledger.evidence.bound_answers("p", "k") == 0


async def test_keys_of_cancels_count_once_however_often_they_were_answered(ledger: Ledger) -> None:
    def told(kind: str, **members: Any) -> str:
        return json.dumps({"type": kind, **members}, separators=(",", ":"))

    broken_off = told("Unknown", reason="400 PROVIDER_ERROR", bound_to_key=True)
    for kind, answer in (
        ("cancel", broken_off),
        ("cancel", broken_off),
        ("cancel", told("Unknown", reason="400 PROVIDER_ERROR", bound_to_key=True, attempt=1)),
        ("cancel", told("PaymentMissing", code="NOT_FOUND_PAYMENT", attempt=2)),
        ("cancel", told("Unknown", reason="timeout", bound_to_key=False, attempt=3)),
        ("cancel", told("Misconfigured", code="UNAUTHORIZED_KEY", bound_to_key=False, attempt=3)),
        ("cancel", told("Declined", code="INVALID_BANK", message="", attempt=3)),
        ("confirm", broken_off.replace("PROVIDER", "OTHER")),
    ):
        await ledger.record_answer(
            order_id="o", payment_key="k", kind=kind, answer=answer, now_ms=1
        )
    assert await ledger.bound_cancels("o", "k", refusals=False) == 3
    assert await ledger.bound_cancels("o", "k", refusals=True) == 4
    assert await ledger.bound_cancels("o", "other", refusals=True) == 0


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


async def begun(ledger: Ledger, now_ms: int = 1, **changes: Any) -> RefundRecord:
    record = await ledger.begin_refund(wish(**changes), now_ms=now_ms)
    assert isinstance(record, RefundRecord)
    return record


async def test_a_refund_is_begun_once_and_a_repeat_gets_it(ledger: Ledger) -> None:
    record = await begun(ledger)
    assert (record.status, record.reason, record.restock) == ("pending", "broken", True)
    assert await begun(ledger, now_ms=2) == record
    assert await begun(ledger, key="another", now_ms=3) == record
    assert await ledger.refund_of("o") == record
    assert await ledger.refund_of("p") is None


async def test_another_wish_for_a_refund_that_stands_is_not_written_down(ledger: Ledger) -> None:
    record = await begun(ledger)
    other = wish(key="another", restock=False, digest="other")
    assert await ledger.begin_refund(other, now_ms=2) == OtherRefund(record)
    await ledger.finish_refund(record, status="done", code=None, now_ms=3)
    found = await ledger.begin_refund(other, now_ms=4)
    assert isinstance(found, OtherRefund)
    assert (found.standing.status, found.standing.restock) == ("done", True)


async def test_one_process_at_a_time_asks_for_a_refund(ledger: Ledger) -> None:
    record = await begun(ledger)
    wishes = [{"asks": True, "now_ms": 10, "until_ms": 60 + number} for number in range(6)]
    taken = await asyncio.gather(*(ledger.lease_refund(record, **wish) for wish in wishes))
    (held,) = [lease for lease in taken if lease]
    assert await ledger.lease_refund(record, asks=True, now_ms=59, until_ms=99) is None
    # The lease of a dead process expires, and the outcome of its request is unknown.
    other = await ledger.lease_refund(record, asks=True, now_ms=70, until_ms=130)
    assert other is not None
    assert other.unanswered
    # It wakes up and changes nothing.
    await ledger.leave_refund(held, code="late", unanswered=False, now_ms=71)
    assert await ledger.replace_refund(held, wish(key="new", digest="new"), now_ms=71) is None
    await ledger.leave_refund(other, code="500 COMMON_ERROR", unanswered=False, now_ms=72)
    standing = await ledger.refund_of("o")
    assert standing is not None
    assert (standing.lease_until_ms, standing.code) == (0, "500 COMMON_ERROR")
    assert not standing.unanswered


async def test_a_pending_refund_takes_another_wish_and_remembers_its_own(ledger: Ledger) -> None:
    record = await begun(ledger, account_json='{"accountNumber":"1"}')
    held = await ledger.lease_refund(record, asks=False, now_ms=5, until_ms=50)
    assert held is not None
    right = wish(key="new", account_json='{"accountNumber":"2"}', digest="new", operator="eve")
    assert await ledger.replace_refund(held, wish("p", digest="new"), now_ms=6) == RefundReused("o")
    replaced = await ledger.replace_refund(held, right, now_ms=6)
    assert isinstance(replaced, RefundRecord)
    assert await ledger.refund_of("o") == replaced
    assert (replaced.operator, replaced.account_json) == ("eve", '{"accountNumber":"2"}')
    (earlier,) = replaced.earlier()
    assert (earlier.operator, earlier.account_json) == ("op", '{"accountNumber":"1"}')
    assert (earlier.status, earlier.created_at_ms, earlier.replaced_at_ms) == ("pending", 1, 6)
    # The replaced request is not continued, even by a process that has read it.
    assert await ledger.lease_refund(record, asks=True, now_ms=99, until_ms=150) is None


async def test_a_cancel_that_may_still_come_bars_another_wish(ledger: Ledger) -> None:
    record = await begun(ledger)
    held = await ledger.lease_refund(record, asks=True, now_ms=5, until_ms=50)
    assert held is not None
    assert await ledger.replace_refund(held, wish(key="new", digest="new"), now_ms=6) is None


async def test_refunds_are_listed_a_page_at_a_time(ledger: Ledger) -> None:
    for number in range(5):
        record = await begun(ledger, order_id=f"o{number}", key=f"r{number}", now_ms=10 + number)
        if number > 2:
            await ledger.finish_refund(record, status="done", code=None, now_ms=20)
    backlog = await ledger.refund_backlog()
    assert (backlog.count, backlog.oldest_at_ms) == (3, 10)
    for status, wanted in (("pending", "012"), ("done", "43"), ("refused", ""), (None, "43210")):
        found: list[str] = []
        cursor = None
        while True:
            page, cursor = await ledger.refunds(status=status, cursor=cursor, limit=2)
            found += [row.order_id for row in page]
            if cursor is None:
                break
        assert found == [f"o{number}" for number in wanted]
    with pytest.raises(ValueError, match=r"JSON|base64|pad|array"):
        await ledger.refunds(cursor="made-up")


async def test_a_refunds_key_that_asked_for_something_else_is_refused(ledger: Ledger) -> None:
    await begun(ledger)
    for changes in ({"digest": "other"}, {"order_id": "p", "digest": "digest-p"}):
        assert await ledger.begin_refund(wish(**changes), now_ms=1) == RefundReused("o")
    assert await ledger.refund_of("p") is None


async def test_of_refunds_begun_at_once_one_stands(ledger: Ledger) -> None:
    records = await asyncio.gather(*(begun(ledger, key=f"r-{n}", now_ms=n) for n in range(8)))
    assert len({record.idempotency_key for record in records}) == 1


async def test_pending_refunds_are_found_oldest_first_until_they_are_done(ledger: Ledger) -> None:
    records = {
        order_id: await begun(ledger, order_id=order_id, key=order_id, now_ms=10 - number * 2)
        for number, order_id in enumerate(("late", "early", "middle"))
    }
    found = await ledger.pending_refunds(10)
    assert [row.order_id for row in found] == ["middle", "early", "late"]
    assert [row.order_id for row in await ledger.pending_refunds(1)] == ["middle"]
    await ledger.finish_refund(records["middle"], status="done", code=None, now_ms=20)
    await ledger.finish_refund(records["early"], status="refused", code="NO", now_ms=20)
    assert [row.order_id for row in await ledger.pending_refunds(10)] == ["late"]


async def test_a_refund_that_is_done_stays_done(ledger: Ledger) -> None:
    first = await begun(ledger)
    await ledger.finish_refund(first, status="done", code=None, now_ms=5)
    await ledger.finish_refund(first, status="refused", code="NO", now_ms=6)
    record = await begun(ledger, key="another")
    assert (record.status, record.code, record.updated_at_ms) == ("done", None, 5)


async def test_a_refused_refund_can_be_begun_anew(ledger: Ledger) -> None:
    first = await begun(ledger)
    await ledger.finish_refund(first, status="refused", code="NO", now_ms=5)
    assert (await begun(ledger)).status == "refused"
    account = '{"bank":"88"}'
    again = await begun(ledger, key="anew", account_json=account, digest="anew", now_ms=6)
    assert (again.status, again.account_json, again.code) == ("pending", account, None)
    assert await ledger.pending_refunds(10) == [again]
    # A process that was paused with the first one's answer.
    await ledger.finish_refund(first, status="refused", code="NO", now_ms=6)
    assert await ledger.pending_refunds(10) == [again]
    await ledger.finish_refund(again, status="done", code=None, now_ms=7)
    assert (await begun(ledger, key="anew", digest="anew")).status == "done"


@pytest.mark.parametrize("status", ["paid", ""])
async def test_a_refund_cannot_end_in_any_other_way(ledger: Ledger, status: str) -> None:
    record = await begun(ledger)
    with pytest.raises(Exception, match="ck_refunds_status"):
        await ledger.finish_refund(record, status=status, code=None, now_ms=5)
