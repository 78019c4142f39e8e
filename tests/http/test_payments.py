"""Return from the PG: one payment for any number of loads, and no money without its goods."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.support.service import Served, eventually, item, refused

#: A browser's headers when it follows a link.
HTML = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
PAYMENT = "/v1/payments/toss"


def browse(served: Served, url: str) -> tuple[dict[str, str], str | None]:
    """Where a browser is sent: the query of the result page, and the token in its fragment."""
    answer = served.http.get(url, headers={"Accept": HTML})
    assert answer.status_code == 303, answer.text
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    location = urlsplit(answer.headers["location"])
    assert f"{location.scheme}://{location.netloc}" == served.url
    assert location.path == "/result"
    query = {name: value for name, (value,) in parse_qs(location.query).items()}
    token = parse_qs(location.fragment).get("token")
    return query, token[0] if token else None


def failed(served: Served, order: dict[str, Any], **query: str) -> httpx.Response:
    """The PG's page sends the buyer back without a payment."""
    url = httpx.URL(order["payment"]["failUrl"]).copy_merge_params(query)
    return served.http.get(url, headers={"Accept": "application/json"})


def history(served: Served, order: dict[str, Any]) -> list[dict[str, Any]]:
    answer = served.http.get(f"/v1/admin/orders/{order['orderId']}", headers=served.admin)
    return answer.json()["history"] if answer.is_success else []


def confirms(served: Served, order: dict[str, Any]) -> int:
    """Answers of the PG to a confirm of this order."""
    return sum(entry["what"] == "confirm" for entry in history(served, order))


def wait_until(served: Served, order: dict[str, Any], status: str) -> None:
    eventually(
        lambda: served.get_reservation(order)["status"], lambda seen: seen == status, within=30
    )


