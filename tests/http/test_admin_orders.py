"""Operators list orders, read their history and sign each change."""

import secrets
from typing import Any

import pytest

from tests.http.admin_calls import (
    SALES,
    bought,
    fresh,
    in_sql,
    listed,
    refund,
)
from tests.support.service import Served, eventually, refused, sale_document


def test_orders_are_listed_in_pages_newest_first(served: Served) -> None:
    sale_id = served.sale()
    made = {served.hold(sale_id, served.buyer())["orderId"] for _ in range(5)}
    eventually(
        lambda: len(listed(served, saleId=sale_id)["orders"]), lambda found: found == len(made)
    )
    pages, cursor = [], None
    while True:
        query = {"saleId": sale_id, "limit": 2, **({"cursor": cursor} if cursor else {})}
        page = listed(served, **query)
        pages.append(page["orders"])
        cursor = page["nextCursor"]
        if cursor is None:
            break
    assert [len(page) for page in pages] == [2, 2, 1]
    orders = [order for page in pages for order in page]
    assert {order["orderId"] for order in orders} == made
    times = [order["createdAt"] for order in orders]
    assert times == sorted(times, reverse=True)


def test_the_last_page_of_orders_has_no_cursor(served: Served) -> None:
    sale_id = served.sale()
    for _ in range(2):
        served.hold(sale_id, served.buyer())
    eventually(lambda: len(listed(served, saleId=sale_id)["orders"]), lambda found: found == 2)
    page = listed(served, saleId=sale_id, limit=2)
    assert len(page["orders"]) == 2
    assert page["nextCursor"] is None


def test_a_name_with_a_zero_byte_matches_no_buyer(served: Served) -> None:
    """A zero byte: SQLite accepts it in a query, PostgreSQL refuses it."""
    path = "/v1/admin/orders"
    refused(served.http.get(f"{path}?buyerId=%00", headers=served.admin), 400, "malformed_request")
    refused(
        served.http.get(f"{path}/x%00-{'a' * 24}", headers=served.admin),
        404,
        "reservation_not_found",
    )


def test_a_listed_order_has_the_documented_members(served: Served) -> None:
    sale_id = served.sale()
    buyer_id, buyer = served.named_buyer()
    order = served.hold(sale_id, buyer)
    payment_key = served.pay(order)
    served.open_success_url(order, payment_key)
    in_sql(served, order, "CONFIRMED")
    (found,) = listed(served, saleId=sale_id, status="CONFIRMED", buyerId=buyer_id)["orders"]
    assert set(found) == {
        "orderId",
        "saleId",
        "buyerId",
        "status",
        "items",
        "amount",
        "currency",
        "paymentKeyLast4",
        "createdAt",
        "updatedAt",
        "seq",
    }
    assert (found["orderId"], found["buyerId"]) == (order["orderId"], buyer_id)
    assert found["items"] == order["items"]
    assert found["paymentKeyLast4"] == payment_key[-4:]
    assert listed(served, saleId=sale_id, status="HELD")["orders"] == []
    assert listed(served, saleId=sale_id, buyerId="nobody")["orders"] == []
    assert listed(served, saleId=fresh())["orders"] == []


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 101},
        {"limit": "many"},
        {"status": "SOLD"},
        {"cursor": "made-up"},
        {"cursor": "\u00e4"},
        {"cursor": "WzEsMl0="},
        {"saleId": "a{b}"},
    ],
    ids=str,
)
def test_an_invalid_list_query_is_refused(served: Served, query: dict[str, Any]) -> None:
    answer = served.http.get("/v1/admin/orders", params=query, headers=served.admin)
    refused(answer, 400, "malformed_request")


def test_an_order_shows_its_full_history_without_secrets(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    declined = served.pay(order, decline="REJECT_CARD_COMPANY")
    served.open_success_url(order, declined)
    paid = served.pay(order)
    served.open_success_url(order, paid)
    refund(served, order)
    detail = in_sql(served, order, "REFUNDED")
    events = [entry["what"] for entry in detail["history"] if entry["kind"] == "event"]
    assert events == ["prepared", "claimed", "declined", "claimed", "confirmed", "refunded"]
    assert {entry["kind"] for entry in detail["history"]} >= {"event", "intent", "answer", "refund"}
    times = [entry["at"] for entry in detail["history"]]
    assert times == sorted(times)
    text = str(detail)
    assert paid not in text
    assert declined not in text
    assert "secret" not in text
    assert f"...{paid[-4:]}" in text


def test_an_unknown_order_is_not_found(served: Served) -> None:
    for order_id in ("nothing", "nothing-" + "a" * 24, "x" * 300, "a{b}-" + "a" * 24):
        answer = served.http.get(f"/v1/admin/orders/{order_id}", headers=served.admin)
        refused(answer, 404, "reservation_not_found")


def test_each_change_records_the_operator(served: Served) -> None:
    served_as = {**served.admin, "X-Operator": "Kim, night shift"}
    order = bought(served, served.sale())
    answer = served.http.post(
        f"/v1/admin/orders/{order['orderId']}/refund",
        json={"reason": "damaged parcel", "restock": True},
        headers={**served_as, "Idempotency-Key": secrets.token_hex(8)},
    )
    assert answer.status_code == 200
    detail = in_sql(served, order, "REFUNDED")
    last = [entry for entry in detail["history"] if entry["what"] == "refunded"][-1]
    assert last["facts"]["cause"] == "operator"
    assert (last["facts"]["operator"], last["facts"]["note"]) == (
        "Kim, night shift",
        "damaged parcel",
    )
    assert last["facts"]["explanation"] == (
        "An operator requested it (Kim, night shift: damaged parcel)."
    )


@pytest.mark.parametrize("name", ["x" * 101, "tab\there"])
def test_an_operator_name_must_be_printable_and_short(served: Served, name: str) -> None:
    sale_id = fresh()
    headers = {**served.admin, "X-Operator": name}
    answer = served.http.put(f"{SALES}/{sale_id}", json=sale_document(), headers=headers)
    refused(answer, 400, "malformed_request")
    refused(served.http.get(f"/v1/sales/{sale_id}"), 404, "sale_not_found")
