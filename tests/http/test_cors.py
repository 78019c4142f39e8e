"""CORS: cross-origin headers on every answer, and the redirects of browsers."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.support.service import Served, refused, running_service

pytestmark = pytest.mark.system

SHOP = "https://shop.example"
EXPOSED = {"idempotent-replayed", "retry-after", "x-request-id"}
SENT = {"authorization", "idempotency-key", "x-reservation-token", "content-type"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with configured storefronts, and a strict rate limit."""
    with running_service(
        tmp_path_factory.mktemp("shop"),
        RESERVATION_WORKERS="1",
        RESERVATION_CORS_ORIGINS=f"{SHOP},https://other.example:8443",
        RESERVATION_STOREFRONT_URL=f"{SHOP}/sale",
        RESERVATION_PREPARE_RATE="2/min",
        RESERVATION_GUEST_RATE="3/min",
    ) as service:
        yield service


def names(header: str) -> set[str]:
    return {name.strip().lower() for name in header.split(",")}


@pytest.mark.parametrize("origin", [SHOP, "https://other.example:8443"])
def test_a_preflight_of_the_storefront_is_allowed(shop: Served, origin: str) -> None:
    answer = shop.http.options(
        "/v1/sales/any/reservations",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": ",".join(sorted(SENT)),
        },
    )
    assert answer.is_success
    assert answer.headers["access-control-allow-origin"] == origin
    assert names(answer.headers["access-control-allow-headers"]) >= SENT
    assert names(answer.headers["access-control-allow-methods"]) >= {"get", "post"}
    assert answer.headers["access-control-max-age"] == "7200"


def test_a_shop_page_can_load_the_javascript_module(shop: Served) -> None:
    answer = shop.http.get("/static/reservation.js", headers={"Origin": SHOP})
    assert answer.headers["access-control-allow-origin"] == SHOP
    assert answer.headers["content-type"].startswith("text/javascript")


def test_the_storefront_can_read_responses_and_refusals(shop: Served) -> None:
    sale_id, buyer = shop.sale(), shop.buyer()
    origin = {"Origin": SHOP}
    answers = [
        shop.http.get("/v1/sales", headers=origin),
        shop.prepare(sale_id, {**buyer, **origin}, key="k"),
        shop.prepare(sale_id, {**buyer, **origin}, key="k"),
        shop.prepare(sale_id, {**buyer, **origin}),
        shop.prepare(sale_id, origin),
        shop.prepare("nothing", {**shop.buyer(), **origin}),
        shop.http.get("/v1/reservations/x", headers=origin),
        shop.http.get("/v1/payments/toss/success", headers=origin),
        shop.http.get("/no/such/path", headers=origin),
        shop.http.put("/v1/sales", headers=origin),
        shop.http.post("/v1/guests", headers=origin),
        shop.http.post(f"/v1/sales/{sale_id}/reservations", content=b" " * 20_000, headers=origin),
    ]
    statuses = [200, 201, 201, 429, 401, 404, 401, 403, 404, 405, 201, 401]
    assert [answer.status_code for answer in answers] == statuses
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == SHOP, answer.request.url
        assert names(answer.headers["access-control-expose-headers"]) >= EXPOSED
        assert "x-request-id" in answer.headers


def test_the_storefront_can_read_the_stock_stream(shop: Served) -> None:
    path = f"/v1/sales/{shop.sale()}/events"
    with shop.http.stream("GET", path, headers={"Origin": SHOP}) as answer:
        assert answer.headers["access-control-allow-origin"] == SHOP


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "https://shop.example.evil.example", "http://shop.example"],
)
def test_other_origins_cannot_read_responses(shop: Served, origin: str) -> None:
    answer = shop.http.get("/v1/sales", headers={"Origin": origin})
    assert answer.headers.get("access-control-allow-origin") not in {origin, "*"}


def test_credentials_are_not_allowed_across_origins(shop: Served) -> None:
    answer = shop.http.get("/v1/sales", headers={"Origin": SHOP})
    assert "access-control-allow-credentials" not in answer.headers


def test_without_cors_origins_cross_origin_reads_are_blocked(served: Served) -> None:
    answer = served.http.get("/v1/sales", headers={"Origin": SHOP})
    assert "access-control-allow-origin" not in answer.headers


def test_a_browser_is_redirected_only_to_the_storefront(shop: Served) -> None:
    order = shop.hold(shop.sale(), shop.buyer())
    url = shop.success_url(order, shop.pay(order))
    for address in (url, f"{url}&next=https://evil.example", order["payment"]["failUrl"]):
        answer = shop.http.get(
            address, headers={"Accept": "text/html", "X-Forwarded-Host": "evil.example"}
        )
        assert answer.status_code == 303
        location = urlsplit(answer.headers["location"])
        assert f"{location.scheme}://{location.netloc}" == SHOP
        assert location.path == "/sale/result"


def test_a_buyer_over_the_rate_gets_a_retry_after(shop: Served) -> None:
    sale_id, buyer = shop.sale(), shop.buyer()
    for _ in range(2):
        shop.hold(sale_id, buyer)
    answer = shop.prepare(sale_id, buyer)
    problem = refused(answer, 429, "rate_limited")
    assert int(answer.headers["retry-after"]) == problem["retryAfter"]
    assert 1 <= problem["retryAfter"] <= 60
    # Only this buyer: the next one is not.
    shop.hold(sale_id, shop.buyer())
    assert shop.stock(sale_id) == (97, 3, 0)


def test_a_flood_is_refused_before_any_query(shop: Served) -> None:
    buyer = shop.buyer()
    for _ in range(2):
        refused(shop.prepare("nothing", buyer), 404, "sale_not_found")
    refused(shop.prepare("nothing", buyer), 429, "rate_limited")
    answer = shop.http.post("/v1/sales/x/reservations", content=b"{", headers=buyer)
    refused(answer, 429, "rate_limited")


def test_a_replay_is_answered_before_the_rate_limit(shop: Served) -> None:
    """A client whose answer was lost retries at once, and must get its hold."""
    sale_id, buyer = shop.sale(), shop.buyer()
    first = shop.hold(sale_id, buyer, key="first")
    shop.hold(sale_id, buyer, key="second")
    refused(shop.prepare(sale_id, buyer, key="third"), 429, "rate_limited")
    again = shop.prepare(sale_id, buyer, key="first")
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    assert again.json()["orderId"] == first["orderId"]
    # As many lookups as the rate has calls: a flood of repeats is a flood.
    refused(shop.prepare(sale_id, buyer, key="first"), 429, "rate_limited")


def test_another_body_under_a_used_key_is_rate_limited(shop: Served) -> None:
    sale_id, buyer = shop.sale(), shop.buyer()
    for key in ("first", "second"):
        shop.hold(sale_id, buyer, key=key)
    other = shop.prepare(sale_id, buyer, key="first", items=[("a", 2)], amount=2000)
    refused(other, 429, "rate_limited")


def test_guests_are_rate_limited_by_address(shop: Served) -> None:
    answers = [
        shop.http.post("/v1/guests", headers={"X-Forwarded-For": f"203.0.113.{number}"})
        for number in range(4)
    ]
    # No proxy is configured, so all of these came from one address.
    problem = refused(answers[-1], 429, "rate_limited")
    assert answers[-1].headers["retry-after"] == str(problem["retryAfter"])
