"""Framing: a body belongs to its request, and each request gets one answer."""

import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from tests.http.connection.wire import Wire, request, wired
from tests.support.programs import find
from tests.support.service import Served, eventually, running_service

WISH = msgspec.json.encode({"items": [{"sku": "a", "quantity": 1}], "amount": 1000})
#: A body that would be a request if it were parsed as one.
SMUGGLED = request("GET", "/health/live", X_Request_Id="smuggled-0001")
OFFERS = {
    "a websocket": {"Connection": "Upgrade", "Upgrade": "websocket"},
    "HTTP/2, as Java and curl": {
        "Connection": "Upgrade, HTTP2-Settings",
        "Upgrade": "h2c",
        "HTTP2_Settings": "AAMAAABkAARAAAAAAAIAAAAA",
    },
    "something unknown": {"Connection": "upgrade", "Upgrade": "anything/1"},
    "an expectation": {"Expect": "100-continue"},
    "an expectation and an upgrade": {
        "Connection": "Upgrade",
        "Upgrade": "y",
        "Expect": "100-continue",
    },
    "nothing": {},
}


def chunked(body: bytes, trailers: bytes = b"") -> bytes:
    half = len(body) // 2
    pieces = [piece for piece in (body[:half], body[half:]) if piece]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return chunks + b"0\r\n" + trailers + b"\r\n"


def prepare(served: Served, sale_id: str, body: bytes = WISH, **headers: str) -> bytes:
    head = {
        **served.buyer(),
        "Idempotency_Key": "one",
        "Content_Type": "application/json",
        **headers,
    }
    return request("POST", f"/v1/sales/{sale_id}/reservations", body, **head)


def split(message: bytes) -> tuple[bytes, bytes]:
    head, _, body = message.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", body


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("coding", ["length", "chunks"])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in two segments"])
def test_a_body_belongs_to_its_request_with_any_headers(
    edge: Served, offer: str, coding: str, *, at_once: bool
) -> None:
    headers = dict(OFFERS[offer])
    if coding == "chunks":
        headers["Transfer_Encoding"] = "chunked"
    body = SMUGGLED if coding == "length" else chunked(SMUGGLED)
    message = request("POST", "/v1/nothing", body, X_Request_Id="asked-0001", **headers)
    with wired(edge.url) as wire:
        head, body = split(message)
        if at_once:
            wire.send(message)
        else:
            wire.send(head)
            if "Expect" in headers:
                assert wire.answer().status == 100
            else:
                time.sleep(0.02)
            wire.send(body)
        first = wire.answer()
        assert (first.status, first.headers["x-request-id"]) == (404, "asked-0001")
        wire.send(request("GET", "/health/live", X_Request_Id="asked-0002", Connection="close"))
        [second] = wire.answers()
        assert (second.status, second.headers["x-request-id"]) == (200, "asked-0002")


@pytest.mark.parametrize("offer", OFFERS)
def test_a_prepare_is_accepted_with_any_other_headers(edge: Served, offer: str) -> None:
    sale_id = edge.sale()
    with wired(edge.url) as wire:
        wire.send(prepare(edge, sale_id, **OFFERS[offer]))
        assert wire.answer().status == 201
    assert edge.stock(sale_id) == (99, 1, 0)


def test_an_offer_to_upgrade_is_ignored_by_the_webhook_too(edge: Served) -> None:
    body = b'{"eventType":"PAYMENT_STATUS_CHANGED","data":{"orderId":"not-ours"}}'
    seen = len(edge.log.read_bytes())
    with wired(edge.url) as wire:
        offer = OFFERS["HTTP/2, as Java and curl"]
        wire.send(request("POST", "/v1/payments/toss/webhooks", body, **offer))
        assert wire.answer().status == 200
    assert b"webhook_malformed" not in edge.log.read_bytes()[seen:]


