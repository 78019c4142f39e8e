"""Headers and methods of every kind of answer: HEAD, types, caches, framing, problem documents."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.http.routes.pages import STATIC
from tests.support.service import Served, refused, running_service

SHOP = "https://shop.example"
PAGES = sorted(str(page.relative_to(STATIC).with_suffix("")) for page in STATIC.rglob("*.html"))


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service that buyers reach over TLS, with a storefront of another origin."""
    with running_service(
        tmp_path_factory.mktemp("public"),
        RESERVATION_WORKERS="1",
        RESERVATION_PUBLIC_URL="https://stock.example",
        RESERVATION_CORS_ORIGINS=SHOP,
    ) as service:
        yield service


def head_of(answer: httpx.Response) -> tuple[int, dict[str, str]]:
    """Status and headers, but for those of the moment."""
    of_the_moment = {"date", "x-request-id", "content-length", "transfer-encoding"}
    headers = {name: value for name, value in answer.headers.items() if name not in of_the_moment}
    return answer.status_code, headers


def _head_and_its_get(
    served: Served, path: str, headers: dict[str, str]
) -> tuple[httpx.Response, httpx.Response]:
    """A HEAD and a GET of the same length.

    The service keeps working between two requests: an order expires, a counter grows.
    A HEAD whose length is wrong never equals that of a GET.
    """
    lengths: list[tuple[str, int]] = []
    for _ in range(50):
        got = served.http.get(path, headers=headers)
        head = served.http.head(path, headers=headers)
        length = head.headers.get("content-length")
        if length is None or int(length) == len(got.content):
            return head, got
        lengths.append((length, len(got.content)))
    raise AssertionError(f"lengths of HEAD and GET {path}: {lengths}")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/ops",
        "/docs",
        "/result",
        "/sales/SALE",
        "/static/reservation.js",
        "/docs-assets/swagger-ui.css",
        "/schema/openapi.json",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/v1/sales",
        "/v1/sales/SALE",
        "/v1/sales/SALE/reservations",
        "/v1/reservations/ORDER",
        "/v1/reservations/none",
        "/v1/admin/orders",
        "/v1/admin/sales/SALE",
        "/no/such/path",
    ],
)
def test_head_equals_get_without_the_body(served: Served, path: str) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer)
    path = path.replace("SALE", sale_id).replace("ORDER", order["orderId"])
    headers = served.admin if "/admin/" in path else buyer
    head, got = _head_and_its_get(served, path, headers)
    assert head_of(head) == head_of(got)
    assert head.content == b""
    # The connection is in order behind it.
    assert served.http.get("/health/live").json()["status"] == "ok"


def test_head_of_a_stream_returns_at_once(served: Served) -> None:
    answer = served.http.head(f"/v1/sales/{served.sale()}/events")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert served.http.get("/health/live").json()["status"] == "ok"


@pytest.mark.parametrize("slashes", ["/v1/payments/toss/", "//v1//payments/toss//"])
def test_head_is_not_allowed_on_the_return_urls(served: Served, slashes: str) -> None:
    order = served.hold(served.sale(), served.buyer())
    url = served.success_url(order, served.pay(order))
    for given in (url, order["payment"]["failUrl"]):
        address = given.replace("/v1/payments/toss/", slashes)
        for again in (address, address.replace("?", "/?")):
            answer = served.http.head(again)
            assert answer.status_code == 405
            assert answer.headers["allow"] == "GET, OPTIONS"
    assert served.get_reservation(order)["status"] == "HELD"
    assert served.ledger(order)["charged"] == 0


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_served_only_under_its_own_path(served: Served, page: str) -> None:
    for path in (f"/static/{page}.html", f"/static/{page}.HTML", f"/static//{page}.html/"):
        refused(served.http.get(path), 404, "not_found")


def test_each_response_has_its_declared_content_type(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    answers = [
        served.http.get("/"),
        served.http.get("/static/reservation.js"),
        served.http.get("/docs-assets/swagger-ui-bundle.js"),
        served.http.get("/schema/openapi.json"),
        served.http.get("/v1/sales"),
        served.prepare(sale_id, buyer),
        served.prepare(sale_id, buyer, amount=1),
        served.http.get("/no/such/path"),
        served.http.get("/health/ready"),
    ]
    for answer in answers:
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], answer.request.url
        assert "strict-transport-security" not in answer.headers


def test_operator_responses_are_not_cacheable(served: Served) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    order = served.hold(sale_id, buyer)
    assert served.audit(sale_id)["lag"] == 0
    for path in (
        "/v1/admin/orders",
        f"/v1/admin/orders/{order['orderId']}",
        f"/v1/admin/sales/{sale_id}",
        f"/v1/admin/sales/{sale_id}/audit",
        f"/v1/admin/sales/{sale_id}/items/a/why",
        "/v1/admin/orders/none",
        "/v1/admin/none",
        "/health/ready",
        "/health/live",
        "/metrics",
    ):
        answer = served.http.get(path, headers=served.admin)
        assert answer.headers.get_list("cache-control") == ["no-store"], path


def test_a_service_over_tls_sends_hsts(public: Served) -> None:
    sale_id, buyer = public.sale(), public.buyer()
    for answer in (
        public.http.get("/"),
        public.http.get("/v1/sales"),
        public.prepare(sale_id, buyer),
        public.http.get("/no/such/path"),
    ):
        assert answer.headers["strict-transport-security"] == "max-age=31536000"


@pytest.mark.parametrize("origin", [SHOP, "https://other.example", None])
def test_responses_vary_with_the_origin_for_every_caller(
    public: Served, origin: str | None
) -> None:
    headers = {"Origin": origin} if origin else {}
    for path in ("/v1/sales", "/static/reservation.js", "/no/such/path", "/health/live"):
        answer = public.http.get(path, headers=headers)
        assert answer.headers.get_list("vary") == ["Origin"], path


CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/no/such/path", {}),
    ("GET", "/schema/x", {}),
    ("GET", "/schema/openapi.yaml", {}),
    ("GET", "/static/none.js", {}),
    ("GET", "/static/", {}),
    ("GET", "/static/%00", {}),
    ("GET", "/docs-assets/none", {}),
    ("GET", "/sales", {}),
    ("PUT", "/v1/sales", {}),
    ("DELETE", "/", {}),
    ("TRACE", "/v1/sales", {}),
    ("PATCH", "/health/live", {}),
    ("OPTIONS", "/no/such/path", {}),
    ("GET", "/v1/sales/%ff", {}),
    ("GET", "/v1/reservations/x?wait=abc", {}),
    ("GET", "/v1/sales", {"headers": {"Host": "a b"}}),
    ("POST", "/v1/payments/toss/webhooks", {"content": b"x" * 100_000}),
    ("POST", "/v1/sales/x/reservations", {"content": b"{"}),
]


@pytest.mark.parametrize(("method", "path", "more"), CALLS, ids=lambda value: str(value)[:40])
def test_each_refusal_is_a_problem_document(
    served: Served, method: str, path: str, more: dict[str, Any]
) -> None:
    answer = served.http.request(method, path, **more)
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["code"]
    if answer.status_code == 405:
        assert answer.headers["allow"]
