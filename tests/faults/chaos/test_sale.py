"""The comparison of money at the end of a short run, which leaves payments undecided."""

from typing import Any

import pytest

from reservation.verification.balance_check import books_of, disagreements
from tests.faults.chaos.sale import without_undecided

ORDER = "s-0123456789abcdefghijklmn"


def disagreements_of(status: str) -> list[str]:
    """The differences after one charge for an order in this status."""
    order: dict[str, Any] = {
        "orderId": ORDER,
        "status": status,
        "amount": 1000,
        "items": [{"sku": "a", "quantity": 1}],
    }
    entry = {"orderId": ORDER, "kind": "charge", "amount": 1000}
    books = books_of("s", audit={"ok": True}, orders=[order], entries=[entry])
    return disagreements(without_undecided(books))


def test_the_money_of_an_undecided_payment_is_no_difference() -> None:
    assert disagreements_of("CONFIRMING") == []


@pytest.mark.parametrize("status", ["RELEASED", "EXPIRED", "REFUNDED", "HELD"])
def test_the_money_of_an_unsold_order_is_a_difference(status: str) -> None:
    assert disagreements_of(status)
