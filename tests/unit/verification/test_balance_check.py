"""Reconciliation of Redis, SQL and the PG: each kind of difference is reported."""

from typing import Any

import pytest

from reservation.domain.ids import OrderIds
from reservation.verification.balance_check import BalanceCheck, books_of, disagreements, unsettled

SALE = "sale-1"
IDS = OrderIds(b"k" * 32)


def order_id(number: int, sale_id: str = SALE) -> str:
    return IDS.order_id(sale_id=sale_id, buyer_id=f"buyer-{number}", idempotency_key="once")


def order(number: int, status: str = "CONFIRMED", **changes: Any) -> dict[str, Any]:
    items = [{"sku": "a", "quantity": 1}]
    return {
        "orderId": order_id(number),
        "status": status,
        "items": items,
        "amount": 1000,
    } | changes


def entry(number: int, kind: str = "charge", amount: int = 1000) -> dict[str, Any]:
    return {"orderId": order_id(number), "kind": kind, "amount": amount}


def books(**changes: Any) -> BalanceCheck:
    """Two units, one of them sold; a second order was released. All agree."""
    row = {"sku": "a", "total": 2, "available": 1, "held": 0, "sold": 1, **changes.pop("row", {})}
    audit = {"ok": True, "lag": 0, "problems": [], "skus": [row], **changes.pop("audit", {})}
    given: dict[str, Any] = {
        "orders": [order(1), order(2, "RELEASED")],
        "entries": [entry(1)],
    } | changes
    return books_of(SALE, audit=audit, **given)


def test_balanced_books_report_no_discrepancy() -> None:
    assert disagreements(books()) == []
    assert books().charged == books().confirmed_amount == 1000


def test_payments_of_other_sales_are_ignored() -> None:
    foreign = {"orderId": order_id(9, "sale-2"), "kind": "charge", "amount": 5}
    assert disagreements(books(entries=[entry(1), foreign])) == []


def test_a_refund_and_a_reversed_deposit_balance() -> None:
    both = [entry(3), entry(3, "cancel"), entry(4, "deposit"), entry(4, "deposit_reversed")]
    assert disagreements(books(entries=[entry(1), *both])) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"audit": {"problems": ["the chain is cut"]}}, "audit: the chain is cut"),
        ({"audit": {"ok": False, "code": "unavailable"}}, "the audit is not clean: unavailable"),
        ({"row": {"total": 1, "available": -1, "sold": 2}}, "a: oversold, 2 sold of 1"),
        ({"row": {"available": -1, "held": 2}}, "a: negative counter"),
        ({"row": {"available": 0}}, "a: 2 is not the sum"),
        ({"row": {"available": 0, "sold": 2}}, "a: 2 counted as sold, 1 in confirmed orders"),
        ({"orders": [order(n) for n in (1, 2, 3)]}, "a: oversold, 3 sold of 2"),
        (
            {"orders": [order(1, items=[{"sku": "b", "quantity": 1}])]},
            "b: sold in SQL, missing in the audit",
        ),
        ({"entries": []}, "the PG charged 0 and refunded 0, the confirmed orders total 1000"),
        ({"entries": [entry(1), entry(2)]}, "the PG's balance is 1000, the order's amount 0"),
        ({"entries": [entry(1), entry(7)]}, "the PG's balance is 1000, the order's amount 0"),
        ({"entries": [entry(1, amount=999)]}, "the PG's balance is 999, the order's amount 1000"),
        ({"entries": [entry(1), entry(1), entry(1, "cancel")]}, "charged 2 times"),
    ],
)
def test_each_discrepancy_is_reported(changes: dict[str, Any], sentence: str) -> None:
    assert any(sentence in found for found in disagreements(books(**changes)))


def test_a_finished_sale_has_nothing_unsettled() -> None:
    assert unsettled(books()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"row": {"available": 0, "held": 1}}, "1 still held and 0 events behind"),
        ({"audit": {"lag": 3}}, "0 still held and 3 events behind"),
    ],
    ids=["held", "lag"],
)
def test_a_hold_or_an_event_that_is_left_is_reported(
    changes: dict[str, Any], sentence: str
) -> None:
    assert unsettled(books(**changes)) == [sentence]
