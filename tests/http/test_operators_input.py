"""Input validation: times, texts and query parameters that the service refuses."""

import secrets
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tests.support.service import Served, eventually, item, refused, sale_document

#: An escape that clears the screen, a forged line, the bell, DEL, C1, and bidi controls.
CONTROLS = ["\x1b[2J", "a\nb", "a\r", "\x07", "\x7f", "\x9b31m", "\u202ecba", "\u2066a", "a\u200f"]


def create(served: Served, **changes: Any) -> httpx.Response:
    sale_id = f"new-{secrets.token_hex(4)}"
    answer = served.http.put(
        f"/v1/admin/sales/{sale_id}", json=sale_document(**changes), headers=served.admin
    )
    if answer.status_code == 400:
        # Nothing of it was kept.
        path = f"/v1/admin/sales/{sale_id}"
        refused(served.http.get(path, headers=served.admin), 404, "sale_not_found")
    return answer


@pytest.mark.parametrize(
    "change",
    [
        {"opensAt": "2020-01-05T12:00:00"},
        {"closesAt": "2127-01-05T12:00:00.000"},
        {"opensAt": "0001-01-01T00:00:00+14:00"},
        {"opensAt": "0001-01-01T00:00:00Z"},
        {"opensAt": "1999-12-31T23:59:59Z"},
        {"closesAt": "9999-12-31T23:59:59-14:00"},
        {"closesAt": "2201-01-01T00:00:00Z"},
    ],
)
def test_a_time_without_an_offset_or_out_of_range_is_refused(
    served: Served, change: dict[str, str]
) -> None:
    refused(create(served, **change), 400, "invalid_sale")
    assert served.http.get("/v1/sales").status_code == 200


def test_a_time_with_any_offset_is_accepted_over_the_full_range(served: Served) -> None:
    answer = create(served, opensAt="2000-01-01T09:00:00+09:00", closesAt="2200-12-31T23:59:59Z")
    assert answer.status_code == 201, answer.text
    assert answer.json()["opensAt"] == "2000-01-01T00:00:00.000Z"
    assert answer.json()["closesAt"] == "2200-12-31T23:59:59.000Z"


@pytest.mark.parametrize("text", CONTROLS)
def test_control_characters_are_refused_in_each_text(served: Served, text: str) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    refused(create(served, name=text), 400, "malformed_request")
    refused(create(served, items=[item("a", name=text)]), 400, "malformed_request")
    refused(served.prepare(sale_id, buyer, orderName=text), 400, "malformed_request")
    headers = {**served.admin, "Idempotency-Key": "k"}
    for path, body in (
        (f"sales/{sale_id}/pause", {"reason": text}),
        (f"sales/{sale_id}/stock", {"sku": "a", "delta": 1, "reason": text}),
        ("orders/x-y/refund", {"reason": text, "restock": True}),
    ):
        answer = served.http.post(f"/v1/admin/{path}", json=body, headers=headers)
        refused(answer, 400, "malformed_request")


def test_texts_in_any_language_are_accepted(served: Served) -> None:
    name = "한정판 \u3000 ﷽ 👩\u200d🚀 naïve क्\u200dष"
    order = served.hold(served.sale(name=name), served.buyer(), orderName=name)
    assert order["orderName"] == name


@pytest.mark.parametrize(
    "path",
    [
        "/v1/admin/orders?orderId=x",
        "/v1/admin/orders?saleId=x&paymentkey=y",
        "/v1/admin/orders?saleID=x",
        "/v1/admin/orders/x-y?verbose=1",
        "/v1/admin/refunds?stauts=pending",
        "/v1/sales?page=2",
        "/v1/admin/sales/{sale}?full=1",
        "/v1/sales/{sale}/reservations?status=HELD",
    ],
)
def test_an_unknown_query_parameter_is_refused(served: Served, path: str) -> None:
    sale_id, is_admin = served.sale(), path.startswith("/v1/admin")
    headers = served.admin if is_admin else served.buyer()
    answer = served.http.get(path.format(sale=sale_id), headers=headers)
    problem = refused(answer, 400, "malformed_request")
    assert "not a query parameter" in problem["detail"]
    if not path.startswith("/v1/sales?"):
        # A caller without the right to read gets no hint about parameters.
        refused(served.http.get(path.format(sale=sale_id)), 401, "unauthenticated")


def test_a_change_with_an_unknown_query_parameter_changes_nothing(served: Served) -> None:
    sale_id = served.sale()
    path = f"/v1/admin/sales/{sale_id}/pause?dry_run=1"
    answer = served.http.post(path, json={"reason": "x"}, headers=served.admin)
    refused(answer, 400, "malformed_request")
    assert served.http.get(f"/v1/sales/{sale_id}").json()["status"] == "open"


def test_each_documented_query_parameter_is_accepted(served: Served) -> None:
    """The list that a guard compares with is the list that the document shows."""
    document = served.http.get("/schema/openapi.json").json()
    good = {"saleId": "x", "status": "HELD", "buyerId": "b", "limit": "5"}
    seen: set[str] = set()
    for path, operations in document["paths"].items():
        if path != "/v1/admin/orders":
            continue
        for parameter in operations["get"]["parameters"]:
            name = parameter["name"]
            if parameter["in"] == "query" and name in good:
                seen.add(name)
                answer = served.http.get(path, params={name: good[name]}, headers=served.admin)
                assert answer.status_code == 200, answer.text
    assert seen == good.keys()


def test_pages_ignore_unknown_query_parameters(served: Served) -> None:
    sale_id = served.sale()
    for path in ("/", f"/sales/{sale_id}", f"/v1/sales/{sale_id}", "/static/storefront/sale.js"):
        answer = served.http.get(path, params={"utm_source": "mail"}, follow_redirects=True)
        assert answer.status_code == 200, path


def listed(served: Served) -> set[str]:
    """The ids of all sales, on however many pages."""
    shown: set[str] = set()
    cursor: dict[str, str] = {}
    while True:
        page = served.http.get("/v1/sales", params=cursor).raise_for_status().json()
        shown |= {sale["saleId"] for sale in page["sales"]}
        if page["nextCursor"] is None:
            return shown
        cursor = {"cursor": page["nextCursor"]}


def test_a_damaged_sale_does_not_hide_the_other_sales(served: Served) -> None:
    good, strange, bad = served.sale(), served.sale(), served.sale()
    names = {sale_id: f"rsv:{{{sale_id}}}:sale" for sale_id in (strange, bad)}
    with served.redis() as client:
        # Values that a release without the range took, and that no release writes.
        client.hset(names[strange], "opens_at", str(-(10**14)))
        client.hset(names[strange], "closes_at", str(10**15))
        kept = client.hget(names[bad], "hold_seconds")
        client.hset(names[bad], "hold_seconds", "soon")
        try:
            # Another process may list a new sale a second late.
            eventually(lambda: listed(served) & {good, strange, bad}, lambda shown: shown == {good})
            # An operator sees it nevertheless, and can put it right.
            path = f"/v1/admin/sales/{strange}"
            found = served.http.get(path, headers=served.admin)
            assert found.json()["closesAt"] == "9999-12-31T23:59:59.000Z"
        finally:
            client.hset(names[bad], "hold_seconds", kept)
    assert "alarm=sale_unreadable" in served.log.read_text()
    now = datetime.now(UTC)
    document = {**served.document(strange), "opensAt": now.isoformat()}
    etag = served.etag(strange)
    answer = served.http.put(path, json=document, headers={**served.admin, "If-Match": etag})
    assert answer.status_code == 200, answer.text
