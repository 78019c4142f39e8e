"""Error codes over HTTP: the status, extra members and precedence of each."""

import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest

from api.http.problem_details import STATUSES
from reservation.adapters.redis.embedded.files import lock_holder, socket_path_of
from reservation.domain.tokens import TOKEN_LIFE_MS, Claims, Purpose
from tests.support.service import Served, eventually, item, refused, running_service, sale_document


def in_an_hour() -> str:
    return (datetime.now(UTC) + timedelta(hours=1)).isoformat()


def posted(served: Served, path: str, body: object, **headers: str) -> httpx.Response:
    return served.http.post(path, json=body, headers={**served.admin, **headers})


def switch(served: Served, sale_id: str, action: str) -> None:
    posted(served, f"/v1/admin/sales/{sale_id}/{action}", {"reason": "x"}).raise_for_status()


def ghost(served: Served, sale_id: str) -> dict[str, Any]:
    """A buyer's hold whose order was lost in a failure of the store."""
    order = served.hold(sale_id, served.buyer())
    now_ms = int(datetime.now(UTC).timestamp() * 1000)
    order_id = f"{sale_id}-{'g' * 24}"
    tokens = {
        purpose: served.signer.sign(
            Claims(purpose.value, sale_id, order_id, "c" * 32, 1000, now_ms + TOKEN_LIFE_MS, "e", 1)
        )
        for purpose in Purpose
    }
    success = f"{served.url}/v1/payments/toss/success?token={tokens[Purpose.RETURN]}"
    return {
        **order,
        "orderId": order_id,
        "token": tokens[Purpose.RESERVATION],
        "payment": {**order["payment"], "successUrl": success},
    }


def malformed_request(served: Served) -> httpx.Response:
    return served.prepare(served.sale(), served.buyer(), items=[("a", 0)])


def invalid_sale(served: Served) -> httpx.Response:
    document = sale_document(items=[])
    path = f"/v1/admin/sales/e-{secrets.token_hex(4)}"
    return served.http.put(path, json=document, headers=served.admin)


def unauthenticated(served: Served) -> httpx.Response:
    return served.prepare(served.sale(), {})


def payment_declined(served: Served) -> httpx.Response:
    order = served.hold(served.sale(), served.buyer())
    return served.open_success_url(order, served.pay(order, decline="EXCEED_MAX_AMOUNT"))


def forbidden(served: Served) -> httpx.Response:
    return served.http.get("/v1/admin/orders", headers=served.buyer())


def invalid_token(served: Served) -> httpx.Response:
    return served.http.get("/v1/payments/toss/success?token=x")


def invalid_admission(served: Served) -> httpx.Response:
    return served.prepare(served.sale(requireAdmission=True), served.buyer())


def sale_not_open(served: Served) -> httpx.Response:
    return served.prepare(served.sale(opensAt=in_an_hour()), served.buyer())


def sale_not_found(served: Served) -> httpx.Response:
    return served.prepare("nothing", served.buyer())


def sku_not_found(served: Served) -> httpx.Response:
    return served.prepare(served.sale(), served.buyer(), items=[("z", 1)])


def reservation_not_found(served: Served) -> httpx.Response:
    return served.http.get(f"/v1/reservations/x-{'a' * 24}", headers=served.buyer())


def sold_out(served: Served) -> httpx.Response:
    return served.prepare(served.sale(items=[item("a", total=0)]), served.buyer())


def buyer_limit_exceeded(served: Served) -> httpx.Response:
    sale_id = served.sale(items=[item("a", limitPerBuyer=1)])
    return served.prepare(sale_id, served.buyer(), items=[("a", 2)], amount=2000)


def amount_mismatch(served: Served) -> httpx.Response:
    return served.prepare(served.sale(), served.buyer(), amount=1)


def reservation_expired(served: Served) -> httpx.Response:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    served.release(order)
    switch(served, sale_id, "close")
    return served.open_success_url(order, payment_key)


def hold_lost(served: Served) -> httpx.Response:
    return served.open_success_url(ghost(served, served.sale()), "some-key")


