"""Operators create and change sales."""

from typing import Any

import pytest

from tests.http.admin_calls import SALES, bought, change, fresh, put, shown
from tests.support.service import Served, item, refused, sale_document


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
    # The winner's own repeat, after a reply that was lost, is not a conflict.
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
