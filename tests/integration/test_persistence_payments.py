"""Sales, payments and refunds as SQL keeps them."""

import asyncio
import json
import re
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from reservation.domain.errors import SaleRecovering
from reservation.persistence.ledger import Ledger
from reservation.persistence.refunds import RefundRecord, RefundReused


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


def payment(payment_key: str = "k", **changes: Any) -> dict[str, Any]:
    return {
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
        "now_ms": 10,
        **changes,
    }


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
        *(ledger.put_payment(**wish) for wish in wishes),
        *(ledger.record_answer(**answer, answer="{}", now_ms=1) for answer in answers),
    )
    assert transactions <= 3
    found = [await ledger.payment_of(f"o-{number}") for number in range(40)]
    assert [row.payment_key if row else None for row in found] == [w["payment_key"] for w in wishes]
    bad = payment("bad", order_id="o-bad", total_amount=-1)
    outcomes = await asyncio.gather(
        *(ledger.put_payment(**wish) for wish in (payment("a"), bad, payment("b"))),
        return_exceptions=True,
    )
    assert outcomes[0] is None
    assert outcomes[2] is None
    assert isinstance(outcomes[1], IntegrityError)
    assert await ledger.payment_of("o-bad") is None


async def test_a_payment_is_kept_as_it_was_shown_last(ledger: Ledger) -> None:
    await ledger.put_payment(**payment())
    await ledger.put_payment(
        **payment(
            status="CANCELED",
            balance_amount=0,
            method=None,
            approved_at_ms=None,
            secret=None,
            due_at_ms=None,
            now_ms=11,
        )
    )
    row = await ledger.payment_by_key("k")
    assert row is not None
    assert (row.status, row.balance_amount, row.updated_at_ms) == ("CANCELED", 0, 11)
    assert (row.method, row.approved_at_ms, row.secret, row.due_at_ms) == ("카드", 5, "ps_1", 9)
    assert await ledger.payment_by_key("unknown") is None


async def test_an_older_answer_or_another_order_changes_no_payment(ledger: Ledger) -> None:
    await ledger.put_payment(**payment())
    await ledger.put_payment(**payment(status="READY", now_ms=9))
    await ledger.put_payment(**payment(order_id="thief", status="CANCELED", now_ms=20))
    row = await ledger.payment_by_key("k")
    assert row is not None
    assert (row.status, row.order_id) == ("DONE", "o")
    assert await ledger.payment_of("thief") is None


async def test_of_an_orders_payments_the_approved_one_is_the_payment(ledger: Ledger) -> None:
    assert await ledger.payment_of("o") is None
    await ledger.put_payment(**payment("first", approved_at_ms=None, status="ABORTED", now_ms=30))
    await ledger.put_payment(**payment("paid", now_ms=20))
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
    assert await ledger.bound_answers("o", "k") == 2
    assert await ledger.bound_answers("o", "other") == 1
    assert await ledger.bound_answers("p", "k") == 0


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


def wish(order_id: str = "o", key: str = "r", **changes: Any) -> dict[str, Any]:
    return {
        "order_id": order_id,
        "idempotency_key": key,
        "reason": "broken",
        "restock": True,
        "operator": "op",
        "account_json": None,
        "digest": f"digest-{order_id}",
        "now_ms": 1,
        **changes,
    }


async def begun(ledger: Ledger, **changes: Any) -> RefundRecord:
    record = await ledger.begin_refund(**wish(**changes))
    assert isinstance(record, RefundRecord)
    return record


async def test_a_refund_is_begun_once_and_a_repeat_gets_it(ledger: Ledger) -> None:
    record = await begun(ledger)
    assert (record.status, record.reason, record.restock) == ("pending", "broken", True)
    assert await begun(ledger, now_ms=2) == record
    assert await begun(ledger, key="another", reason="other", digest="other", now_ms=3) == record
    assert await ledger.refund_of("o") == record
    assert await ledger.refund_of("p") is None


async def test_a_refunds_key_that_asked_for_something_else_is_refused(ledger: Ledger) -> None:
    await begun(ledger)
    for changes in ({"digest": "other"}, {"order_id": "p", "digest": "digest-p"}):
        assert await ledger.begin_refund(**wish(**changes)) == RefundReused("o")
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
    # A process that stood still with the first one's answer.
    await ledger.finish_refund(first, status="refused", code="NO", now_ms=6)
    assert await ledger.pending_refunds(10) == [again]
    await ledger.finish_refund(again, status="done", code=None, now_ms=7)
    assert (await begun(ledger, key="anew", digest="anew")).status == "done"


@pytest.mark.parametrize("status", ["paid", ""])
async def test_a_refund_cannot_end_in_any_other_way(ledger: Ledger, status: str) -> None:
    record = await begun(ledger)
    with pytest.raises(Exception, match="ck_refunds_status"):
        await ledger.finish_refund(record, status=status, code=None, now_ms=5)