def payment_in_progress(served: Served) -> httpx.Response:
    order = served.hold(served.sale(virtualAccounts=True), served.buyer())
    served.open_success_url(order, served.pay(order, method="virtual_account"))
    return served.release(order)


def already_confirmed(served: Served) -> httpx.Response:
    order = served.hold(served.sale(), served.buyer())
    served.open_success_url(order, served.pay(order))
    return served.release(order)


def total_too_low(served: Served) -> httpx.Response:
    sale_id = served.sale()
    served.hold(sale_id, served.buyer())
    return served.http.put(
        f"/v1/admin/sales/{sale_id}",
        json={**served.document(sale_id), "items": [item("a", total=0)]},
        headers={**served.admin, "If-Match": served.etag(sale_id)},
    )


def insufficient_available(served: Served) -> httpx.Response:
    body = {"sku": "a", "delta": -101, "reason": "x"}
    path = f"/v1/admin/sales/{served.sale()}/stock"
    return posted(served, path, body, **{"Idempotency-Key": "k"})


def not_refundable(served: Served) -> httpx.Response:
    order = served.hold(served.sale(), served.buyer())
    body = {"reason": "x", "restock": True}
    path = f"/v1/admin/orders/{order['orderId']}/refund"
    return posted(served, path, body, **{"Idempotency-Key": secrets.token_hex(8)})


def sale_closed(served: Served) -> httpx.Response:
    sale_id = served.sale()
    switch(served, sale_id, "close")
    return served.prepare(sale_id, served.buyer())


def precondition_failed(served: Served) -> httpx.Response:
    sale_id = served.sale()
    return served.http.put(
        f"/v1/admin/sales/{sale_id}",
        json=served.document(sale_id),
        headers={**served.admin, "If-Match": '"v9"'},
    )


def idempotency_key_reused(served: Served) -> httpx.Response:
    sale_id, buyer = served.sale(), served.buyer()
    served.hold(sale_id, buyer, key="k")
    return served.prepare(sale_id, buyer, key="k", items=[("a", 2)], amount=2000)


def refund_account_required(served: Served) -> httpx.Response:
    order = served.hold(served.sale(virtualAccounts=True), served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    served.open_success_url(order, payment_key)
    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "CONFIRMED")
    body = {"reason": "x", "restock": True}
    path = f"/v1/admin/orders/{order['orderId']}/refund"
    return posted(served, path, body, **{"Idempotency-Key": secrets.token_hex(8)})


def refund_pending(served: Served) -> httpx.Response:
    order = served.hold(served.sale(), served.buyer())
    served.open_success_url(order, served.pay(order))
    served.order_fault(order, "refuse", operations=["cancel", "look_up"], times=1000)
    path = f"/v1/admin/orders/{order['orderId']}/refund"
    try:
        for restock in (True, False):
            body = {"reason": "x", "restock": restock}
            key = {"Idempotency-Key": secrets.token_hex(8)}
            answer = posted(served, path, body, **key)
    finally:
        served.clear_faults(order)
    return answer


def precondition_required(served: Served) -> httpx.Response:
    sale_id = served.sale()
    document = {**served.document(sale_id), "name": "Other"}
    return served.http.put(f"/v1/admin/sales/{sale_id}", json=document, headers=served.admin)


def rate_limited(served: Served) -> httpx.Response:
    """More at once than the rate allows; on a slow machine it takes a few more."""
    sale_id, buyer = served.sale(), served.buyer()
    answer = served.prepare(sale_id, buyer, key="k")
    for _ in range(2_000):
        if answer.status_code == 429:
            break
        answer = served.prepare(sale_id, buyer, key="k")
    return answer


def too_many_orders(served: Served) -> httpx.Response:
    """A prepare / release loop: its orders are unpaid, and the next one is refused."""
    sale_id, buyer = served.sale(), served.buyer()
    for _ in range(20):
        order = served.hold(sale_id, buyer)
        path = f"/v1/reservations/{order['orderId']}/release"
        assert served.http.post(path, headers=buyer).status_code == 200
    # The burst may be used up as well, which a second cures and this does not.
    return eventually(
        lambda: served.prepare(sale_id, buyer),
        lambda answer: answer.json().get("code") != "rate_limited",
    )


