"""Reservations after the prepare: read, wait for a change, list, release."""

import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.support.service import Served, eventually, item, refused


def beacon(served: Served, order_id: str, text: str) -> httpx.Response:
    """A request of `navigator.sendBeacon`: a string, without headers of its own."""
    return served.http.post(
        f"/v1/reservations/{order_id}/release",
        content=text,
        headers={"Content-Type": "text/plain;charset=UTF-8"},
    )


def later(seconds: float, act: Callable[[], object]) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


def test_the_buyer_sees_the_reservation_with_its_payment_data(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer)
    seen = served.get_reservation(order, buyer)
    assert "token" not in seen
    assert seen == {name: value for name, value in order.items() if name != "token"}


def test_a_token_holder_sees_the_order_without_its_payment(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    seen = served.get_reservation(order)
    assert "token" not in seen
    assert "payment" not in seen
    assert (seen["orderId"], seen["status"]) == (order["orderId"], "HELD")


def test_long_poll_responses_are_not_cacheable(served: Served) -> None:
    buyer = served.buyer()
    order = served.hold(served.sale(), buyer)
    answer = served.http.get(f"/v1/reservations/{order['orderId']}", headers=buyer)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_a_hold_past_its_deadline_is_shown_as_expired(served: Served) -> None:
    sale_id, buyer = served.sale(holdSeconds=1), served.buyer()
    order = served.hold(sale_id, buyer)
    shown = eventually(
        lambda: served.get_reservation(order, buyer), lambda seen: seen["status"] == "EXPIRED"
    )
    assert "payment" not in shown
    eventually(lambda: served.stock(sale_id), lambda stock: stock == (100, 0, 0))


def test_a_wait_ends_at_the_next_change(served: Served) -> None:
    buyer = served.buyer()
    order = served.hold(served.sale(), buyer)
    began = time.monotonic()
    timer = later(0.5, lambda: served.release(order))
    answer = served.http.get(
        f"/v1/reservations/{order['orderId']}", params={"wait": 25}, headers=buyer
    )
    timer.join()
    assert answer.json()["status"] == "RELEASED"
    assert time.monotonic() - began < 20


def test_a_wait_without_a_change_times_out(served: Served) -> None:
    buyer = served.buyer()
    order = served.hold(served.sale(), buyer)
    began = time.monotonic()
    answer = served.http.get(
        f"/v1/reservations/{order['orderId']}", params={"wait": 1}, headers=buyer
    )
    assert answer.json()["status"] == "HELD"
    assert time.monotonic() - began >= 1


def test_a_wait_ends_at_the_expiry_of_the_hold(served: Served) -> None:
    order = served.hold(served.sale(holdSeconds=1), served.buyer())
    answer = served.http.get(
        f"/v1/reservations/{order['orderId']}",
        params={"wait": 20},
        headers={"X-Reservation-Token": order["token"]},
    )
    assert answer.json()["status"] == "EXPIRED"


@pytest.mark.parametrize("wait", ["26", "-1", "soon", "1.5"])
def test_a_wait_must_be_0_to_25_whole_seconds(served: Served, wait: str) -> None:
    buyer = served.buyer()
    order = served.hold(served.sale(), buyer)
    answer = served.http.get(
        f"/v1/reservations/{order['orderId']}", params={"wait": wait}, headers=buyer
    )
    refused(answer, 400, "malformed_request")


def test_a_buyer_lists_own_reservations_newest_first(served: Served) -> None:
    sale_id, other_sale, buyer = served.sale(), served.sale(), served.buyer()
    served.hold(sale_id, served.buyer())
    served.hold(other_sale, buyer)
    made = [served.hold(sale_id, buyer)["orderId"]]
    # Two in one millisecond have no order.
    time.sleep(0.005)
    made.append(served.hold(sale_id, buyer)["orderId"])
    answer = served.http.get(f"/v1/sales/{sale_id}/reservations", headers=buyer)
    assert answer.status_code == 200
    listed = answer.json()["reservations"]
    assert [order["orderId"] for order in listed] == made[::-1]
    assert all(order["payment"] for order in listed)
    assert not any("token" in order for order in listed)


def test_ended_orders_are_listed_without_payment_data(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    served.release(served.hold(sale_id, buyer))
    answer = served.http.get(f"/v1/sales/{sale_id}/reservations", headers=buyer)
    (listed,) = answer.json()["reservations"]
    assert listed["status"] == "RELEASED"
    assert "payment" not in listed


def test_a_buyer_without_orders_has_an_empty_list(served: Served) -> None:
    answer = served.http.get(f"/v1/sales/{served.sale()}/reservations", headers=served.buyer())
    assert answer.json() == {"reservations": []}


def test_a_buyer_releases_a_hold(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer)
    answer = served.http.post(f"/v1/reservations/{order['orderId']}/release", headers=buyer)
    assert answer.status_code == 200
    assert answer.json()["status"] == "RELEASED"
    assert served.stock(sale_id) == (100, 0, 0)


def test_a_beacon_releases_a_hold_with_its_token(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    answer = beacon(served, order["orderId"], order["token"])
    assert answer.status_code == 200
    assert answer.json()["status"] == "RELEASED"
    assert served.stock(sale_id) == (100, 0, 0)


@pytest.mark.parametrize("text", ["", " ", "no token", "\x00\xff", "v1.a.b.c"])
def test_a_beacon_without_a_valid_token_is_unauthenticated(served: Served, text: str) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    refused(beacon(served, order["orderId"], text), 401, "unauthenticated")
    assert served.stock(sale_id) == (99, 1, 0)


def test_a_token_in_another_content_type_is_not_read(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    answer = served.http.post(
        f"/v1/reservations/{order['orderId']}/release", json={"token": order["token"]}
    )
    refused(answer, 401, "unauthenticated")


def test_a_second_release_returns_the_current_state(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    first = served.release(order)
    before = served.dump(sale_id)
    again = served.release(order)
    assert (again.status_code, again.json()) == (200, first.json())
    assert served.dump(sale_id) == before


def expired(served: Served) -> dict[str, Any]:
    order = served.hold(served.sale(holdSeconds=1), served.buyer())
    eventually(lambda: served.get_reservation(order), lambda seen: seen["status"] == "EXPIRED")
    return order


def refunded(served: Served) -> dict[str, Any]:
    order = confirmed(served)
    answer = served.http.post(
        f"/v1/admin/orders/{order['orderId']}/refund",
        json={"reason": "a test", "restock": True},
        headers={**served.admin, "Idempotency-Key": secrets.token_hex(8)},
    )
    assert answer.status_code == 200, answer.text
    return order


def confirmed(served: Served) -> dict[str, Any]:
    order = served.hold(served.sale(), served.buyer())
    assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
    return order


def confirming(served: Served) -> dict[str, Any]:
    """One whose payment is in progress: the PG does not answer, and the buyer does not wait."""
    order = served.hold(served.sale(), served.buyer())
    served.order_fault(order, "hang")
    with suppress(httpx.ReadTimeout):
        served.http.get(served.success_url(order, served.pay(order)), timeout=0.3)
    eventually(lambda: served.get_reservation(order), lambda seen: seen["status"] == "CONFIRMING")
    return order


@pytest.mark.parametrize(("ended", "status"), [(expired, "EXPIRED"), (refunded, "REFUNDED")])
def test_a_release_of_an_ended_order_changes_nothing(
    served: Served, ended: Callable[[Served], dict[str, Any]], status: str
) -> None:
    order = ended(served)
    answer = served.release(order)
    assert (answer.status_code, answer.json()["status"]) == (200, status)


@pytest.mark.parametrize(
    ("standing", "code"),
    [
        (confirming, "payment_in_progress"),
        (confirmed, "already_confirmed"),
    ],
)
def test_a_release_after_the_payment_is_refused(
    served: Served, standing: Callable[[Served], dict[str, Any]], code: str
) -> None:
    order = standing(served)
    status = served.get_reservation(order)["status"]
    refused(served.release(order), 409, code)
    refused(beacon(served, order["orderId"], order["token"]), 409, code)
    assert served.get_reservation(order)["status"] == status
    served.clear_faults(order)


def test_a_release_returns_each_line_of_the_basket(served: Served) -> None:
    sale_id = served.sale(items=[item("a"), item("b")])
    order = served.hold(sale_id, served.buyer(), items=[("a", 2), ("b", 3)], amount=5000)
    served.release(order)
    assert served.stock(sale_id, "a") == served.stock(sale_id, "b") == (100, 0, 0)
