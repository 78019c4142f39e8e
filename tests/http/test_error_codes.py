"""Error codes over HTTP: the status, extra members and precedence of each."""

from typing import Any

import pytest

from api.http.problem_details import STATUSES
from tests.http.refusal_scenes import (
    FAILURES,
    SCENES,
    ghost,
    insufficient_available,
    payment_declined,
    switch,
)
from tests.support.service import Served, item, refused


def test_each_error_code_has_a_scenario() -> None:
    assert set(SCENES) | FAILURES == set(STATUSES) | {"amount_mismatch"}


@pytest.mark.parametrize("code", SCENES)
def test_each_error_code_has_its_status_and_document(served: Served, code: str) -> None:
    answer = SCENES[code](served)
    status = STATUSES.get(code, 409)
    problem = refused(answer, status, code)
    assert problem["type"].endswith(code)
    waiting_helps = status in {429, 503} and code != "too_many_orders"
    assert ("retry-after" in answer.headers) == waiting_helps
    assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert answer.headers["cache-control"] == "no-store"


def test_sold_out_reports_available_units_and_the_holds_deadline(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=3), item("b", total=5)])
    order = served.hold(sale_id, served.buyer(), items=[("a", 2)], amount=2000)
    answer = served.prepare(sale_id, served.buyer(), items=[("a", 2), ("b", 1)], amount=3000)
    problem = refused(answer, 409, "sold_out")
    assert problem["available"] == {"a": 1, "b": 5}
    assert problem["nextDeadline"] == order["expiresAt"]


def test_a_final_sold_out_has_no_next_deadline(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=1)])
    order = served.hold(sale_id, served.buyer())
    served.open_success_url(order, served.pay(order))
    problem = refused(served.prepare(sale_id, served.buyer()), 409, "sold_out")
    assert problem["available"] == {"a": 0}
    assert problem["nextDeadline"] is None


def test_a_limit_refusal_reports_the_buyers_current_units(served: Served) -> None:
    sale_id, buyer = served.sale(items=[item("a", limitPerBuyer=3)]), served.buyer()
    paid, held = served.hold(sale_id, buyer), served.hold(sale_id, buyer)
    served.open_success_url(paid, served.pay(paid))
    answer = served.prepare(sale_id, buyer, items=[("a", 2)], amount=2000)
    problem = refused(answer, 409, "buyer_limit_exceeded")
    assert (problem["sku"], problem["limit"], problem["taken"]) == ("a", 3, 2)
    assert problem["orderIds"] == [held["orderId"]]


def test_a_wrong_amount_is_refused_with_the_expected_amount(served: Served) -> None:
    sale_id = served.sale(items=[item("a", price=700), item("b", price=110)])
    answer = served.prepare(sale_id, served.buyer(), items=[("a", 2), ("b", 3)], amount=1)
    assert refused(answer, 409, "amount_mismatch")["expectedAmount"] == 1730


def test_a_sale_before_its_opening_reports_the_opening_time(served: Served) -> None:
    opens_at = "2099-01-02T03:04:05.678Z"
    sale_id = served.sale(opensAt=opens_at, closesAt="2099-02-01T00:00:00Z")
    problem = refused(served.prepare(sale_id, served.buyer()), 403, "sale_not_open")
    assert problem["opensAt"] == opens_at


def test_a_declined_payment_reports_the_providers_code(served: Served) -> None:
    problem = refused(payment_declined(served), 402, "payment_declined")
    assert problem["providerCode"] == "EXCEED_MAX_AMOUNT"


def test_an_excessive_withdrawal_is_refused_with_the_available_units(served: Served) -> None:
    problem = refused(insufficient_available(served), 409, "insufficient_available")
    assert problem["available"] == {"a": 100}


def test_a_token_holder_learns_that_the_order_is_lost(served: Served) -> None:
    lost = ghost(served, served.sale())
    headers = {"X-Reservation-Token": lost["token"]}
    path = f"/v1/reservations/{lost['orderId']}"
    refused(served.http.get(path, headers=headers), 409, "hold_lost")
    refused(served.http.post(f"{path}/release", headers=headers), 409, "hold_lost")
    # A buyer who returns from the PG gets the order's id.
    url = lost["payment"]["successUrl"] + "&paymentKey=some-key&amount=1000"
    answer = served.http.get(url, headers={"Accept": "text/html"})
    assert answer.headers["location"].endswith(f"?orderId={lost['orderId']}&outcome=expired")
    # Without the token, a buyer cannot distinguish it from an order that never existed.
    refused(served.http.get(path, headers=served.buyer()), 404, "reservation_not_found")


def test_the_first_of_several_refusals_is_sent(served: Served) -> None:
    buyer = served.buyer()
    missing, closed = "nothing", served.sale(items=[item("a"), item("b", limitPerBuyer=1)])
    served.hold(closed, buyer, key="k")
    served.hold(closed, buyer, items=[("b", 1)])
    switch(served, closed, "close")
    small = served.sale(items=[item("a", total=0, limitPerBuyer=1)])
    two = {"items": [("a", 2)], "amount": 2000}
    cases: list[tuple[str, dict[str, str], dict[str, Any], int, str]] = [
        (missing, {}, {"items": [("a", 0)]}, 401, "unauthenticated"),
        (missing, buyer, {"items": [("a", 0)]}, 404, "sale_not_found"),
        (closed, buyer, {"key": "k", "items": [("a", 0)]}, 400, "malformed_request"),
        (closed, buyer, {"key": "k", "items": [("z", 1)]}, 404, "sku_not_found"),
        (closed, buyer, {"key": "k", "amount": 1}, 422, "idempotency_key_reused"),
        (closed, buyer, {"amount": 1}, 410, "sale_closed"),
        (small, buyer, {**two, "amount": 1}, 409, "amount_mismatch"),
        (small, buyer, two, 409, "buyer_limit_exceeded"),
        (small, buyer, {}, 409, "sold_out"),
    ]
    for sale_id, caller, wish, status, code in cases:
        refused(served.prepare(sale_id, caller, **wish), status, code)