def sale_paused(served: Served) -> httpx.Response:
    sale_id = served.sale()
    switch(served, sale_id, "pause")
    return served.prepare(sale_id, served.buyer())


#: A request for each code that a healthy service refuses with; the others need a failure.
SCENES: dict[str, Callable[[Served], httpx.Response]] = {
    scene.__name__: scene
    for scene in (
        malformed_request,
        invalid_sale,
        unauthenticated,
        payment_declined,
        forbidden,
        invalid_token,
        invalid_admission,
        sale_not_open,
        sale_not_found,
        sku_not_found,
        reservation_not_found,
        sold_out,
        buyer_limit_exceeded,
        amount_mismatch,
        reservation_expired,
        hold_lost,
        payment_in_progress,
        already_confirmed,
        total_too_low,
        insufficient_available,
        not_refundable,
        sale_closed,
        precondition_failed,
        idempotency_key_reused,
        refund_account_required,
        refund_pending,
        precondition_required,
        rate_limited,
        too_many_orders,
        sale_paused,
    )
}
FAILURES = {"sale_recovering", "unavailable", "outcome_unknown"}


def test_each_error_code_has_a_scenario() -> None:
    assert set(SCENES) | FAILURES == set(STATUSES) | {"amount_mismatch"}


@pytest.mark.parametrize("code", SCENES)
def test_each_error_code_has_its_status_and_document(served: Served, code: str) -> None:
    answer = SCENES[code](served)
    status = STATUSES.get(code, 409)
    problem = refused(answer, status, code)
    assert problem["type"].endswith(code)
    waiting_helps = status in {429, 503} and code != "too_many_orders"
    assert ("retry-after" in answer.headers) == waiting_helps
    assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert answer.headers["cache-control"] == "no-store"


def test_sold_out_reports_available_units_and_the_holds_deadline(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=3), item("b", total=5)])
    order = served.hold(sale_id, served.buyer(), items=[("a", 2)], amount=2000)
    answer = served.prepare(sale_id, served.buyer(), items=[("a", 2), ("b", 1)], amount=3000)
    problem = refused(answer, 409, "sold_out")
    assert problem["available"] == {"a": 1, "b": 5}
    assert problem["nextDeadline"] == order["expiresAt"]


def test_a_final_sold_out_has_no_next_deadline(served: Served) -> None:
    sale_id = served.sale(items=[item("a", total=1)])
    order = served.hold(sale_id, served.buyer())
    served.open_success_url(order, served.pay(order))
    problem = refused(served.prepare(sale_id, served.buyer()), 409, "sold_out")
    assert problem["available"] == {"a": 0}
    assert problem["nextDeadline"] is None


def test_a_limit_refusal_reports_the_buyers_current_units(served: Served) -> None:
    sale_id, buyer = served.sale(items=[item("a", limitPerBuyer=3)]), served.buyer()
    paid, held = served.hold(sale_id, buyer), served.hold(sale_id, buyer)
    served.open_success_url(paid, served.pay(paid))
    answer = served.prepare(sale_id, buyer, items=[("a", 2)], amount=2000)
    problem = refused(answer, 409, "buyer_limit_exceeded")
    assert (problem["sku"], problem["limit"], problem["taken"]) == ("a", 3, 2)
    assert problem["orderIds"] == [held["orderId"]]


def test_a_limit_refusal_lists_at_most_twenty_orders(fragile: Served) -> None:
    sale_id = fragile.sale(items=[item("a", limitPerBuyer=22)])
    buyer = fragile.buyer()
    made = {fragile.hold(sale_id, buyer)["orderId"] for _ in range(22)}
    problem = refused(fragile.prepare(sale_id, buyer), 409, "buyer_limit_exceeded")
    assert len(problem["orderIds"]) == 20
    assert set(problem["orderIds"]) <= made


