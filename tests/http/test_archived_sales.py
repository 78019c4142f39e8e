"""An archived sale: its reads and its orders stay, every change is refused."""

from typing import Any

from tests.http.admin_calls import SALES, bought, change, fresh, listed, refund, restock, switch
from tests.support.service import Served, eventually, refused


def archive(served: Served, sale_id: str) -> dict[str, Any]:
    """Close and archive; SQL may be a moment behind."""
    switch(served, sale_id, "close").raise_for_status()
    answer = eventually(
        lambda: switch(served, sale_id, "archive"),
        lambda found: found.status_code != 409,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_archived_sale_is_shown_and_leaves_the_list(served: Served) -> None:
    sale_id = served.sale()
    order = bought(served, sale_id)
    sale = archive(served, sale_id)
    assert (sale["status"], sale["items"][0]["sold"]) == ("closed", 1)
    assert served.http.get(f"/v1/sales/{sale_id}").json()["items"] == sale["items"]
    page = eventually(
        lambda: served.http.get("/v1/sales", params={"limit": 100}).json()["sales"],
        lambda found: sale_id not in {one["saleId"] for one in found},
    )
    assert sale_id not in {one["saleId"] for one in page}
    assert served.get_reservation(order)["status"] == "CONFIRMED"
    assert [one["orderId"] for one in listed(served, saleId=sale_id)["orders"]] == [
        order["orderId"]
    ]
    assert served.audit(sale_id) | {"checkedAt": None} == {
        "ok": True,
        "checkedAt": None,
        "lag": 0,
        "problems": [],
        "skus": [
            {
                "sku": "a",
                "total": 100,
                "available": 99,
                "held": 0,
                "confirming": 0,
                "sold": 1,
                "ok": True,
            }
        ],
    }


def test_changes_of_an_archived_sale_are_refused(served: Served) -> None:
    sale_id = served.sale()
    archive(served, sale_id)
    for answer in (
        switch(served, sale_id, "resume"),
        restock(served, sale_id, 1),
        change(served, sale_id, name="Another name"),
    ):
        refused(answer, 410, "sale_closed")
    answer = served.prepare(sale_id, served.buyer())
    refused(answer, 410, "sale_closed")


def test_an_order_of_an_archived_sale_is_refunded(served: Served) -> None:
    sale_id = served.sale()
    order = bought(served, sale_id)
    archive(served, sale_id)
    assert refund(served, order).status_code in (200, 202)
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "REFUNDED")
    ledger = served.ledger(order)
    assert ledger["charged"] == ledger["cancelled"]
    assert served.audit(sale_id)["problems"] == []


def test_only_a_closed_sale_without_holds_is_archived(served: Served) -> None:
    sale_id = served.sale()
    answer = switch(served, sale_id, "archive")
    refused(answer, 409, "sale_not_settled")
    served.hold(sale_id, served.buyer())
    switch(served, sale_id, "close").raise_for_status()
    answer = eventually(
        lambda: switch(served, sale_id, "archive"),
        lambda found: found.json().get("orders") == 1,
    )
    refused(answer, 409, "sale_not_settled")


def test_an_unknown_sale_and_a_caller_without_the_key_are_refused(served: Served) -> None:
    refused(switch(served, fresh(), "archive"), 404, "sale_not_found")
    refused(served.http.post(f"{SALES}/{fresh()}/archive"), 401, "unauthenticated")
