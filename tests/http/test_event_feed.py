"""The event feed over HTTP."""

from typing import Any

from tests.http.admin_calls import bought, refund
from tests.support.service import Served, eventually, refused

PATH = "/v1/admin/events"


def page(served: Served, **query: Any) -> dict[str, Any]:
    answer = served.http.get(PATH, params=query, headers=served.admin)
    return answer.raise_for_status().json()


def test_a_purchase_and_its_refund_are_in_the_feed(served: Served) -> None:
    sale_id = served.sale()
    order = bought(served, sale_id)
    assert refund(served, order).status_code == 200
    found = eventually(
        lambda: page(served, saleId=sale_id)["events"],
        lambda events: any(event["type"] == "order.refunded" for event in events),
    )
    of_order = [event for event in found if event["orderId"] == order["orderId"]]
    assert [event["type"] for event in of_order] == [
        "reservation.held",
        "reservation.confirming",
        "order.confirmed",
        "order.refunded",
    ]
    assert of_order[0]["data"]["reservation"]["status"] == "HELD"
    assert set(of_order[0]) == {
        "id",
        "saleId",
        "partition",
        "seq",
        "epoch",
        "type",
        "at",
        "orderId",
        "data",
    }
    ids = [event["id"] for event in found]
    assert ids == sorted(set(ids))


def test_next_continues_after_the_last_event(served: Served) -> None:
    sale_id = served.sale()
    served.hold(sale_id, served.buyer())
    eventually(lambda: page(served, saleId=sale_id)["events"], lambda events: len(events) >= 3)
    first = page(served, saleId=sale_id, limit=1)
    second = page(served, saleId=sale_id, limit=1, after=first["next"])
    assert first["events"][0]["id"] < second["events"][0]["id"]
    assert first["next"] == first["events"][0]["id"]


def test_a_request_waits_for_the_next_event(served: Served) -> None:
    sale_id = served.sale()
    eventually(lambda: page(served, saleId=sale_id)["events"], lambda events: len(events) >= 2)
    after = page(served, saleId=sale_id)["next"]
    served.hold(sale_id, served.buyer())
    found = page(served, saleId=sale_id, after=after, wait=25)
    assert [event["type"] for event in found["events"]] == ["reservation.held"]


def test_an_invalid_position_is_refused(served: Served) -> None:
    answer = served.http.get(PATH, params={"after": "-1"}, headers=served.admin)
    refused(answer, 400, "malformed_request")


def test_the_feed_requires_an_operator(served: Served) -> None:
    refused(served.http.get(PATH), 401, "unauthenticated")
    refused(served.http.get(PATH, headers=served.buyer()), 403, "forbidden")