def test_a_wrong_amount_is_refused_with_the_expected_amount(served: Served) -> None:
    sale_id = served.sale(items=[item("a", price=700), item("b", price=110)])
    answer = served.prepare(sale_id, served.buyer(), items=[("a", 2), ("b", 3)], amount=1)
    assert refused(answer, 409, "amount_mismatch")["expectedAmount"] == 1730


def test_a_sale_before_its_opening_reports_the_opening_time(served: Served) -> None:
    opens_at = "2099-01-02T03:04:05.678Z"
    sale_id = served.sale(opensAt=opens_at, closesAt="2099-02-01T00:00:00Z")
    problem = refused(served.prepare(sale_id, served.buyer()), 403, "sale_not_open")
    assert problem["opensAt"] == opens_at


def test_a_declined_payment_reports_the_providers_code(served: Served) -> None:
    problem = refused(payment_declined(served), 402, "payment_declined")
    assert problem["providerCode"] == "EXCEED_MAX_AMOUNT"


def test_an_excessive_withdrawal_is_refused_with_the_available_units(served: Served) -> None:
    problem = refused(insufficient_available(served), 409, "insufficient_available")
    assert problem["available"] == {"a": 100}


def test_a_token_holder_learns_that_the_order_is_lost(served: Served) -> None:
    lost = ghost(served, served.sale())
    headers = {"X-Reservation-Token": lost["token"]}
    path = f"/v1/reservations/{lost['orderId']}"
    refused(served.http.get(path, headers=headers), 409, "hold_lost")
    refused(served.http.post(f"{path}/release", headers=headers), 409, "hold_lost")
    # A buyer back from the PG learns the order's id.
    url = lost["payment"]["successUrl"] + "&paymentKey=some-key&amount=1000"
    answer = served.http.get(url, headers={"Accept": "text/html"})
    assert answer.headers["location"].endswith(f"?orderId={lost['orderId']}&outcome=expired")
    # A buyer without the token cannot tell it from an order that never was.
    refused(served.http.get(path, headers=served.buyer()), 404, "reservation_not_found")


def test_the_first_of_several_refusals_is_sent(served: Served) -> None:
    buyer = served.buyer()
    missing, closed = "nothing", served.sale(items=[item("a"), item("b", limitPerBuyer=1)])
    served.hold(closed, buyer, key="k")
    served.hold(closed, buyer, items=[("b", 1)])
    switch(served, closed, "close")
    small = served.sale(items=[item("a", total=0, limitPerBuyer=1)])
    two = {"items": [("a", 2)], "amount": 2000}
    cases: list[tuple[str, dict[str, str], dict[str, Any], int, str]] = [
        (missing, {}, {"items": [("a", 0)]}, 401, "unauthenticated"),
        (missing, buyer, {"items": [("a", 0)]}, 404, "sale_not_found"),
        (closed, buyer, {"key": "k", "items": [("a", 0)]}, 400, "malformed_request"),
        (closed, buyer, {"key": "k", "items": [("z", 1)]}, 404, "sku_not_found"),
        (closed, buyer, {"key": "k", "amount": 1}, 422, "idempotency_key_reused"),
        (closed, buyer, {"amount": 1}, 410, "sale_closed"),
        (small, buyer, {**two, "amount": 1}, 409, "amount_mismatch"),
        (small, buyer, two, 409, "buyer_limit_exceeded"),
        (small, buyer, {}, 409, "sold_out"),
    ]
    for sale_id, caller, wish, status, code in cases:
        refused(served.prepare(sale_id, caller, **wish), status, code)


def line(**changes: Any) -> dict[str, Any]:
    return {"items": [{"sku": "a", "quantity": 1} | changes], "amount": 1000}


