"""Operators' endpoints: sales, stock, switches, audit, orders and refunds."""

import secrets
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tests.support.service import Served, eventually, item, refused, sale_document

SALES = "/v1/admin/sales"


def fresh() -> str:
    return f"a-{secrets.token_hex(4)}"


def put(
    served: Served, sale_id: str, document: dict[str, Any], etag: str | None = None
) -> httpx.Response:
    headers = {**served.admin, **({"If-Match": etag} if etag is not None else {})}
    return served.http.put(f"{SALES}/{sale_id}", json=document, headers=headers)


def shown(served: Served, sale_id: str) -> httpx.Response:
    return served.http.get(f"{SALES}/{sale_id}", headers=served.admin).raise_for_status()


def change(served: Served, sale_id: str, **changes: Any) -> httpx.Response:
    """An update of a sale that was just read."""
    document = {**served.document(sale_id), **changes}
    return put(served, sale_id, document, shown(served, sale_id).headers["etag"])


def restock(
    served: Served, sale_id: str, delta: int, *, key: str | None = None, **more: Any
) -> httpx.Response:
    return served.http.post(
        f"{SALES}/{sale_id}/stock",
        json={"sku": "a", "delta": delta, "reason": "counted again", **more},
        headers={**served.admin, "Idempotency-Key": key or secrets.token_hex(8)},
    )


def switch(served: Served, sale_id: str, action: str, **body: Any) -> httpx.Response:
    return served.http.post(
        f"{SALES}/{sale_id}/{action}", json=body or {"reason": "a test"}, headers=served.admin
    )


def refund(
    served: Served, order: dict[str, Any], *, key: str | None = None, **more: Any
) -> httpx.Response:
    return served.http.post(
        f"/v1/admin/orders/{order['orderId']}/refund",
        json={"reason": "a test", "restock": True, **more},
        headers={**served.admin, "Idempotency-Key": key or secrets.token_hex(8)},
    )


def bought(served: Served, sale_id: str, **payment: Any) -> dict[str, Any]:
    order = served.hold(sale_id, served.buyer())
    answer = served.open_success_url(order, served.pay(order, **payment))
    assert answer.status_code == 200, answer.text
    return order


def listed(served: Served, **query: Any) -> dict[str, Any]:
    answer = served.http.get("/v1/admin/orders", params=query, headers=served.admin)
    return answer.raise_for_status().json()


def in_sql(served: Served, order: dict[str, Any], status: str) -> dict[str, Any]:
    """The order with its history, once SQL has it in this state."""

    def read_order() -> dict[str, Any]:
        path = f"/v1/admin/orders/{order['orderId']}"
        return served.http.get(path, headers=served.admin).json()

    return eventually(read_order, lambda found: found.get("status") == status)


def test_a_created_sale_is_returned_with_its_counters(served: Served) -> None:
    sale_id = fresh()
    answer = put(served, sale_id, sale_document(virtualAccounts=True, requireAdmission=True))
    assert answer.status_code == 201, answer.text
    sale = answer.json()
    assert (sale["saleId"], sale["status"]) == (sale_id, "open")
    assert (sale["virtualAccounts"], sale["requireAdmission"]) == (True, True)
    assert sale["items"] == [
        {
            "sku": "a",
            "name": "Item a",
            "price": 1000,
            "total": 100,
            "available": 100,
            "held": 0,
            "sold": 0,
            "limitPerBuyer": 10,
        }
    ]
    again = shown(served, sale_id)
    assert again.headers["etag"] == answer.headers["etag"]
    assert again.json()["items"] == sale["items"]


def test_a_repeated_creation_returns_the_same_sale(served: Served) -> None:
    sale_id, document = fresh(), sale_document()
    first = put(served, sale_id, document)
    again = put(served, sale_id, document)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.headers["etag"] == first.headers["etag"]
    assert served.audit(sale_id)["ok"]


def test_a_past_sale_without_units_can_be_created(served: Served) -> None:
    document = sale_document(
        opensAt="2020-01-01T00:00:00Z", closesAt="2020-01-02T00:00:00Z", items=[item("a", total=0)]
    )
    answer = put(served, fresh(), document)
    assert (answer.status_code, answer.json()["status"]) == (201, "closed")


def test_a_sale_of_200_items_with_long_names_can_be_created(served: Served) -> None:
    items = [item(f"s{number}", name="상품" * 100) for number in range(200)]
    answer = put(served, fresh(), sale_document(items=items))
    assert answer.status_code == 201, answer.text
    assert len(answer.json()["items"]) == 200


