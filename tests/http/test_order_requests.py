"""Release and resolve over HTTP: by operators, by the buyer, and by a page that is left."""

from typing import Any

import httpx
import pytest

from tests.http.admin_calls import bought, in_sql
from tests.support.service import Served, eventually, refused


def asked(
    served: Served, order: dict[str, Any], verb: str, reason: str = "the buyer called"
) -> httpx.Response:
    path = f"/v1/admin/orders/{order['orderId']}/{verb}"
    return served.http.post(path, json={"reason": reason}, headers=served.admin)


def awaiting(served: Served) -> tuple[dict[str, Any], dict[str, str]]:
    """An order whose buyer has an open account, and the buyer's header."""
    buyer = served.buyer()
    order = served.hold(served.sale(virtualAccounts=True), buyer)
    key = served.pay(order, method="virtual_account")
    assert served.open_success_url(order, key).json()["status"] == "AWAITING_DEPOSIT"
    return order, buyer


def status_of(served: Served, order: dict[str, Any]) -> str:
    return served.get_reservation(order)["status"]


@pytest.mark.parametrize("policy", ["prepare", "success"])
def test_an_operator_releases_a_hold(served: Served, policy: str) -> None:
    sale_id = served.sale(holdPolicy=policy)
    order = served.hold(sale_id, served.buyer())
    for _ in range(2):
        answer = asked(served, order, "release")
        assert (answer.status_code, answer.json()["status"]) == (200, "RELEASED")
    assert served.stock(sale_id) == (100, 0, 0)
    history = in_sql(served, order, "RELEASED")["history"]
    (event,) = [entry["facts"] for entry in history if entry["what"] == "released"]
    assert (event["cause"], event["operator"], event["note"]) == (
        "operator",
        "tests",
        "the buyer called",
    )


def test_an_operator_cannot_release_a_paid_order(served: Served) -> None:
    order = bought(served, served.sale())
    refused(asked(served, order, "release"), 409, "already_confirmed")


def test_an_operator_cannot_release_a_payment_in_progress(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    served.order_fault(order, "error_before_commit", operations=["confirm", "look_up"], times=1000)
    served.open_success_url(order, served.pay(order))
    refused(asked(served, order, "release"), 409, "payment_in_progress")
    answer = asked(served, order, "resolve")
    assert (answer.status_code, answer.json()["status"]) == (202, "CONFIRMING")
    served.clear_faults(order)
    eventually(lambda: status_of(served, order), lambda status: status == "CONFIRMED")
    history = in_sql(served, order, "CONFIRMED")["history"]
    asks = [entry["facts"] for entry in history if entry["what"] == "resolve"]
    assert asks[0] == {"operator": "tests", "reason": "the buyer called"}


@pytest.mark.parametrize("by", ["operator", "buyer", "token"])
def test_the_release_of_an_order_that_awaits_its_deposit_cancels_the_account(
    served: Served, by: str
) -> None:
    order, buyer = awaiting(served)
    if by == "operator":
        answer = asked(served, order, "release")
    else:
        path = f"/v1/reservations/{order['orderId']}/release"
        headers = buyer if by == "buyer" else {"X-Reservation-Token": order["token"]}
        answer = served.http.post(path, headers=headers)
    assert answer.status_code == 202, answer.text
    assert answer.json()["orderId"] == order["orderId"]
    eventually(lambda: status_of(served, order), lambda status: status == "RELEASED")
    assert served.stock(order["saleId"]) == (100, 0, 0)
    history = in_sql(served, order, "RELEASED")["history"]
    (request,) = [entry["facts"] for entry in history if entry["what"] == "release"]
    by_operator = {"operator": "tests", "reason": "the buyer called"}
    assert request == (by_operator if by == "operator" else {"by": "buyer"})
    assert served.ledger(order)["charged"] == 0
    assert served.audit(order["saleId"])["ok"]


def test_a_beacon_of_a_page_that_is_left_cancels_no_account(served: Served) -> None:
    """The page may be older than the payment, which another tab has begun."""
    order, _ = awaiting(served)
    answer = served.http.post(
        f"/v1/reservations/{order['orderId']}/release",
        content=order["token"],
        headers={"Content-Type": "text/plain"},
    )
    refused(answer, 409, "payment_in_progress")
    assert status_of(served, order) == "AWAITING_DEPOSIT"


def test_the_return_to_a_released_account_shows_the_release(served: Served) -> None:
    buyer = served.buyer()
    order = served.hold(served.sale(virtualAccounts=True), buyer)
    key = served.pay(order, method="virtual_account")
    assert served.open_success_url(order, key).status_code == 200
    assert asked(served, order, "release").status_code == 202
    eventually(lambda: status_of(served, order), lambda status: status == "RELEASED")
    again = served.open_success_url(order, key)
    assert (again.status_code, again.json()["status"]) == (200, "RELEASED")


@pytest.mark.parametrize("verb", ["release", "resolve"])
def test_an_unknown_order_and_a_missing_reason_are_refused(served: Served, verb: str) -> None:
    sale_id = served.sale()
    ghost = {"orderId": f"{sale_id}-{'z' * 24}"}
    refused(asked(served, ghost, verb), 404, "reservation_not_found")
    refused(asked(served, {"orderId": "x"}, verb), 404, "reservation_not_found")
    order = served.hold(sale_id, served.buyer())
    refused(asked(served, order, verb, ""), 400, "malformed_request")


def test_resolve_of_a_decided_order_leaves_it_as_it_is(served: Served) -> None:
    order = bought(served, served.sale())
    answer = asked(served, order, "resolve")
    assert (answer.status_code, answer.json()["status"]) == (200, "CONFIRMED")
