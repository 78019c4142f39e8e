"""Which answers the checker accepts while a payment is on its way to its claim."""

import pytest

from reservation.verification.model.history_format import Operation
from reservation.verification.model.response_checks import objection
from reservation.verification.model.sale_state import Order, SaleState

KEY, OTHER = "key", "another key"
NOT_BEGUN = ("HELD", "PREPARED", "RELEASED", "EXPIRED")
ENDED = ("CONFIRMED", "AWAITING_DEPOSIT", "REFUNDED")
#: Long before every deadline here.
NOW_MS = 1_000


def shop(status: str, ends: dict[str, str] | None = None) -> SaleState:
    found = SaleState()
    found.orders["o"] = Order(
        status=status, buyer="b", lines=(), amount=1000, expires_at=10**9, ends=ends
    )
    return found


def answer(**changes: object) -> Operation:
    made = {
        "operation": "success",
        "status": 202,
        "reported": "CONFIRMING",
        "order": "o",
        "payment_key": KEY,
        **changes,
    }
    return Operation(sale="s", client="c", invoked_ns=0, answered_ns=1, **made)


def why_not(found: SaleState, operation: Operation) -> str:
    return objection(found, operation, NOW_MS)


@pytest.mark.parametrize("status", ["CONFIRMING", *NOT_BEGUN])
def test_a_success_may_be_pending_before_its_claim(status: str) -> None:
    assert why_not(shop(status), answer()) == ""
    assert why_not(shop(status, {OTHER: "declined"}), answer()) == ""


@pytest.mark.parametrize("status", ENDED)
def test_a_success_is_not_pending_once_the_order_is_paid(status: str) -> None:
    assert why_not(shop(status), answer()) == f"reported as CONFIRMING, it is {status}"


@pytest.mark.parametrize("status", NOT_BEGUN)
def test_a_success_is_not_pending_after_its_payment_ended(status: str) -> None:
    found = shop(status, {KEY: "declined"})
    assert why_not(found, answer()) == f"reported as CONFIRMING, it is {status}"


@pytest.mark.parametrize("status", NOT_BEGUN)
@pytest.mark.parametrize(
    "changes",
    [
        {"operation": "read", "status": 200},
        {"operation": "read"},
        {"operation": "fail"},
        {"operation": "release"},
        {"operation": "refund"},
        # 200 instead of 202, another state, or no payment at all.
        {"status": 200},
        {"reported": "CONFIRMED"},
        {"payment_key": ""},
    ],
)
def test_any_other_answer_must_match_the_orders_state(
    status: str, changes: dict[str, object]
) -> None:
    wrong = answer(**changes)
    assert why_not(shop(status), wrong) == f"reported as {wrong.reported}, it is {status}"
