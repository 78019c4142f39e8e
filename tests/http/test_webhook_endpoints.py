"""Webhook endpoints over HTTP and by command, up to a webhook that the worker delivers."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from reservation.client import verify_webhook
from tests.http.admin_calls import bought
from tests.support.service import Served, eventually, refused, running_service

PATH = "/v1/admin/webhook-endpoints"
PUBLIC = {"url": "https://shop.example/hooks", "events": ["order.confirmed"]}


class Shop(ThreadingHTTPServer):
    """A receiver that keeps each webhook."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], bytes]] = []
        super().__init__(("127.0.0.1", 0), Hooks)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks"


class Hooks(BaseHTTPRequestHandler):
    server: Shop  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((dict(self.headers), body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Log nothing."""


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    with Shop() as shop:
        thread = threading.Thread(target=shop.serve_forever)
        thread.start()
        yield shop
        shop.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service whose webhooks may go to loopback addresses."""
    with running_service(
        tmp_path_factory.mktemp("webhooks"),
        RESERVATION_WORKERS="1",
        RESERVATION_WEBHOOK_ALLOW_PRIVATE="1",
    ) as service:
        yield service


def call(served: Served, method: str, path: str = "", **more: Any) -> httpx.Response:
    return served.http.request(method, f"{PATH}{path}", headers=served.admin, **more)


def create(served: Served, **members: Any) -> dict[str, Any]:
    answer = call(served, "POST", json={**PUBLIC, **members})
    assert answer.status_code == 201, answer.text
    return answer.json()


def delivered(served: Served, endpoint_id: str, count: int) -> list[dict[str, Any]]:
    return eventually(
        lambda: call(served, "GET", f"/{endpoint_id}/deliveries?status=delivered").json()[
            "deliveries"
        ],
        lambda found: len(found) >= count,
    )


def command(served: Served, *words: str) -> Any:
    environ = {**os.environ, "RESERVATION_ADMIN_API_KEY": served.settings.admin_api_key}
    done = subprocess.run(
        [sys.executable, "-m", "api.cli", *words, "--json", "--url", served.url],
        env=environ,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_worker_delivers_a_purchase(private: Served, shop: Shop) -> None:
    sale_id = private.sale()
    endpoint = create(private, url=shop.url, saleId=sale_id)
    order = bought(private, sale_id)
    (row,) = delivered(private, endpoint["id"], 1)
    assert (row["type"], row["orderId"], row["statusCode"]) == (
        "order.confirmed",
        order["orderId"],
        204,
    )
    headers, body = next(one for one in shop.received if order["orderId"] in one[1].decode())
    webhook = verify_webhook(endpoint["secret"], headers, body)
    assert webhook["data"]["reservation"]["status"] == "CONFIRMED"
    assert webhook["id"] == row["eventId"]
    assert call(private, "POST", f"/deliveries/{row['id']}/resend").status_code == 202
    eventually(
        lambda: sum(headers["webhook-id"] == row["webhookId"] for headers, _ in shop.received),
        lambda count: count == 2,
    )


def test_commands_create_test_list_and_replay(private: Served, shop: Shop) -> None:
    sale_id = private.sale()
    private.hold(sale_id, private.buyer())
    made = command(private, "webhook", "create", shop.url, "--sale", sale_id)
    assert made["events"] == ["*"]
    assert made["secret"].startswith("whsec_")
    assert command(private, "webhook", "test", made["id"])["type"] == "webhook.test"
    delivered(private, made["id"], 1)
    listed = command(private, "webhook", "list")["endpoints"]
    assert made["id"] in [one["id"] for one in listed]
    assert all("secret" not in one for one in listed)
    found = command(private, "events", "--sale", sale_id)["events"]
    held = next(one for one in found if one["type"] == "reservation.held")
    assert command(private, "webhook", "replay", made["id"], "--after", "0")["id"] == made["id"]
    rows = eventually(
        lambda: call(private, "GET", f"/{made['id']}/deliveries").json()["deliveries"],
        lambda rows: held["id"] in [row["eventId"] for row in rows],
    )
    assert {row["endpointId"] for row in rows} == {made["id"]}


def test_the_secret_is_answered_once(served: Served) -> None:
    endpoint = create(served)
    assert endpoint["secret"].startswith("whsec_")
    shown = call(served, "GET", f"/{endpoint['id']}").json()
    assert "secret" not in shown
    rotated = call(served, "POST", f"/{endpoint['id']}/rotate").json()
    assert rotated["secret"] != endpoint["secret"]
    assert rotated["oldSecretUntil"] > rotated["updatedAt"]


def test_an_endpoint_is_changed_and_removed(served: Served) -> None:
    endpoint = create(served)
    answer = call(
        served, "PUT", f"/{endpoint['id']}", json={**PUBLIC, "events": ["*"], "enabled": False}
    )
    assert answer.status_code == 200
    assert (answer.json()["events"], answer.json()["enabled"]) == (["*"], False)
    refused(call(served, "POST", f"/{endpoint['id']}/test"), 409, "webhook_endpoint_disabled")
    assert call(served, "DELETE", f"/{endpoint['id']}").status_code == 204
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rotate"), ("POST", "/test")):
        refused(call(served, method, f"/{endpoint['id']}{path}"), 404, "webhook_endpoint_not_found")
    refused(
        call(served, "POST", f"/{endpoint['id']}/replay", json={"after": 0}),
        404,
        "webhook_endpoint_not_found",
    )
    refused(call(served, "POST", "/deliveries/999999/resend"), 404, "webhook_delivery_not_found")


@pytest.mark.parametrize(
    "members",
    [
        {"url": "http://shop.example/"},
        {"url": "https://127.0.0.1/"},
        {"url": "https://[::ffff:169.254.169.254]/"},
        {"url": "https://2130706433/"},
        {"events": ["order.paid"]},
    ],
)
def test_an_endpoint_that_is_not_allowed_is_refused(
    served: Served, members: dict[str, Any]
) -> None:
    answer = call(served, "POST", json={**PUBLIC, **members})
    refused(answer, 400, "invalid_webhook_endpoint")


def test_endpoints_require_an_operator(served: Served) -> None:
    for method in ("GET", "POST"):
        refused(served.http.request(method, PATH), 401, "unauthenticated")
        answer = served.http.request(method, PATH, headers=served.buyer())
        refused(answer, 403, "forbidden")
