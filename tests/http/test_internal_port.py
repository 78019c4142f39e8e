"""The internal port: each route on each port, and a public port that does not reveal the others."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.http.app import create_app
from api.http.ports import is_internal
from reservation.config.settings import Settings
from tests.support.service import Served, free_port, running_service, sale_document

pytestmark = pytest.mark.system

#: Routes that leave the public port.
INTERNAL = {
    "/docs",
    "/docs-assets/{file_path:path}",
    "/health/ready",
    "/metrics",
    "/ops",
    "/schema",
    "/schema/openapi.json",
    "/schema/{path:str}",
    "/v1/admin/events",
    "/v1/admin/keys",
    "/v1/admin/keys/{key_id:str}",
    "/v1/admin/operator",
    "/v1/admin/orders",
    "/v1/admin/orders/{order_id:str}",
    "/v1/admin/orders/{order_id:str}/refund",
    "/v1/admin/orders/{order_id:str}/release",
    "/v1/admin/orders/{order_id:str}/resolve",
    "/v1/admin/refunds",
    "/v1/admin/sales",
    "/v1/admin/sales/{sale_id:str}",
    "/v1/admin/sales/{sale_id:str}/archive",
    "/v1/admin/sales/{sale_id:str}/audit",
    "/v1/admin/sales/{sale_id:str}/close",
    "/v1/admin/sales/{sale_id:str}/history",
    "/v1/admin/sales/{sale_id:str}/items/{sku:str}/why",
    "/v1/admin/sales/{sale_id:str}/pause",
    "/v1/admin/sales/{sale_id:str}/resume",
    "/v1/admin/sales/{sale_id:str}/stock",
    "/v1/admin/webhook-endpoints",
    "/v1/admin/webhook-endpoints/deliveries/{delivery_id:str}/resend",
    "/v1/admin/webhook-endpoints/{endpoint_id:str}",
    "/v1/admin/webhook-endpoints/{endpoint_id:str}/deliveries",
    "/v1/admin/webhook-endpoints/{endpoint_id:str}/replay",
    "/v1/admin/webhook-endpoints/{endpoint_id:str}/rotate",
    "/v1/admin/webhook-endpoints/{endpoint_id:str}/test",
}
#: Routes of buyers, of the payment gateway and of load balancers; they are on both ports.
PUBLIC = {
    "/",
    "/health/live",
    "/result",
    "/sales/{sale_id:str}",
    "/static/{file_path:path}",
    "/v1/guests",
    "/v1/payments/toss/fail",
    "/v1/payments/toss/success",
    "/v1/payments/toss/webhooks",
    "/v1/reservations/{order_id:str}",
    "/v1/reservations/{order_id:str}/release",
    "/v1/sales",
    "/v1/sales/{sale_id:str}",
    "/v1/sales/{sale_id:str}/events",
    "/v1/sales/{sale_id:str}/reservations",
}
SAMPLES = {
    "/schema/{path:str}": "/schema/openapi.json",
    "/static/{file_path:path}": "/static/reservation.js",
    "/docs-assets/{file_path:path}": "/docs-assets/swagger-ui-bundle.js",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
#: Spellings that a router might read as an internal path.
SPELLINGS = (
    "//metrics",
    "/metrics/",
    "/%6Detrics",
    "/metrics?x=1",
    "/v1//admin/orders",
    "/v1/%61dmin/orders",
    "/health//ready/",
    "/ops/",
)
ROOT = Path(__file__).resolve().parents[2]
ORIGIN = "https://shop.example"


def routes(tmp_path: Path) -> dict[str, set[str]]:
    """The methods of every route of the application."""
    app = create_app(Settings.load({"RESERVATION_DATA_DIR": str(tmp_path)}, None))
    return {route.path: set(route.methods) for route in app.routes}


def sample(route: str) -> str:
    """A path of this route."""
    return SAMPLES.get(route) or re.sub(r"{[^}]*}", "some", route)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running_service(
        tmp_path_factory.mktemp("ports"),
        RESERVATION_WORKERS="2",
        RESERVATION_INTERNAL_PORT=str(free_port()),
        RESERVATION_CORS_ORIGINS=ORIGIN,
    ) as running:
        yield running


def on(service: Served, base: str, method: str, path: str) -> httpx.Response:
    headers = {**service.admin, "Origin": ORIGIN, "X-Request-Id": "the-same-request"}
    if method == "OPTIONS":
        headers["Access-Control-Request-Method"] = "GET"
    # As a whole: of a path alone the client takes `//x` for a host.
    return service.http.request(method, base + path, headers=headers)


def shape(answer: httpx.Response) -> tuple[int, dict[str, str], bytes]:
    """Everything that an outsider sees, but the clock."""
    headers = {name: value for name, value in answer.headers.items() if name != "date"}
    return answer.status_code, headers, answer.content


def test_every_route_is_assigned_to_a_port(tmp_path: Path) -> None:
    found = set(routes(tmp_path))
    assert found == INTERNAL | PUBLIC
    assert {route for route in found if is_internal(sample(route))} == INTERNAL


@pytest.mark.parametrize("route", sorted(INTERNAL))
def test_an_internal_route_is_unknown_on_the_public_port(service: Served, route: str) -> None:
    for method in METHODS:
        hidden = on(service, service.url, method, sample(route))
        assert shape(hidden) == shape(on(service, service.url, method, "/nothing-there")), method
    assert on(service, service.url, "GET", sample(route)).status_code == 404


@pytest.mark.parametrize("path", SPELLINGS)
def test_another_spelling_does_not_reach_an_internal_route(service: Served, path: str) -> None:
    hidden = on(service, service.url, "GET", path)
    assert shape(hidden) == shape(on(service, service.url, "GET", "/nothing-there"))


def test_every_route_is_on_the_internal_port(service: Served, tmp_path: Path) -> None:
    internal = service.settings.internal_url
    for route, methods in routes(tmp_path).items():
        for method in methods - {"OPTIONS"}:
            if route.endswith("/events"):
                continue
            answer = on(service, internal, method, sample(route))
            known = answer.status_code != 404 or answer.json()["code"] != "not_found"
            assert known, f"{method} {route}: {answer.text}"


def test_the_commands_use_the_internal_port(service: Served, tmp_path: Path) -> None:
    settings = service.settings
    sale_id = f"by-command-{settings.port}"
    environ = {
        "RESERVATION_DATA_DIR": str(settings.data_dir),
        "RESERVATION_PORT": str(settings.port),
        "RESERVATION_INTERNAL_PORT": str(settings.internal_port),
    }
    # Without the internal port the operators' endpoints are not found.
    public = {**environ, "RESERVATION_INTERNAL_PORT": ""}
    for given, status in ((public, 1), (environ, 0)):
        done = subprocess.run(
            [sys.executable, "-m", "api.cli", "sale", "create", "-", "--id", sale_id],
            input=json.dumps(sale_document()),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **given},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == status, done.stderr


def test_the_public_port_serves_a_purchase_and_its_probe(service: Served) -> None:
    for path in ("/", "/v1/sales", "/health/live", "/static/reservation.js"):
        assert on(service, service.url, "GET", path).status_code == 200, path


def test_the_console_and_the_fast_path_work_on_the_internal_port(service: Served) -> None:
    internal = service.settings.internal_url
    for path in ("/ops", "/static/console/operator-api.js", "/metrics", "/health/ready", "/docs"):
        answer = on(service, internal, "GET", path)
        assert answer.status_code == 200, path
        head = on(service, internal, "HEAD", path)
        assert (head.status_code, head.content) == (200, b"")
    public, service.url = service.url, internal
    try:
        service.http.base_url = internal
        sale_id = service.sale()
        assert service.prepare(sale_id, service.buyer()).status_code == 201
        assert service.audit(sale_id)["ok"]
    finally:
        service.url, service.http.base_url = public, public
    preflight = on(service, internal, "OPTIONS", "/v1/sales")
    assert preflight.headers["access-control-allow-origin"] == ORIGIN
