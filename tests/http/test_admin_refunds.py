"""Operators refund orders."""

import secrets
from typing import Any

import pytest

from tests.http.admin_calls import (
    bought,
    refund,
    shown,
)
from tests.support.service import Served, eventually, item, refused


def test_a_refund_returns_the_money_before_the_stock(served: Served) -> None:
    sale_id = served.sale(items=[item("a", limitPerBuyer=1)])
    buyer = served.buyer()
    order = served.hold(sale_id, buyer)
    served.open_success_url(order, served.pay(order))
    answer = refund(served, order)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["orderId"], answer.json()["status"]) == (order["orderId"], "REFUNDED")
    ledger = served.ledger(order)
    assert ledger["charged"] == ledger["cancelled"] == 1000
    assert served.stock(sale_id) == (100, 0, 0)
    # The buyer's limit is free again.
    served.hold(sale_id, buyer)
    assert served.audit(sale_id)["ok"]


def test_a_repeated_refund_changes_nothing(served: Served) -> None:
    sale_id = served.sale()
    order = bought(served, sale_id)
    key = secrets.token_hex(8)
    answers = [refund(served, order, key=key) for _ in range(3)]
    answers.append(refund(served, order))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["status"] for answer in answers} == {"REFUNDED"}
    assert served.ledger(order)["cancelled"] == 1000
    assert served.stock(sale_id) == (100, 0, 0)


def test_a_refund_key_cannot_be_reused_for_another_wish(served: Served) -> None:
    order, other = bought(served, served.sale()), bought(served, served.sale())
    key = secrets.token_hex(8)
    assert refund(served, order, key=key).status_code == 200
    refused(refund(served, order, key=key, restock=False), 422, "idempotency_key_reused")
    refused(refund(served, other, key=key), 422, "idempotency_key_reused")
    assert served.get_reservation(other)["status"] == "CONFIRMED"


def test_a_refund_can_withdraw_the_units_from_sale(served: Served) -> None:
    sale_id = served.sale()
    order = bought(served, sale_id)
    assert refund(served, order, restock=False).json()["status"] == "REFUNDED"
    (one,) = shown(served, sale_id).json()["items"]
    assert (one["total"], one["available"], one["held"], one["sold"]) == (99, 99, 0, 0)
    assert served.audit(sale_id)["ok"]


def test_only_sold_orders_can_be_refunded(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    refused(refund(served, order), 409, "not_refundable")
    served.release(order)
    refused(refund(served, order), 409, "not_refundable")
    missing = {"orderId": f"{sale_id}-" + "a" * 24}
    refused(refund(served, missing), 404, "reservation_not_found")


def test_a_deposit_is_refunded_to_an_account(served: Served) -> None:
    sale_id = served.sale(virtualAccounts=True)
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    served.open_success_url(order, payment_key)
    refused(refund(served, order), 409, "not_refundable")
    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "CONFIRMED")
    refused(refund(served, order), 422, "refund_account_required")
    account = {"bank": "88", "accountNumber": "110123456789", "holderName": "김토스"}
    answer = refund(served, order, refundReceiveAccount=account)
    assert (answer.status_code, answer.json()["status"]) == (200, "REFUNDED"), answer.text
    assert served.ledger(order)["cancelled"] == 1000
    assert served.audit(sale_id)["ok"]


def test_an_unanswered_refund_is_pending_and_completed_later(served: Served) -> None:
    sale_id = served.sale()
    order = bought(served, sale_id)
    calls = ["cancel", "look_up"]
    served.order_fault(order, "error_before_commit", operations=calls, times=1000)
    answer = refund(served, order)
    assert (answer.status_code, answer.json()["code"]) == (202, "refund_pending"), answer.text
    assert answer.json()["status"] == "CONFIRMED"
    served.clear_faults(order)
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "REFUNDED")
    assert served.ledger(order)["cancelled"] == 1000
    assert served.audit(sale_id)["ok"]


def test_a_refund_with_a_lost_reply_is_made_once(served: Served) -> None:
    order = bought(served, served.sale())
    served.order_fault(order, "commit_then_drop", operations=["cancel"])
    answer = refund(served, order)
    assert answer.status_code in {200, 202}
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "REFUNDED")
    assert served.ledger(order)["cancelled"] == 1000


@pytest.mark.parametrize(
    "body",
    [
        {"reason": ""},
        {"reason": "a\0b"},
        {"restock": "yes"},
        {"restock": None},
        {"amount": 1},
        {"refundReceiveAccount": {"bank": "88"}},
        {"refundReceiveAccount": {"bank": "88", "accountNumber": "1-2", "holderName": "x"}},
    ],
    ids=str,
)
def test_a_malformed_refund_is_refused(served: Served, body: dict[str, Any]) -> None:
    order = bought(served, served.sale())
    refused(refund(served, order, **body), 400, "malformed_request")
    assert served.get_reservation(order)["status"] == "CONFIRMED"