def test_curl_can_offer_http2(edge: Served, tmp_path: Path) -> None:
    curl = find("curl")
    sale_id, wish = edge.sale(), tmp_path / "wish.json"
    wish.write_bytes(WISH)
    done = subprocess.run(
        [
            *(curl, "--http2", "-s", "-o", tmp_path / "answer", "-w", "%{http_code}"),
            *("-H", f"Authorization: {edge.buyer()['Authorization']}"),
            *("-H", "Idempotency-Key: one", "-H", "Content-Type: application/json"),
            *("--data-binary", f"@{wish}", f"{edge.url}/v1/sales/{sale_id}/reservations"),
        ],
        capture_output=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == b"201"


#: The framing of Java 17's HTTP client: the head and the body in a segment each.
JAVA = """\
POST {path} HTTP/1.1
Connection: Upgrade, HTTP2-Settings
Content-Length: {length}
Host: 127.0.0.1
HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA
Upgrade: h2c
User-Agent: Java-http-client/17.0.15
Authorization: {token}
Content-Type: application/json
Idempotency-Key: one

"""


def test_the_java_http_client_can_prepare(edge: Served) -> None:
    path = f"/v1/sales/{edge.sale()}/reservations"
    token = edge.buyer()["Authorization"]
    head = JAVA.format(path=path, length=len(WISH), token=token).replace("\n", "\r\n")
    with wired(edge.url) as wire:
        wire.send(head.encode())
        time.sleep(0.02)
        wire.send(WISH)
        assert wire.answer().status == 201


def test_expect_continue_is_answered_before_the_body(edge: Served) -> None:
    sale_id = edge.sale()
    head, body = split(prepare(edge, sale_id, Expect="100-continue"))
    with wired(edge.url) as wire:
        wire.send(head)
        assert wire.answer().status == 100
        wire.send(body)
        assert wire.answer().status == 201


def test_credentials_in_trailers_are_ignored(edge: Served) -> None:
    sale_id = edge.sale()
    buyer = edge.buyer()["Authorization"]
    trailers = f"Authorization: {buyer}\r\nIdempotency-Key: one\r\n".encode()
    path = f"/v1/sales/{sale_id}/reservations"
    headers = {"Transfer_Encoding": "chunked", "Content_Type": "application/json"}
    with wired(edge.url) as wire:
        wire.send(request("POST", path, chunked(WISH, trailers), **headers))
        assert wire.answer().problem == (401, "unauthenticated")
        key = edge.admin["Authorization"]
        trailers = f"Authorization: {key}\r\nX-Operator: nobody\r\n".encode()
        body = chunked(b'{"reason":"x"}', trailers)
        wire.send(request("POST", f"/v1/admin/sales/{sale_id}/close", body, **headers))
        assert wire.answer().problem == (401, "unauthenticated")
    assert edge.http.get(f"/v1/sales/{sale_id}").json()["status"] == "open"


def test_an_address_in_a_trailer_does_not_reset_the_rate_limit(edge: Served) -> None:
    headers = {"X_Forwarded_For": "203.0.113.77", "Transfer_Encoding": "chunked"}
    statuses: list[int] = []
    with wired(edge.url) as wire:
        for number in range(12):
            trailers = f"X-Forwarded-For: 198.51.100.{number}\r\n".encode()
            wire.send(request("POST", "/v1/guests", chunked(b"", trailers), **headers))
            statuses.append(wire.answer().status)
    assert statuses == [201] * 5 + [429] * 7


def test_pipelined_requests_are_answered_in_order(edge: Served) -> None:
    sale_id = edge.sale()
    requests = [
        request("GET", "/health/live", X_Request_Id="number-0001"),
        prepare(edge, sale_id, X_Request_Id="number-0002"),
        prepare(edge, sale_id, Idempotency_Key="two", X_Request_Id="number-0003"),
        request("GET", f"/v1/sales/{sale_id}", X_Request_Id="number-0004"),
        prepare(edge, sale_id, b"{" + b" " * 6_000, X_Request_Id="number-0005"),
        request("HEAD", "/v1/sales/", X_Request_Id="number-0006", Connection="close"),
    ]
    for size in (10**6, 700, 7):
        stream = b"".join(requests)
        with wired(edge.url) as wire:
            wire.send_pieces(stream[at : at + size] for at in range(0, len(stream), size))
            ids = [wire.answer().headers["x-request-id"] for _ in requests[:-1]]
            ids.append(wire.answer("HEAD").headers["x-request-id"])
            assert ids == [f"number-000{number}" for number in range(1, 7)]
            assert wire.is_closed(within=10)


def test_a_malformed_request_is_refused_after_earlier_responses(edge: Served) -> None:
    sale_id = edge.sale()
    order = edge.hold(sale_id, edge.buyer())
    waits = request(
        "GET",
        f"/v1/reservations/{order['orderId']}?wait=1",
        X_Reservation_Token=order["token"],
        X_Request_Id="waits-0001",
    )
    with wired(edge.url) as wire:
        wire.send(waits + b"NONSENSE\r\n\r\n" + request("GET", "/health/live"))
        first = wire.answer()
        assert (first.status, first.headers["x-request-id"]) == (200, "waits-0001")
        assert wire.answer().problem == (400, "malformed_request")
        assert wire.is_closed(within=10)


def test_a_half_closed_client_gets_its_response(edge: Served) -> None:
    sale_id = edge.sale()
    with wired(edge.url) as wire:
        wire.send(prepare(edge, sale_id))
        wire.socket.shutdown(1)
        assert wire.answer().status == 201
        assert wire.is_closed(within=10)


def test_a_disconnect_within_a_body_is_not_logged_as_an_error(edge: Served) -> None:
    order = edge.hold(edge.sale(), edge.buyer())
    seen = len(edge.log.read_bytes())
    errors = failures(edge)
    for path in ("/v1/payments/toss/webhooks", f"/v1/reservations/{order['orderId']}/release"):
        for _ in range(20):
            wire = Wire(edge.url)
            wire.send(request("POST", path, b"x" * 500)[:-400])
            wire.close()
    # Requests that were sent later have been answered.
    assert edge.http.get("/health/live").status_code == 200
    assert edge.log.read_bytes()[seen:] == b""
    assert failures(edge) == errors


def failures(served: Served) -> list[str]:
    """The counters of answers with a status of 500 and above, but for probes of readiness."""
    text = served.http.get("/metrics").text
    return [
        line
        for line in text.splitlines()
        if "http_request_seconds_count" in line and 'status="5' in line and '"ready"' not in line
    ]


def test_malformed_requests_write_few_lines_and_no_traceback(edge: Served) -> None:
    seen, began = len(edge.log.read_bytes()), time.monotonic()

    def refused_again() -> list[str]:
        for _ in range(100):
            with wired(edge.url) as wire:
                wire.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
                assert wire.answer().problem == (400, "malformed_request")
        return edge.log.read_bytes()[seen:].decode().splitlines()

    lines = eventually(refused_again, bool)
    assert len(lines) <= time.monotonic() - began + 1
    assert all("request_refused" in line for line in lines)


@pytest.mark.slow
def test_an_idle_connection_is_closed_after_the_configured_time(tmp_path: Path) -> None:
    with (
        running_service(
            tmp_path / "data", RESERVATION_WORKERS="1", RESERVATION_KEEP_ALIVE_SECONDS="2"
        ) as served,
        wired(served.url) as wire,
    ):
        wire.send(request("GET", "/health/live"))
        assert wire.answer().status == 200
        began = time.monotonic()
        assert wire.is_closed(within=20)
        assert time.monotonic() - began > 1.9
