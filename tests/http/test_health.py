"""Health checks and metrics: liveness, readiness, and the counters."""

import re

import pytest

from tests.support.service import Served


def test_liveness_needs_no_other_service(served: Served) -> None:
    answer = served.http.get("/health/live")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


def test_a_service_able_to_hold_is_ready(served: Served) -> None:
    answer = served.http.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


def test_counters_are_exposed_in_prometheus_format(served: Served) -> None:
    served.hold(served.sale(), served.buyer())
    served.http.get("/no/such/path")
    answer = served.http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    counted = answer.text
    assert re.search(r'_count\{.*operation="prepareReservation".*\} [1-9]', counted)
    # An unknown path makes no series of its own: their number has no bound.
    assert "no/such/path" not in counted
    assert 'operation="other"' in counted


def test_metrics_contain_no_buyer_and_no_order(served: Served) -> None:
    buyer_id, buyer = served.named_buyer()
    order = served.hold(served.sale(), buyer)
    counted = served.http.get("/metrics").text
    assert buyer_id not in counted
    assert order["orderId"] not in counted


def test_each_response_has_a_request_id(served: Served) -> None:
    given = {"X-Request-Id": "shop-12345678"}
    assert served.http.get("/v1/sales", headers=given).headers["x-request-id"] == "shop-12345678"
    made = {served.http.get("/v1/sales").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("given", ["short", "x" * 65, "a b c d e f g", 'a"b"c"d"e"f'])
def test_an_invalid_request_id_is_replaced(served: Served, given: str) -> None:
    answer = served.http.get("/v1/sales", headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] != given


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/result", "text/html"),
        ("/docs", "text/html"),
        ("/schema/openapi.json", "json"),
    ],
)
def test_the_services_own_pages_are_served(served: Served, path: str, kind: str) -> None:
    answer = served.http.get(path)
    assert answer.status_code == 200
    assert kind in answer.headers["content-type"]


def test_the_pages_have_a_strict_content_security_policy(served: Served) -> None:
    answer = served.http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
