"""Malformed requests over HTTP: bodies, keys, ids and paths."""

import json
from contextlib import closing
from http.client import HTTPConnection
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

from tests.support.service import Served, item, refused


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
    "items that are not a list": {"items": {"sku": "a", "quantity": 1}, "amount": 1000},
    "a line that is not an object": {"items": ["a"], "amount": 1000},
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