def test_an_update_with_the_current_etag_changes_the_sale(served: Served) -> None:
    sale_id = served.sale()
    before = shown(served, sale_id).headers["etag"]
    answer = change(served, sale_id, name="Other", items=[item("a", price=500, total=7), item("b")])
    assert answer.status_code == 200, answer.text
    assert answer.headers["etag"] != before
    sale = shown(served, sale_id)
    assert sale.headers["etag"] == answer.headers["etag"]
    assert sale.json()["name"] == "Other"
    assert [(one["sku"], one["price"], one["total"]) for one in sale.json()["items"]] == [
        ("a", 500, 7),
        ("b", 1000, 100),
    ]
    assert served.audit(sale_id)["ok"]


def test_an_update_without_if_match_is_refused(served: Served) -> None:
    sale_id = served.sale()
    before = served.dump(sale_id)
    answer = put(served, sale_id, {**served.document(sale_id), "name": "Other"})
    refused(answer, 428, "precondition_required")
    assert served.dump(sale_id) == before


@pytest.mark.parametrize("etag", ['"v7"', '"v0"', "v1", "*", '"x"', ""])
def test_an_update_with_an_outdated_etag_is_refused(served: Served, etag: str) -> None:
    sale_id = served.sale()
    before = served.dump(sale_id)
    answer = put(served, sale_id, {**served.document(sale_id), "name": "Other"}, etag)
    refused(answer, 412, "precondition_failed")
    assert served.dump(sale_id) == before


def test_only_the_first_of_two_updates_with_one_etag_succeeds(served: Served) -> None:
    sale_id = served.sale()
    etag = shown(served, sale_id).headers["etag"]
    document = served.document(sale_id)
    assert put(served, sale_id, {**document, "name": "One"}, etag).status_code == 200
    refused(put(served, sale_id, {**document, "name": "Two"}, etag), 412, "precondition_failed")
    # The winner's own repeat, after a reply that was lost, is no conflict.
    assert put(served, sale_id, {**document, "name": "One"}, etag).status_code == 200
    assert shown(served, sale_id).json()["name"] == "One"


def test_an_update_of_an_unknown_sale_fails_its_precondition(served: Served) -> None:
    sale_id = fresh()
    refused(put(served, sale_id, sale_document(), '"v1"'), 412, "precondition_failed")
    answer = served.http.get(f"{SALES}/{sale_id}", headers=served.admin)
    refused(answer, 404, "sale_not_found")


@pytest.mark.parametrize("changes", [{"currency": "USD"}, {"holdPolicy": "success"}])
def test_currency_and_hold_policy_cannot_change(served: Served, changes: dict[str, str]) -> None:
    sale_id = served.sale()
    refused(change(served, sale_id, **changes), 400, "invalid_sale")


@pytest.mark.parametrize(
    "changes",
    [
        {"currency": "USD"},
        {"currency": "JPY"},
        {"items": [item("a"), item("b", price=99)]},
        {"items": [item("a", price=1)]},
        {"items": [item("a", price=199)], "virtualAccounts": True},
    ],
    ids=str,
)
def test_a_sale_outside_the_gateway_limits_is_refused(
    served: Served, changes: dict[str, Any]
) -> None:
    """The PG takes won, 100 or more, and 200 or more into a virtual account.

    It would refuse each buyer of another sale at the confirm.
    """
    sale_id = fresh()
    problem = refused(put(served, sale_id, sale_document(**changes)), 400, "invalid_sale")
    assert "payment gateway" in problem["detail"]
    refused(served.http.get(f"/v1/sales/{sale_id}"), 404, "sale_not_found")


def test_the_minimum_price_is_that_of_the_gateway(served: Served) -> None:
    sale_id = served.sale(items=[item("a", price=100)])
    order = served.hold(sale_id, served.buyer(), amount=100)
    assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
    problem = refused(change(served, sale_id, items=[item("a", price=99)]), 400, "invalid_sale")
    assert problem["sku"] == "a"


def test_the_minimum_of_a_virtual_account_is_that_of_the_gateway(served: Served) -> None:
    sale_id = served.sale(items=[item("a", price=200)], virtualAccounts=True)
    order = served.hold(sale_id, served.buyer(), amount=200)
    paid = served.open_success_url(order, served.pay(order, method="virtual_account"))
    assert paid.json()["status"] == "AWAITING_DEPOSIT"
    refused(change(served, sale_id, items=[item("a", price=199)]), 400, "invalid_sale")


def test_a_total_below_held_plus_sold_is_refused(served: Served) -> None:
    sale_id = served.sale()
    bought(served, sale_id)
    served.hold(sale_id, served.buyer(), items=[("a", 2)], amount=2000)
    problem = refused(change(served, sale_id, items=[item("a", total=2)]), 409, "total_too_low")
    assert problem["sku"] == "a"
    assert change(served, sale_id, items=[item("a", total=3)]).status_code == 200
    assert served.stock(sale_id) == (0, 2, 1)