def test_a_successful_payment_sells_the_order(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    answer = served.open_success_url(order, served.pay(order))
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert (answer.json()["orderId"], answer.json()["status"]) == (order["orderId"], "CONFIRMED")
    assert "token" not in answer.json()
    assert "payment" not in answer.json()
    assert served.stock(sale_id) == (99, 0, 1)
    assert served.ledger(order)["charged"] == 1000
    assert served.audit(sale_id)["ok"]


def test_a_repeated_return_gets_the_same_response_without_a_charge(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    first = served.open_success_url(order, payment_key)
    before = served.dump(sale_id)
    for _ in range(3):
        again = served.open_success_url(order, payment_key)
        assert (again.status_code, again.json()) == (200, first.json())
    assert served.dump(sale_id) == before
    assert len(served.ledger(order)["entries"]) == 1


async def test_fifty_concurrent_returns_make_one_payment(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    url = served.success_url(order, served.pay(order))
    async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
        headers = {"Accept": "application/json"}
        answers = await asyncio.gather(*(http.get(url, headers=headers) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].json()["status"] == "CONFIRMED"
    assert len(served.ledger(order)["entries"]) == 1
    assert served.stock(sale_id) == (99, 0, 1)
    assert served.audit(sale_id)["ok"]
    assert confirms(served, order) == 1


def test_a_browser_is_redirected_with_a_read_token(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    query, token = browse(served, served.success_url(order, served.pay(order)))
    assert query == {"orderId": order["orderId"], "outcome": "confirmed"}
    seen = served.http.get(
        f"/v1/reservations/{order['orderId']}", headers={"X-Reservation-Token": str(token)}
    )
    assert seen.json()["status"] == "CONFIRMED"


def test_the_read_token_cannot_release(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    _, token = browse(served, served.success_url(order, served.pay(order)))
    answer = served.http.post(
        f"/v1/reservations/{order['orderId']}/release",
        headers={"X-Reservation-Token": str(token)},
    )
    refused(answer, 404, "reservation_not_found")


@pytest.mark.parametrize("accept", ["*/*", "application/json", "application/xhtml+xml", ""])
def test_only_html_requests_are_redirected(served: Served, accept: str) -> None:
    order = served.hold(served.sale(), served.buyer())
    url = served.success_url(order, served.pay(order))
    answer = served.http.get(url, headers={"Accept": accept})
    assert (answer.status_code, answer.json()["status"]) == (200, "CONFIRMED")


@pytest.mark.parametrize("missing", ["paymentType", "orderId"])
def test_the_return_token_replaces_url_parameters(served: Served, missing: str) -> None:
    order = served.hold(served.sale(), served.buyer())
    url = httpx.URL(served.success_url(order, served.pay(order))).copy_remove_param(missing)
    assert served.http.get(url).json()["status"] == "CONFIRMED"


@pytest.mark.parametrize("amount", ["1", "999", "1001", "1000.0", "+1000", "01000", "", "x"])
def test_an_edited_amount_requests_no_payment(served: Served, amount: str) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    before = served.dump(sale_id)
    answer = served.open_success_url(order, payment_key, amount=amount)
    assert refused(answer, 400, "amount_mismatch")["expectedAmount"] == 1000
    assert served.dump(sale_id) == before
    assert served.ledger(order)["charged"] == 0
    assert served.open_success_url(order, payment_key).json()["status"] == "CONFIRMED"


def test_a_missing_amount_is_refused(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    url = httpx.URL(served.success_url(order, served.pay(order))).copy_remove_param("amount")
    refused(served.http.get(url), 400, "amount_mismatch")
    assert served.get_reservation(order)["status"] == "HELD"


def test_a_return_token_is_refused_for_another_order(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    mine, other = served.hold(sale_id, buyer), served.hold(sale_id, buyer)
    payment_key = served.pay(other)
    answer = served.open_success_url(mine, payment_key, orderId=other["orderId"])
    refused(answer, 403, "invalid_token")
    assert (
        served.get_reservation(mine)["status"] == served.get_reservation(other)["status"] == "HELD"
    )
    assert served.ledger(other)["charged"] == 0


def test_a_reservation_token_does_not_open_the_success_url(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    answer = served.open_success_url(order, served.pay(order), token=order["token"])
    refused(answer, 403, "invalid_token")
    assert served.get_reservation(order)["status"] == "HELD"


@pytest.mark.parametrize("payment_key", ["", "a/b", "x" * 201, "../cancel", "{}", "a b"])
def test_an_invalid_payment_key_is_not_looked_up(served: Served, payment_key: str) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    before = served.dump(sale_id)
    refused(served.open_success_url(order, payment_key), 403, "invalid_token")
    assert served.dump(sale_id) == before


def test_a_prefetch_confirms_no_payment(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    url = served.success_url(order, served.pay(order))
    before = served.dump(sale_id)
    assert served.http.head(url).status_code == 405
    for header in ("Sec-Purpose", "Purpose"):
        for value in ("prefetch", "prefetch;prerender"):
            answer = served.http.get(url, headers={header: value})
            refused(answer, 503, "unavailable")
    assert served.dump(sale_id) == before
    assert served.ledger(order)["charged"] == 0
    assert served.http.get(url).json()["status"] == "CONFIRMED"


def test_a_prefetch_of_the_fail_url_releases_no_hold(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    url = order["payment"]["failUrl"]
    assert served.http.head(url).status_code == 405
    refused(served.http.get(url, headers={"Sec-Purpose": "prefetch"}), 503, "unavailable")
    assert served.get_reservation(order)["status"] == "HELD"


def test_a_declined_card_releases_the_hold(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    answer = served.open_success_url(order, served.pay(order, decline="REJECT_CARD_COMPANY"))
    problem = refused(answer, 402, "payment_declined")
    assert problem["providerCode"] == "REJECT_CARD_COMPANY"
    assert served.get_reservation(order)["status"] == "RELEASED"
    assert served.stock(sale_id) == (100, 0, 0)
    assert served.ledger(order)["charged"] == 0


def test_after_a_stored_decline_another_card_can_pay(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    declined_key = served.pay(order, decline="REJECT_CARD_PAYMENT")
    first = refused(served.open_success_url(order, declined_key), 402, "payment_declined")
    again = refused(served.open_success_url(order, declined_key), 402, "payment_declined")
    assert again["providerCode"] == first["providerCode"]
    assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
    assert served.stock(sale_id) == (99, 0, 1)
    # The first card's address still returns the first card's outcome.
    refused(served.open_success_url(order, declined_key), 402, "payment_declined")
    assert served.ledger(order)["charged"] == 1000
    assert served.audit(sale_id)["ok"]


def test_a_sixth_card_is_refused(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    for _ in range(5):
        payment_key = served.pay(order, decline="REJECT_CARD_PAYMENT")
        refused(served.open_success_url(order, payment_key), 402, "payment_declined")
    refused(served.open_success_url(order, served.pay(order)), 409, "reservation_expired")
    assert served.ledger(order)["charged"] == 0


def test_a_second_payment_of_a_paid_order_is_not_confirmed(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    first, second = served.pay(order), served.pay(order)
    assert served.open_success_url(order, first).json()["status"] == "CONFIRMED"
    answer = served.open_success_url(order, second)
    assert (answer.status_code, answer.json()["status"]) == (200, "CONFIRMED")
    ledger = served.ledger(order)
    assert [entry["paymentKey"] for entry in ledger["entries"]] == [first]


def test_a_declined_card_redirects_the_browser_to_the_declined_page(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    payment_key = served.pay(order, decline="REJECT_CARD_COMPANY")
    query, token = browse(served, served.success_url(order, payment_key))
    assert query == {"orderId": order["orderId"], "outcome": "declined"}
    seen = served.http.get(
        f"/v1/reservations/{order['orderId']}", headers={"X-Reservation-Token": str(token)}
    )
    assert seen.json()["status"] == "RELEASED"


def test_a_browser_with_a_bad_token_gets_no_order_data(served: Served) -> None:
    url = f"{served.url}{PAYMENT}/success?token=v1.a.b.c&orderId=x-1&paymentKey=k&amount=1"
    query, token = browse(served, url)
    assert query["outcome"] == "invalid"
    assert token is None


def test_a_late_return_holds_the_basket_again_if_available(served: Served) -> None:
    sale_id = served.sale(holdSeconds=1)
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    eventually(lambda: served.stock(sale_id), lambda stock: stock == (100, 0, 0))
    assert served.open_success_url(order, payment_key).json()["status"] == "CONFIRMED"
    assert served.stock(sale_id) == (99, 0, 1)
    assert served.audit(sale_id)["ok"]


def test_a_late_return_without_stock_is_not_charged(served: Served) -> None:
    sale_id = served.sale(holdSeconds=1, items=[item("a", total=1)])
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    eventually(lambda: served.stock(sale_id), lambda stock: stock == (1, 0, 0))
    changed = served.http.post(
        f"/v1/admin/sales/{sale_id}/stock",
        json={"sku": "a", "delta": -1, "reason": "broken"},
        headers={**served.admin, "Idempotency-Key": "w"},
    )
    assert changed.status_code == 200
    for _ in range(2):
        refused(served.open_success_url(order, payment_key), 409, "reservation_expired")
    assert served.ledger(order)["charged"] == 0
    query, _ = browse(served, served.success_url(order, payment_key))
    assert query["outcome"] == "expired"


def test_a_return_after_a_release_holds_the_basket_again(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    served.release(order)
    assert served.open_success_url(order, payment_key).json()["status"] == "CONFIRMED"
    assert served.stock(sale_id) == (99, 0, 1)


def test_a_valid_hold_can_be_paid_after_the_sales_end(
    served: Served,
) -> None:
    sale_id = served.sale()
    held, released = served.hold(sale_id, served.buyer()), served.hold(sale_id, served.buyer())
    served.release(released)
    closed = served.http.post(
        f"/v1/admin/sales/{sale_id}/close", json={"reason": "test"}, headers=served.admin
    )
    assert closed.status_code == 200
    assert served.open_success_url(held, served.pay(held)).json()["status"] == "CONFIRMED"
    answer = served.open_success_url(released, served.pay(released))
    refused(answer, 409, "reservation_expired")
    assert served.ledger(released)["charged"] == 0


def test_the_success_policy_does_not_charge_without_stock(
    served: Served,
) -> None:
    sale_id = served.sale(holdPolicy="success", items=[item("a", total=1)])
    first, second = served.hold(sale_id, served.buyer()), served.hold(sale_id, served.buyer())
    keys = served.pay(first), served.pay(second)
    assert served.open_success_url(first, keys[0]).json()["status"] == "CONFIRMED"
    for _ in range(2):
        problem = refused(served.open_success_url(second, keys[1]), 409, "sold_out")
        assert problem["available"] == {"a": 0}
    assert served.ledger(second)["charged"] == 0
    query, _ = browse(served, served.success_url(second, keys[1]))
    assert query == {"orderId": second["orderId"], "outcome": "sold_out"}
    assert served.audit(sale_id)["ok"]


def test_a_limit_exceeded_at_success_is_refused_before_any_charge(served: Served) -> None:
    sale_id = served.sale(holdPolicy="success", items=[item("a", limitPerBuyer=1)])
    buyer = served.buyer()
    first, second = served.hold(sale_id, buyer), served.hold(sale_id, buyer)
    assert served.open_success_url(first, served.pay(first)).json()["status"] == "CONFIRMED"
    problem = refused(
        served.open_success_url(second, served.pay(second)), 409, "buyer_limit_exceeded"
    )
    assert (problem["sku"], problem["limit"], problem["taken"]) == ("a", 1, 1)
    assert served.ledger(second)["charged"] == 0


def test_the_fail_url_releases_the_hold(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    answer = failed(
        served, order, code="PAY_PROCESS_CANCELED", message="x", orderId=order["orderId"]
    )
    assert (answer.status_code, answer.json()["status"]) == (200, "RELEASED")
    assert served.stock(sale_id) == (100, 0, 0)
    again = failed(served, order, code="PAY_PROCESS_CANCELED", message="x")
    assert again.json() == answer.json()


def test_the_fail_url_needs_no_order_id(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    url = httpx.URL(order["payment"]["failUrl"]).copy_merge_params({"code": "PAY_PROCESS_ABORTED"})
    query, token = browse(served, str(url))
    assert query == {"orderId": order["orderId"], "outcome": "declined"}
    assert token
    assert served.get_reservation(order)["status"] == "RELEASED"


def test_an_empty_order_id_at_the_fail_url_counts_as_missing(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    assert failed(served, order, code="PAY_PROCESS_CANCELED", orderId="").status_code == 200
    assert served.get_reservation(order)["status"] == "RELEASED"


def test_the_fail_url_leaves_paid_orders_unchanged(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    served.open_success_url(order, served.pay(order))
    before = served.dump(sale_id)
    answer = failed(served, order, code="PAY_PROCESS_CANCELED")
    assert (answer.status_code, answer.json()["status"]) == (200, "CONFIRMED")
    assert served.dump(sale_id) == before


def test_the_fail_url_refuses_other_tokens(served: Served) -> None:
    sale_id = served.sale()
    order, other = served.hold(sale_id, served.buyer()), served.hold(sale_id, served.buyer())
    refused(failed(served, order, orderId=other["orderId"]), 403, "invalid_token")
    refused(served.http.get(f"{PAYMENT}/fail?token={order['token']}"), 403, "invalid_token")
    refused(served.http.get(f"{PAYMENT}/fail"), 403, "invalid_token")
    assert (
        served.get_reservation(order)["status"] == served.get_reservation(other)["status"] == "HELD"
    )


def test_a_lost_confirm_reply_after_the_charge_sells_the_order(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    served.order_fault(order, "commit_then_drop")
    payment_key = served.pay(order)
    answer = served.open_success_url(order, payment_key)
    assert answer.status_code in {200, 202}
    wait_until(served, order, "CONFIRMED")
    assert served.open_success_url(order, payment_key).status_code == 200
    assert len(served.ledger(order)["entries"]) == 1
    assert served.audit(sale_id)["ok"]


def test_a_payment_completes_after_the_buyer_disconnects(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    served.order_fault(order, "hang", seconds=1)
    with suppress(httpx.ReadTimeout):
        served.http.get(served.success_url(order, served.pay(order)), timeout=0.3)
    wait_until(served, order, "CONFIRMED")
    assert len(served.ledger(order)["entries"]) == 1


@pytest.mark.slow
def test_an_unknown_outcome_is_reported_and_settled_later(
    served: Served,
) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    calls = ["confirm", "look_up"]
    served.order_fault(order, "error_before_commit", operations=calls, times=1000)
    payment_key, second_key = served.pay(order), served.pay(order)
    with ThreadPoolExecutor(2) as pool:
        shown = pool.submit(served.open_success_url, order, payment_key)
        sent = pool.submit(browse, served, served.success_url(order, payment_key))
        eventually(
            lambda: served.get_reservation(order)["status"], lambda seen: seen == "CONFIRMING"
        )
        # Neither another card nor the fail page gets in between.
        other = served.open_success_url(order, second_key)
        assert (other.status_code, other.json()["status"]) == (202, "CONFIRMING")
        assert failed(served, order).json()["status"] == "CONFIRMING"
        answer, (query, token) = shown.result(), sent.result()
    assert (answer.status_code, answer.json()["status"]) == (202, "CONFIRMING")
    assert query["outcome"] == "settling"
    assert token
    assert served.stock(sale_id) == (99, 1, 0)
    served.clear_faults(order)
    wait_until(served, order, "CONFIRMED")
    ledger = served.ledger(order)
    assert [entry["paymentKey"] for entry in ledger["entries"]] == [payment_key]
    assert served.audit(sale_id)["ok"]


def test_an_invented_payment_key_leaves_the_hold_unchanged(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    for _ in range(2):
        problem = refused(served.open_success_url(order, "made-up-key"), 402, "payment_declined")
        assert problem["providerCode"] == "NOT_FOUND_PAYMENT"
        seen = served.get_reservation(order)
        assert (seen["status"], seen["expiresAt"]) == ("HELD", order["expiresAt"])
    assert served.stock(sale_id) == (99, 1, 0)
    assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
    assert served.audit(sale_id)["ok"]


def test_the_payment_key_of_another_order_is_refused(served: Served) -> None:
    sale_id = served.sale()
    mine, other = served.hold(sale_id, served.buyer()), served.hold(sale_id, served.buyer())
    payment_key = served.pay(other)
    assert served.open_success_url(other, payment_key).json()["status"] == "CONFIRMED"
    for _ in range(2):
        refused(served.open_success_url(mine, payment_key), 403, "invalid_token")
    assert served.get_reservation(mine)["status"] == "HELD"
    assert served.ledger(mine)["payments"] == []
    assert served.ledger(other)["charged"] == 1000
    assert confirms(served, mine) == 0
    # The wrong key costs the order nothing.
    assert served.open_success_url(mine, served.pay(mine)).json()["status"] == "CONFIRMED"


def test_a_card_confirmed_too_late_is_not_charged(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    # The PG lets ten minutes pass between the buyer's authentication and the confirm.
    served.sandbox(order, "/_clock", {"advanceSeconds": 11 * 60})
    for _ in range(2):
        refused(served.open_success_url(order, payment_key), 409, "reservation_expired")
    assert served.get_reservation(order)["status"] == "EXPIRED"
    assert served.stock(sale_id) == (100, 0, 0)
    assert served.ledger(order)["charged"] == 0


def test_a_payment_of_a_wrong_amount_is_refunded_and_not_sold(
    served: Served,
) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    served.order_fault(order, "other_amount", operations=["confirm", "look_up"], times=2)
    answer = served.open_success_url(order, served.pay(order))
    assert answer.status_code in {200, 202}, answer.text
    wait_until(served, order, "REFUNDED")
    ledger = served.ledger(order)
    assert ledger["charged"] == ledger["cancelled"] == 1000
    assert served.stock(sale_id) == (100, 0, 0)
    assert served.audit(sale_id)["ok"]


def test_an_unwanted_virtual_account_is_closed(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    for _ in range(2):
        problem = refused(served.open_success_url(order, payment_key), 402, "payment_declined")
        assert problem["providerCode"] == "VIRTUAL_ACCOUNT_NOT_ACCEPTED"
    (payment,) = served.ledger(order)["payments"]
    assert payment["status"] == "CANCELED"
    assert served.get_reservation(order)["status"] == "RELEASED"
    assert served.stock(sale_id) == (100, 0, 0)


def test_a_paid_virtual_account_sells_the_order(served: Served) -> None:
    sale_id = served.sale(virtualAccounts=True, holdSeconds=1)
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    answer = served.open_success_url(order, payment_key)
    assert (answer.status_code, answer.json()["status"]) == (200, "AWAITING_DEPOSIT")
    assert answer.json()["expiresAt"] > order["expiresAt"]
    query, _ = browse(served, served.success_url(order, payment_key))
    assert query["outcome"] == "awaiting_deposit"
    assert failed(served, order).json()["status"] == "AWAITING_DEPOSIT"
    assert served.stock(sale_id) == (99, 1, 0)
    # The sandbox sends its webhooks to the service, as the PG does.
    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    wait_until(served, order, "CONFIRMED")
    assert served.stock(sale_id) == (99, 0, 1)
    assert served.open_success_url(order, payment_key).json()["status"] == "CONFIRMED"
    assert served.audit(sale_id)["ok"]


def test_a_concurrent_release_and_payment_end_consistently(served: Served) -> None:
    sale_id = served.sale()
    for _ in range(8):
        order = served.hold(sale_id, served.buyer())
        payment_key = served.pay(order)
        with ThreadPoolExecutor(2) as pool:
            paid = pool.submit(served.open_success_url, order, payment_key)
            released = pool.submit(served.release, order)
        # A release that came first is undone by the payment: the basket is still there.
        assert paid.result().json()["status"] == "CONFIRMED"
        assert released.result().status_code in {200, 409}
        assert served.ledger(order)["charged"] == 1000
    assert served.stock(sale_id) == (92, 0, 8)
    assert served.audit(sale_id)["ok"]