BODIES: dict[str, object] = {
    "nothing": None,
    "a list": [],
    "a text": "prepare",
    "no members": {},
    "no items": {"amount": 1000},
    "no amount": {"items": line()["items"]},
    "an empty basket": {"items": [], "amount": 1000},
    "items that are no list": {"items": {"sku": "a", "quantity": 1}, "amount": 1000},
    "a line that is no object": {"items": ["a"], "amount": 1000},
    "a line without a quantity": {"items": [{"sku": "a"}], "amount": 1000},
    "an unknown member": {**line(), "price": 1},
    "an unknown member of a line": line(price=1),
    "a quantity of 0": line(quantity=0),
    "a negative quantity": line(quantity=-1),
    "a fraction": line(quantity=1.5),
    "a quantity in quotes": line(quantity="1"),
    "true for a quantity": line(quantity=True),
    "null for a quantity": line(quantity=None),
    "a huge quantity": line(quantity=10_001),
    "a quantity of 2**63": line(quantity=2**63),
    "a quantity of 10**400": line(quantity=10**400),
    "an amount of 0": {**line(), "amount": 0},
    "a negative amount": {**line(), "amount": -1000},
    "an amount in quotes": {**line(), "amount": "1000"},
    "an amount with a fraction": {**line(), "amount": 1000.5},
    "a huge amount": {**line(), "amount": 10**13},
    "an amount of 10**400": {**line(), "amount": 10**400},
    "an empty sku": line(sku=""),
    "a sku with braces": line(sku="{a}"),
    "a sku with a blank": line(sku="a b"),
    "a sku with a newline": line(sku="a\n"),
    "a sku with a zero byte": line(sku="a\0"),
    "a sku with a colon": line(sku="a:b"),
    "a sku of another alphabet": line(sku="\u0430"),
    "a long sku": line(sku="a" * 65),
    "a number for a sku": line(sku=1),
    "an empty name": {**line(), "orderName": ""},
    "a long name": {**line(), "orderName": "x" * 101},
    "a name with a NUL": {**line(), "orderName": "a\0b"},
    "a number for a name": {**line(), "orderName": 1},
    "21 lines": {"items": [{"sku": "a", "quantity": 1}] * 21, "amount": 21_000},
}
RAW_BODIES: dict[str, bytes] = {
    "an empty body": b"",
    "half a document": b'{"items":[{"sku":"a"',
    "two documents": json.dumps(line()).encode() * 2,
    "no UTF-8": b'{"items":[{"sku":"\xff\xfe","quantity":1}],"amount":1000}',
    "half a surrogate": b'{"items":[{"sku":"\\ud800","quantity":1}],"amount":1000}',
    "NaN": b'{"items":[{"sku":"a","quantity":NaN}],"amount":1000}',
    "infinity": b'{"items":[{"sku":"a","quantity":1e999}],"amount":1000}',
    "brackets without end": b"[" * 16_000,
    "objects without end": b'{"items":' * 1_700,
    "more than 16 kB": json.dumps({**line(), "orderName": "x" * 16_384}).encode(),
    "a form": b"items=a&amount=1000",
}


@pytest.mark.parametrize("body", [*BODIES, *RAW_BODIES])
def test_a_malformed_body_is_refused_and_changes_nothing(served: Served, body: str) -> None:
    sale_id = served.sale(items=[item("a", limitPerBuyer=10**9, total=10**9)])
    raw = RAW_BODIES.get(body)
    before = served.dump(sale_id)
    answer = served.http.post(
        f"/v1/sales/{sale_id}/reservations",
        content=json.dumps(BODIES[body]).encode() if raw is None else raw,
        headers={**served.buyer(), "Idempotency-Key": "k", "Content-Type": "application/json"},
    )
    status = 413 if len(raw or b"") > 16_384 else 400
    refused(answer, status, "malformed_request")
    assert served.dump(sale_id) == before


def test_a_chunked_body_is_bounded(served: Served) -> None:
    sale_id = served.sale()
    answer = served.http.post(
        f"/v1/sales/{sale_id}/reservations",
        content=(b" " * 4096 for _ in range(64)),
        headers={**served.buyer(), "Idempotency-Key": "k"},
    )
    refused(answer, 413, "malformed_request")