def test_an_item_with_units_in_use_cannot_be_removed(served: Served) -> None:
    sale_id = served.sale(items=[item("a"), item("b")])
    order = served.hold(sale_id, served.buyer())
    problem = refused(change(served, sale_id, items=[item("b")]), 400, "invalid_sale")
    assert problem["sku"] == "a"
    served.release(order)
    assert change(served, sale_id, items=[item("b")]).status_code == 200
    refused(served.prepare(sale_id, served.buyer()), 404, "sku_not_found")
    assert served.audit(sale_id)["ok"]


@pytest.mark.parametrize(
    "changes",
    [
        {"closesAt": "2020-01-01T00:00:00Z"},
        {"holdSeconds": 0},
        {"holdSeconds": -1},
        {"holdSeconds": 86_401},
        {"items": []},
        {"items": [item("a"), item("a")]},
        {"items": [item(f"s{number}") for number in range(201)]},
    ],
    ids=",".join,
)
def test_an_inconsistent_sale_is_refused(served: Served, changes: dict[str, Any]) -> None:
    sale_id = fresh()
    refused(put(served, sale_id, sale_document(**changes)), 400, "invalid_sale")
    refused(served.http.get(f"/v1/sales/{sale_id}"), 404, "sale_not_found")


@pytest.mark.parametrize(
    "changes",
    [
        {"items": [item("a", total=-1)]},
        {"items": [item("a", price=0)]},
        {"items": [item("a", price=10**13)]},
        {"items": [item("a", total=10**10)]},
        {"items": [item("a", limitPerBuyer=0)]},
        {"items": [item("a{b}")]},
        {"items": [item("a b")]},
        {"items": [item("")]},
        {"items": [item("x" * 65)]},
        {"items": [item("a", name="")]},
        {"items": [item("a", colour="blue")]},
        {"items": [item("a", price="1000")]},
        {"items": {"a": 1}},
        {"name": ""},
        {"name": "x" * 201},
        {"currency": "won"},
        {"currency": "KRW\n"},
        {"opensAt": "tomorrow"},
        {"opensAt": 1},
        {"holdPolicy": "never"},
        {"holdSeconds": "300"},
        {"holdSeconds": 1.5},
        {"virtualAccounts": "yes"},
        {"surprise": True},
    ],
    ids=lambda changes: str(changes).split("colour")[0][:60],
)
def test_a_malformed_sale_is_refused(served: Served, changes: dict[str, Any]) -> None:
    sale_id = fresh()
    answer = put(served, sale_id, sale_document(**changes))
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] in {"malformed_request", "invalid_sale"}
    refused(served.http.get(f"/v1/sales/{sale_id}"), 404, "sale_not_found")


@pytest.mark.parametrize("sale_id", ["x" * 33, "a{b}", "a b", "a.b", "a%0a", "\u00e4"])
def test_an_invalid_sale_id_is_not_created(served: Served, sale_id: str) -> None:
    assert put(served, sale_id, sale_document()).status_code == 404


def test_a_restock_adds_and_withdraws_units(served: Served) -> None:
    sale_id = served.sale()
    served.hold(sale_id, served.buyer())
    answer = restock(served, sale_id, 5)
    assert answer.status_code == 200, answer.text
    (one,) = answer.json()["items"]
    assert (one["total"], one["available"], one["held"]) == (105, 104, 1)
    assert restock(served, sale_id, -104).status_code == 200
    assert served.stock(sale_id) == (0, 1, 0)
    assert served.audit(sale_id)["ok"]


def test_held_and_sold_units_cannot_be_withdrawn_by_restock(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=3)])
    bought(served, sale_id)
    served.hold(sale_id, served.buyer())
    problem = refused(restock(served, sale_id, -2), 409, "insufficient_available")
    assert problem["available"] == {"a": 1}
    assert served.stock(sale_id) == (1, 1, 1)


def test_a_restock_is_made_once_per_key(served: Served) -> None:
    sale_id = served.sale()
    answers = [restock(served, sale_id, 5, key="k") for _ in range(3)]
    assert {answer.status_code for answer in answers} == {200}
    assert served.stock(sale_id) == (105, 0, 0)
    refused(restock(served, sale_id, 6, key="k"), 422, "idempotency_key_reused")
    refused(restock(served, sale_id, 5, key="k", sku="b"), 422, "idempotency_key_reused")
    assert served.stock(sale_id) == (105, 0, 0)


def test_a_refused_restock_can_be_retried_with_its_key(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=1)])
    order = served.hold(sale_id, served.buyer())
    refused(restock(served, sale_id, -1, key="k"), 409, "insufficient_available")
    served.release(order)
    assert restock(served, sale_id, -1, key="k").status_code == 200
    assert served.stock(sale_id) == (0, 0, 0)


