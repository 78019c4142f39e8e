"""Operators restock, pause, close and audit sales."""

from datetime import UTC, datetime
from typing import Any

import pytest

from tests.http.admin_calls import SALES, bought, fresh, restock, switch
from tests.support.service import Served, item, refused


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