@pytest.mark.parametrize(
    "key",
    [None, b"", b"x" * 256, b"\xff", "키".encode(), b"a\tb", b"a\x01b"],
    ids=["none", "empty", "long", "latin", "korean", "tab", "control"],
)
def test_an_idempotency_key_must_be_printable_and_at_most_255(
    served: Served, key: bytes | None
) -> None:
    sale_id = served.sale()
    before = served.dump(sale_id)
    headers: dict[str, str | bytes] = {**served.buyer(), "Content-Type": "application/json"}
    if key is not None:
        headers["Idempotency-Key"] = key
    # httpx does not send every one of these.
    with closing(HTTPConnection("127.0.0.1", urlsplit(served.url).port, timeout=30)) as plain:
        plain.request(
            "POST", f"/v1/sales/{sale_id}/reservations", json.dumps(line()), cast("Any", headers)
        )
        assert plain.getresponse().status == 400
    assert served.dump(sale_id) == before


@pytest.mark.parametrize(
    "order_id",
    [
        "x",
        "x" * 300,
        "a{b}-" + "a" * 24,
        "a%0a-" + "a" * 24,
        "t-" + "a" * 24 + "%0a",
        "-" * 40,
        "%00",
    ],
)
def test_an_invalid_order_id_is_not_found(served: Served, order_id: str) -> None:
    buyer = served.buyer()
    for answer in (
        served.http.get(f"/v1/reservations/{order_id}", headers=buyer),
        served.http.post(f"/v1/reservations/{order_id}/release", headers=buyer),
    ):
        refused(answer, 404, "reservation_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/sales", 405),
        ("DELETE", "/v1/sales/x", 405),
        ("GET", "/v1/guests", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/static/..%2f..%2fproblems.py", 404),
        ("GET", "/static/%00", 404),
        ("GET", "/docs-assets/a%00", 404),
    ],
)
def test_unrouted_paths_return_problem_documents(
    served: Served, method: str, path: str, status: int
) -> None:
    answer = served.http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service whose store may freeze, be cut off, and lose keys."""
    with running_service(
        tmp_path_factory.mktemp("fragile"), RESERVATION_WORKERS="1", RESERVATION_PREPARE_RATE="0"
    ) as service:
        yield service


@contextmanager
def frozen(served: Served) -> Iterator[None]:
    """The embedded server accepts commands and never answers."""
    pid = lock_holder(served.settings.data_dir.absolute() / "valkey.lock")
    assert pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def cut_off(served: Served) -> Iterator[None]:
    """The embedded server is unreachable: connections are closed, new ones find no socket."""
    socket = socket_path_of(served.settings.data_dir.absolute())
    away = socket.with_suffix(".away")
    with served.redis() as client:
        client.ping()
        socket.rename(away)
        try:
            client.client_kill_filter(_type="normal", skipme=True)
            yield
        finally:
            away.rename(socket)


def wait_until_ready(served: Served) -> None:
    eventually(
        lambda: served.http.get("/health/ready"), lambda answer: answer.is_success, within=30
    )


def test_an_operator_can_pause_and_withdraw_while_redis_is_full(
    fragile: Served,
) -> None:
    sale_id = fragile.sale()
    with fragile.redis() as client:
        allowed = client.config_get("maxmemory")["maxmemory"] or "0"
        client.config_set("maxmemory", "1mb")
        try:
            for what, status in (("pause", "paused"), ("close", "closed")):
                path = f"/v1/admin/sales/{sale_id}/{what}"
                answer = posted(fragile, path, {"reason": "x"})
                assert (answer.status_code, answer.json()["status"]) == (200, status)
            body = {"sku": "a", "delta": -60, "reason": "broken"}
            path = f"/v1/admin/sales/{sale_id}/stock"
            answer = posted(fragile, path, body, **{"Idempotency-Key": "k"})
            assert answer.status_code == 200, answer.text
        finally:
            client.config_set("maxmemory", allowed)
    assert fragile.stock(sale_id) == (40, 0, 0)
    wait_until_ready(fragile)


def test_an_unreachable_store_certainly_holds_nothing(fragile: Served) -> None:
    sale_id, buyer = fragile.sale(), fragile.buyer()
    order = fragile.hold(sale_id, buyer)
    paid = fragile.hold(sale_id, fragile.buyer())
    payment_key = fragile.pay(paid)
    assert fragile.open_success_url(paid, payment_key).json()["status"] == "CONFIRMED"
    before = fragile.dump(sale_id)
    with cut_off(fragile):
        answer = fragile.prepare(sale_id, buyer, key="k")
        problem = refused(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == str(problem["retryAfter"])
        for other in (
            fragile.http.get(f"/v1/reservations/{order['orderId']}", headers=buyer),
            fragile.release(order),
            fragile.http.get("/v1/sales"),
            fragile.http.get(f"/v1/sales/{sale_id}/reservations", headers=buyer),
            fragile.open_success_url(order, "some-key"),
        ):
            refused(other, 503, "unavailable")
            assert other.headers["retry-after"]
        waiting = fragile.http.get(
            fragile.success_url(paid, payment_key), headers={"Accept": "text/html"}
        )
        assert waiting.status_code == 503
        assert 'http-equiv="refresh"' in waiting.text
        # The answer claims nothing unknown about the money: this buyer has paid.
        assert "charged yet" not in waiting.text
        refusal = refused(fragile.open_success_url(paid, payment_key), 503, "unavailable")
        assert "nothing was" not in refusal["detail"]
        health = fragile.http.get("/health/ready")
        assert health.status_code == 503
        assert "redis" in health.json()["missing"]
        assert fragile.http.get("/health/live").status_code == 200
    wait_until_ready(fragile)
    assert fragile.dump(sale_id) == before
    eventually(
        lambda: fragile.prepare(sale_id, buyer, key="k"), lambda answer: answer.status_code == 201
    )
    assert fragile.stock(sale_id) == (97, 2, 1)


@pytest.mark.slow
def test_an_unresponsive_store_leaves_the_outcome_unknown_until_retried(
    fragile: Served,
) -> None:
    sale_id, buyer = fragile.sale(), fragile.buyer()
    wait_until_ready(fragile)
    fragile.hold(sale_id, buyer)
    with frozen(fragile):
        answer = fragile.prepare(sale_id, buyer, key="k")
        problem = refused(answer, 503, "outcome_unknown")
        assert answer.headers["retry-after"] == str(problem["retryAfter"])
    wait_until_ready(fragile)
    first = eventually(
        lambda: fragile.prepare(sale_id, buyer, key="k"), lambda answer: answer.status_code == 201
    )
    again = fragile.prepare(sale_id, buyer, key="k")
    assert again.json()["orderId"] == first.json()["orderId"]
    assert fragile.stock(sale_id) == (98, 2, 0)
    assert fragile.audit(sale_id)["ok"]


def test_a_sale_lost_by_the_store_accepts_no_prepare(fragile: Served) -> None:
    wait_until_ready(fragile)
    lost, other, buyer = fragile.sale(), fragile.sale(), fragile.buyer()
    order = fragile.hold(lost, buyer)
    payment_key = fragile.pay(order)
    assert fragile.audit(lost)["ok"]
    with fragile.redis() as client:
        client.delete(*client.scan_iter(f"rsv:{{{lost}}}:*"))
    for answer in (
        fragile.prepare(lost, buyer),
        fragile.prepare(lost, fragile.buyer()),
        fragile.http.get(f"/v1/sales/{lost}"),
        fragile.http.put(
            f"/v1/admin/sales/{lost}", json=fragile.document(lost), headers=fragile.admin
        ),
        fragile.open_success_url(order, payment_key),
    ):
        refused(answer, 503, "sale_recovering")
        assert answer.headers["retry-after"]
    assert fragile.ledger(order)["charged"] == 0
    # SQL still knows the order, and the other sale sells on.
    assert fragile.get_reservation(order, buyer)["orderId"] == order["orderId"]
    fragile.hold(other, buyer)
    with fragile.redis() as client:
        assert not list(client.scan_iter(f"rsv:{{{lost}}}:*"))
    report = fragile.http.get(f"/v1/admin/sales/{lost}/audit", headers=fragile.admin).json()
    assert report["ok"] is False
    assert report["problems"]