def test_a_restock_above_the_maximum_is_refused(served: Served) -> None:
    sale_id = served.sale()
    refused(restock(served, sale_id, 1_000_000_000), 400, "invalid_sale")
    assert served.stock(sale_id) == (100, 0, 0)


@pytest.mark.parametrize(
    "body",
    [
        {"delta": 0},
        {"delta": 1.5},
        {"delta": "1"},
        {"delta": 10**12},
        {"sku": "a b"},
        {"sku": None},
        {"reason": ""},
        {"reason": "x" * 201},
        {"reason": "a\0b"},
        {"note": "x"},
    ],
    ids=str,
)
def test_a_malformed_restock_is_refused(served: Served, body: dict[str, Any]) -> None:
    sale_id = served.sale()
    before = served.dump(sale_id)
    answer = restock(served, sale_id, body.pop("delta", 1), **body)
    refused(answer, 400, "malformed_request")
    assert served.dump(sale_id) == before


def test_a_restock_needs_a_key_and_a_known_item(served: Served) -> None:
    sale_id = served.sale()
    body = {"sku": "a", "delta": 1, "reason": "x"}
    answer = served.http.post(f"{SALES}/{sale_id}/stock", json=body, headers=served.admin)
    refused(answer, 400, "malformed_request")
    refused(restock(served, sale_id, 1, sku="z"), 404, "sku_not_found")
    refused(restock(served, fresh(), 1), 404, "sale_not_found")


def test_a_paused_sale_refuses_prepares_and_accepts_payments(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    answer = switch(served, sale_id, "pause")
    assert (answer.status_code, answer.json()["status"]) == (200, "paused")
    assert "retry-after" in served.prepare(sale_id, served.buyer()).headers
    refused(served.prepare(sale_id, served.buyer()), 503, "sale_paused")
    assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
    answer = switch(served, sale_id, "resume")
    assert (answer.status_code, answer.json()["status"]) == (200, "open")
    served.hold(sale_id, served.buyer())


def test_a_repeated_switch_changes_nothing(served: Served) -> None:
    sale_id = served.sale()
    for action in ("resume", "pause", "close"):
        switch(served, sale_id, action)
        before = served.dump(sale_id)
        assert switch(served, sale_id, action).status_code == 200
        assert served.dump(sale_id) == before


def test_a_closed_sale_stays_closed(served: Served) -> None:
    sale_id = served.sale()
    answer = switch(served, sale_id, "close")
    assert (answer.status_code, answer.json()["status"]) == (200, "closed")
    refused(served.prepare(sale_id, served.buyer()), 410, "sale_closed")
    for action in ("pause", "resume"):
        refused(switch(served, sale_id, action), 410, "sale_closed")


@pytest.mark.parametrize("action", ["pause", "resume", "close"])
def test_a_switch_records_its_reason(served: Served, action: str) -> None:
    sale_id = served.sale()
    for body in ({"reason": ""}, {"reason": "\0"}, {"why": "x"}, {"reason": "x", "more": 1}):
        refused(switch(served, sale_id, action, **body), 400, "malformed_request")
    refused(switch(served, fresh(), action), 404, "sale_not_found")


def test_an_audit_reports_matching_counters(served: Served) -> None:
    sale_id = served.sale(items=[item("a"), item("b")])
    bought(served, sale_id)
    served.hold(sale_id, served.buyer(), items=[("a", 2)], amount=2000)
    report = served.audit(sale_id)
    assert set(report) == {"ok", "checkedAt", "lag", "skus", "problems"}
    assert (report["ok"], report["lag"], report["problems"]) == (True, 0, [])
    checked = datetime.fromisoformat(report["checkedAt"])
    assert abs((checked - datetime.now(UTC)).total_seconds()) < 60
    assert report["skus"][0] == {
        "sku": "a",
        "total": 100,
        "available": 97,
        "held": 2,
        "confirming": 0,
        "sold": 1,
        "ok": True,
    }
    answer = served.http.get(f"{SALES}/{fresh()}/audit", headers=served.admin)
    refused(answer, 404, "sale_not_found")


def test_an_audit_finds_a_manually_edited_counter(served: Served) -> None:
    sale_id = served.sale()
    assert served.audit(sale_id)["ok"]
    with served.redis() as client:
        client.hincrby(f"rsv:{{{sale_id}}}:stock:a", "available", 1)
        report = served.audit(sale_id)
        # A sale with inconsistent counters makes the service unready, and other tests share it.
        client.hincrby(f"rsv:{{{sale_id}}}:stock:a", "available", -1)
    assert report["ok"] is False
    assert report["skus"][0]["ok"] is False
    assert any("a: available" in problem for problem in report["problems"])


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
