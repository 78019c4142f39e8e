"""Configuration of nginx in docs/how-to/going-live.md, as an operator copies it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http.connection.proxies import OF_THE_PAGE, proxied
from tests.support.service import Served

#: Of a body: the page allows 256 KiB, the service 16 KiB.
BODY_BYTES = 200_000
HOST = {"Host": "stock.example"}


@pytest.fixture
def served(edges: Any) -> Served:
    return edges("on")


@pytest.fixture
def public(served: Served, tmp_path: Path) -> Iterator[httpx.Client]:
    """The public side."""
    with (
        proxied(OF_THE_PAGE, served.url, tmp_path) as url,
        httpx.Client(base_url=url, headers=HOST, timeout=30, trust_env=False) as http,
    ):
        yield http


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/docs",
        "/schema/openapi.json",
        "/ops",
        "/ops?sale=x",
        "/v1/admin/orders",
        "/v1/admin/sales/x",
        "//v1/admin/orders",
        "/v1/./admin/orders",
        "/v1/%61dmin/orders",
        "/health/ready",
    ],
)
def test_operator_paths_are_not_public(served: Served, public: httpx.Client, path: str) -> None:
    # As a whole: of a path alone the client takes `//v1` for a host.
    url = str(public.base_url).rstrip("/") + path
    assert public.get(url, headers=served.admin).status_code == 403


def test_the_paths_of_a_purchase_are_public(served: Served, public: httpx.Client) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    for path in ("/", "/v1/sales", f"/v1/sales/{sale_id}", "/static/reservation.js"):
        assert public.get(path, follow_redirects=True).status_code == 200, path
    assert public.get("/health/live").status_code == 200
    answer = public.post(
        f"/v1/sales/{sale_id}/reservations",
        json={"items": [{"sku": "a", "quantity": 1}], "amount": 1000},
        headers={**buyer, "Idempotency-Key": "one"},
    )
    assert answer.status_code == 201
    # Its own refusal, not the proxy's.
    answer = public.post(f"/v1/sales/{sale_id}/reservations", content=b" " * BODY_BYTES)
    assert answer.headers["content-type"] == "application/problem+json"


def test_stock_events_pass_unbuffered(served: Served, public: httpx.Client) -> None:
    sale_id = served.sale()
    with public.stream("GET", f"/v1/sales/{sale_id}/events") as stream:
        seen = (json.loads(line[5:]) for line in stream.iter_lines() if line.startswith("data:"))
        assert next(seen)["held"] == 0
        served.hold(sale_id, served.buyer())
        assert next(seen)["held"] == 1
