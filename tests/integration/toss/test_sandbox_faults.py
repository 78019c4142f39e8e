"""Faults that a test orders from the sandbox."""

import pytest

from reservation.sandbox.faults import Fault
from tests.integration.toss.sandbox_steps import AMOUNT, code_of, status_of
from tests.support.sandbox import RunningSandbox


def test_a_fault_applies_only_to_matching_calls(sandbox: RunningSandbox, order_id: str) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    rule = sandbox.order_fault(
        "rate_limited", paymentKey=payment_key, operations=["look_up"], times=1
    )
    bystander = sandbox.put_payment(f"{order_id}-2", AMOUNT)
    assert status_of(sandbox, bystander) == "IN_PROGRESS"
    assert sandbox.confirm(payment_key, order_id, AMOUNT).status_code == 200
    assert sandbox.http.get(f"/v1/payments/{payment_key}").status_code == 429
    assert sandbox.http.get(f"/v1/payments/{payment_key}").status_code == 200
    faults = sandbox.http.get("/_faults").json()["faults"]
    assert next(fault for fault in faults if fault["id"] == rule["id"])["applied"] == 1


def test_a_seeded_fault_rate_hits_the_same_calls_each_time(own: RunningSandbox) -> None:
    def draw() -> list[int]:
        own.clear_faults()
        own.order_fault("error_before_commit", rate=0.3, seed=7, operations=["look_up"])
        return [own.http.get("/v1/payments/x").status_code for _ in range(60)]

    first = draw()
    assert draw() == first
    assert 5 < first.count(500) < 35
    own.http.delete("/_faults")
    cleared = own.http.get("/_faults").json()
    assert cleared == {"faults": [], "applied": {"error_before_commit": 2 * first.count(500)}}


@pytest.mark.parametrize(
    "order",
    [
        {"fault": "unheard_of"},
        {"fault": "hang", "operations": ["refund"]},
        {"fault": "hang", "rate": 2},
        {"fault": "hang", "times": 0},
        {"fault": "hang", "orderID": "typo"},
        {"clear": False},
        {},
    ],
)
def test_an_unknown_fault_is_refused(sandbox: RunningSandbox, order: dict[str, object]) -> None:
    assert code_of(sandbox.http.post("/_faults", json=order)) == (400, "INVALID_REQUEST")


def test_each_fault_can_be_injected(own: RunningSandbox) -> None:
    for fault in Fault:
        own.order_fault(fault.value, orderId="order-of-nobody")
    assert len(own.http.get("/_faults").json()["faults"]) == len(Fault)
    assert own.clear_faults() == {"faults": [], "applied": {}}
