"""Sales as shoppers see them: list, one, and the live stock."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.support.service import Served, eventually, item, refused

MEMBERS = {
    "saleId",
    "name",
    "currency",
    "status",
    "opensAt",
    "closesAt",
    "holdSeconds",
    "holdPolicy",
    "serverTime",
    "items",
}
ITEM_MEMBERS = {"sku", "name", "price", "total", "available", "limitPerBuyer"}


def soon(**delta: float) -> str:
    return (datetime.now(UTC) + timedelta(**delta)).isoformat()


@contextmanager
def watching(served: Served, sale_id: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a sale, each with the moment at which it came."""
    with served.http.stream("GET", f"/v1/sales/{sale_id}/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events_of(answer)


def events_of(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    event: dict[str, Any] = {}
    for line in answer.iter_lines():
        name, _, value = line.partition(":")
        if not line and event:
            yield event | {"data": json.loads(event["data"]), "at": time.monotonic()}
            event = {}
        elif name:
            event[name] = value.removeprefix(" ")


def listed(served: Served, limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    wanted: dict[str, Any] = {"limit": limit}
    while True:
        answer = served.http.get("/v1/sales", params=wanted)
        assert answer.status_code == 200
        page = answer.json()
        assert len(page["sales"]) <= limit
        found += page["sales"]
        if page["nextCursor"] is None:
            return found
        wanted["cursor"] = page["nextCursor"]


@pytest.mark.parametrize("limit", [3, 100])
def test_each_sale_is_listed_once(served: Served, limit: int) -> None:
    made = {served.sale() for _ in range(7)}

    def has_all(found: list[dict[str, Any]]) -> bool:
        return made <= {sale["saleId"] for sale in found}

    # Another process may have made them: a list is at most a second old.
    found = eventually(lambda: listed(served, limit), has_all)
    assert len(found) == len({sale["saleId"] for sale in found})
    assert all(sale.keys() >= MEMBERS for sale in found)
    ranks = [{"scheduled": 1, "closed": 2}.get(sale["status"], 0) for sale in found]
    assert ranks == sorted(ranks), "live ones first, then those to come, then those that are over"


@pytest.mark.parametrize("query", ["cursor=made-up", "cursor=", "limit=0", "limit=101", "limit=x"])
def test_a_foreign_cursor_is_refused(served: Served, query: str) -> None:
    answer = served.http.get(f"/v1/sales?{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_request")


def test_a_sale_is_shown_with_its_stock(served: Served) -> None:
    sale_id = served.sale(name="Mugs", items=[item("a", total=5), item("b.c-d_1", price=700)])
    served.hold(sale_id, served.buyer())
    answer = served.http.get(f"/v1/sales/{sale_id}")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    sale = answer.json()
    assert sale.keys() >= MEMBERS
    assert (sale["saleId"], sale["name"], sale["currency"]) == (sale_id, "Mugs", "KRW")
    assert (sale["status"], sale["holdSeconds"], sale["holdPolicy"]) == ("open", 300, "prepare")
    assert all(one.keys() >= ITEM_MEMBERS for one in sale["items"])
    first, second = sale["items"]
    assert (first["sku"], first["total"], first["available"]) == ("a", 5, 4)
    assert (second["sku"], second["price"], second["limitPerBuyer"]) == ("b.c-d_1", 700, 10)


def test_times_are_in_utc_with_milliseconds(served: Served) -> None:
    sale_id = served.sale(opensAt="2026-01-02T03:04:05+09:00", closesAt="2099-01-01T00:00:00.5Z")
    sale = served.http.get(f"/v1/sales/{sale_id}").json()
    assert sale["opensAt"] == "2026-01-01T18:04:05.000Z"
    assert sale["closesAt"] == "2099-01-01T00:00:00.500Z"
    now = datetime.fromisoformat(sale["serverTime"])
    assert abs((datetime.now(UTC) - now).total_seconds()) < 30


def test_the_status_follows_the_clock_the_stock_and_the_operator(served: Served) -> None:
    def status(sale_id: str) -> str:
        return served.http.get(f"/v1/sales/{sale_id}").json()["status"]

    assert status(served.sale(opensAt=soon(hours=1))) == "scheduled"
    assert status(served.sale(opensAt=soon(hours=-2), closesAt=soon(hours=-1))) == "closed"
    sale_id = served.sale(items=[item("a", total=1)])
    assert status(sale_id) == "open"
    served.hold(sale_id, served.buyer())
    assert status(sale_id) == "sold_out"
    for action, shown in (("pause", "paused"), ("resume", "sold_out"), ("close", "closed")):
        served.http.post(
            f"/v1/admin/sales/{sale_id}/{action}", json={"reason": "test"}, headers=served.admin
        ).raise_for_status()
        assert status(sale_id) == shown


@pytest.mark.parametrize("path", ["", "/events", "/reservations"])
@pytest.mark.parametrize("sale_id", ["nothing", "x" * 33, "a{b}", "a b", "a%0ab", "\u00e4"])
def test_an_unknown_sale_is_not_found(served: Served, sale_id: str, path: str) -> None:
    answer = served.http.get(f"/v1/sales/{sale_id}{path}", headers=served.buyer())
    refused(answer, 404, "sale_not_found")


def test_an_expired_token_does_not_block_a_public_endpoint(served: Served) -> None:
    answer = served.http.get(
        f"/v1/sales/{served.sale()}", headers={"Authorization": "Bearer stale"}
    )
    assert answer.status_code == 200


def test_subscribers_get_the_stock_at_once(served: Served) -> None:
    sale_id = served.sale(items=[item("a"), item("b", total=3)])
    with watching(served, sale_id) as events:
        first, second = itertools.islice(events, 2)
    assert first["event"] == second["event"] == "stock"
    assert first["data"] == {"sku": "a", "available": 100, "held": 0, "sold": 0}
    assert second["data"] == {"sku": "b", "available": 3, "held": 0, "sold": 0}


def test_subscribers_get_only_changes_of_their_items(served: Served) -> None:
    sale_id = served.sale(items=[item("a"), item("b")])
    with watching(served, sale_id) as events:
        list(itertools.islice(events, 2))
        order = served.hold(sale_id, served.buyer())
        assert next(events)["data"] == {"sku": "a", "available": 99, "held": 1, "sold": 0}
        served.open_success_url(order, served.pay(order))
        seen = [next(events)["data"]]
        # A read between claim and finish sees the same counters, so sold is the next change.
        assert seen == [{"sku": "a", "available": 99, "held": 0, "sold": 1}]


def test_subscribers_get_at_most_ten_events_a_second(served: Served) -> None:
    sale_id = served.sale(items=[item("a", limitPerBuyer=100)])
    received: list[dict[str, Any]] = []
    with watching(served, sale_id) as events:
        next(events)
        began = time.monotonic()
        for _ in range(60):
            served.hold(sale_id, served.buyer())
        while not received or received[-1]["data"]["held"] < 60:
            received.append(next(events))
    seconds = received[-1]["at"] - began
    # One more for the tick that was in progress when the first hold came.
    assert len(received) <= seconds * 10 + 2
    held = [event["data"]["held"] for event in received]
    assert held == sorted(set(held))


def test_two_subscribers_get_the_same_events(served: Served) -> None:
    sale_id = served.sale()
    with watching(served, sale_id) as one, watching(served, sale_id) as other:
        assert next(one)["data"] == next(other)["data"]
        served.hold(sale_id, served.buyer())
        assert (
            next(one)["data"]
            == next(other)["data"]
            == ({"sku": "a", "available": 99, "held": 1, "sold": 0})
        )
