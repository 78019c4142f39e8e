"""Operators' keys: the rights of each role at each endpoint, creation, revocation and names."""

import re
import time
from collections.abc import Callable
from urllib.parse import quote

import httpx
import pytest
from litestar.routes import HTTPRoute
from sqlalchemy.exc import OperationalError

from api.http.app import create_app
from api.http.auth.operator_keys import FRESH_SECONDS, STALE_SECONDS, OperatorKeys
from api.http.dependencies import RIGHT
from reservation.adapters.sql import operator_keys as repository_module
from reservation.adapters.sql.operator_keys import OperatorKeyRecord
from reservation.adapters.sql.store import SqlStore
from reservation.domain.clock import SystemClock
from reservation.domain.errors import KeyNotFound, TooManyKeys, Unavailable
from reservation.domain.operators import Operator, Right, Role
from tests.http.admin_calls import switch
from tests.support.service import Served, eventually, refused

KEYS = "/v1/admin/keys"
#: Beyond the time within which every process refuses a revoked key.
REVOKED_WITHIN_SECONDS = 20.0

#: The roles that each right admits, independent of the table in the product.
ADMITS = {
    "read": {"viewer", "support", "manager", "owner"},
    "orders": {"support", "manager", "owner"},
    "sales": {"manager", "owner"},
    "webhooks": {"owner"},
    "keys": {"owner"},
}
#: The rights of the endpoints that change something.
RIGHTS_OF_CHANGES = {
    "putSale": "sales",
    "restock": "sales",
    "pauseSale": "sales",
    "resumeSale": "sales",
    "closeSale": "sales",
    "archiveSale": "sales",
    "refundOrder": "orders",
    "releaseOrder": "orders",
    "resolveOrder": "orders",
    "createWebhookEndpoint": "webhooks",
    "putWebhookEndpoint": "webhooks",
    "deleteWebhookEndpoint": "webhooks",
    "rotateWebhookSecret": "webhooks",
    "testWebhookEndpoint": "webhooks",
    "replayWebhooks": "webhooks",
    "resendWebhook": "webhooks",
    "createKey": "keys",
    "revokeKey": "keys",
}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def create(served: Served, role: str, name: str = "Kim", **more: str) -> httpx.Response:
    return served.http.post(KEYS, json={"name": name, "role": role, **more}, headers=served.admin)


def made(served: Served, role: str, name: str = "Kim") -> dict[str, str]:
    """The answer to the creation of a key."""
    answer = create(served, role, name)
    assert answer.status_code == 201, answer.text
    return answer.json()


def revoke(served: Served, key: dict[str, str], **query: str) -> dict[str, str]:
    path = f"{KEYS}/{key['keyId']}"
    answer = served.http.delete(path, params=query, headers=served.admin)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def credentials(served: Served) -> dict[str, dict[str, str]]:
    """The header of each caller; `revoked` was an owner's key."""
    found = {role: bearer(made(served, role)["key"]) for role in Role}
    gone = made(served, "owner")
    revoke(served, gone)
    return {
        **found,
        "admin key": served.admin,
        "revoked": bearer(gone["key"]),
        "unknown": bearer("rsvk_" + "x" * 43),
        "none": {},
        "a buyer": served.buyer(),
    }


class Endpoint:
    """One operation of the application below /v1/admin."""

    def __init__(self, method: str, path: str, operation_id: str, right: object) -> None:
        self.method = method
        self.path = path
        self.operation_id = operation_id
        self.right = right

    def address(self) -> str:
        """Its path with ids of which nothing exists."""
        return re.sub(r"\{(\w+)(?::\w+)?\}", "none", self.path)


@pytest.fixture(scope="module")
def endpoints(served: Served) -> list[Endpoint]:
    app = create_app(served.settings)
    return [
        Endpoint(method, route.path_format, str(handler.operation_id), handler.opt.get(RIGHT))
        for route in app.routes
        if isinstance(route, HTTPRoute) and route.path_format.startswith("/v1/admin")
        for handler in route.route_handlers
        for method in sorted(handler.http_methods)
        if method != "OPTIONS" and handler.operation_id
    ]


def test_each_operator_endpoint_declares_its_right(endpoints: list[Endpoint]) -> None:
    assert len(endpoints) >= 16
    assert [one.operation_id for one in endpoints if not isinstance(one.right, Right)] == []


def test_each_change_requires_more_than_reading(endpoints: list[Endpoint]) -> None:
    changes = {one.operation_id: str(one.right) for one in endpoints if one.method != "GET"}
    assert changes == RIGHTS_OF_CHANGES


def test_each_role_may_call_the_endpoints_of_its_rights_and_no_others(
    served: Served, endpoints: list[Endpoint], credentials: dict[str, dict[str, str]]
) -> None:
    cells = 0
    for one in endpoints:
        for who, headers in credentials.items():
            answer = served.http.request(one.method, one.address(), headers=headers)
            cell = f"{one.method} {one.path} as {who}: {answer.status_code} {answer.text}"
            if who in ("revoked", "unknown", "none"):
                assert answer.status_code == 401, cell
                refused(answer, 401, "unauthenticated")
            elif who != "admin key" and who not in ADMITS[str(one.right)]:
                assert answer.status_code == 403, cell
                refused(answer, 403, "forbidden")
            else:
                # The empty request is then refused for its own faults, if it has any.
                assert answer.status_code in (200, 400, 404, 405), cell
            cells += 1
    assert cells == len(endpoints) * 9


def test_the_refusal_of_a_role_names_the_right(served: Served) -> None:
    viewer = bearer(made(served, "viewer")["key"])
    sale_id = served.sale()
    problem = refused(
        served.http.post(f"/v1/admin/sales/{sale_id}/pause", json={"reason": "x"}, headers=viewer),
        403,
        "forbidden",
    )
    assert (problem["role"], problem["right"]) == ("viewer", "sales")


def test_a_key_is_shown_at_its_creation_only(served: Served) -> None:
    key = made(served, "support", "이서연")
    assert key["key"].startswith("rsvk_")
    assert key["hint"] == key["key"][-4:]
    listed = served.http.get(KEYS, headers=served.admin).raise_for_status()
    (shown,) = [one for one in listed.json()["keys"] if one["keyId"] == key["keyId"]]
    assert shown == {name: value for name, value in key.items() if name != "key"}
    assert key["key"] not in listed.text
    assert key["key"] not in served.log.read_text(errors="replace")


def test_the_name_of_a_key_is_recorded_whatever_x_operator_says(served: Served) -> None:
    manager = bearer(made(served, "manager", "박지훈 👩‍💻")["key"])
    sale_id = served.sale()
    answer = served.http.post(
        f"/v1/admin/sales/{sale_id}/pause",
        json={"reason": "점검"},
        headers={**manager, "X-Operator": "somebody else"},
    )
    assert answer.status_code == 200
    change = history(served, sale_id, lambda changes: changes[0]["what"] == "sale_switched")[0]
    assert (change["operator"], change["reason"]) == ("박지훈 👩‍💻", "점검")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("Kim", "Kim"),
        ("50% off", "50% off"),
        ("UTF-8''%EA%B9%80%EC%98%81%ED%9D%AC", "김영희"),
        ("utf-8''" + quote("Zoë, 2nd shift"), "Zoë, 2nd shift"),
    ],
)
def test_x_operator_carries_a_name_in_any_language(served: Served, header: str, name: str) -> None:
    sale_id = served.sale()
    answer = served.http.post(
        f"/v1/admin/sales/{sale_id}/pause",
        json={"reason": "x"},
        headers={**served.admin, "X-Operator": header},
    )
    assert answer.status_code == 200
    changes = history(served, sale_id, lambda found: found[0]["what"] == "sale_switched")
    assert changes[0]["operator"] == name


@pytest.mark.parametrize(
    "header",
    [
        "김".encode(),
        b"UTF-8''",
        b"UTF-8''%EA%B9",
        b"UTF-8''%ED%A0%80",
        b"UTF-8''%0A",
        b"UTF-8''%E2%80%AE",
        b"UTF-8''%20",
        b"UTF-8''50%",
        b"UTF-8''" + b"%EA%B9%80" * 101,
        b"x" * 101,
    ],
)
def test_a_malformed_x_operator_is_refused(served: Served, header: bytes) -> None:
    sale_id = served.sale()
    answer = served.http.post(
        f"/v1/admin/sales/{sale_id}/pause",
        json={"reason": "x"},
        headers=[
            (b"Authorization", served.admin["Authorization"].encode()),
            (b"X-Operator", header),
        ],
    )
    refused(answer, 400, "malformed_request")


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "Kim"},
        {"name": "", "role": "viewer"},
        {"name": " Kim", "role": "viewer"},
        {"name": "x" * 101, "role": "viewer"},
        {"name": "a\nb", "role": "viewer"},
        {"name": "Kim", "role": "admin"},
        {"name": "Kim", "role": "viewer", "key": "mine"},
    ],
)
def test_a_malformed_key_request_is_refused(served: Served, body: dict[str, str]) -> None:
    refused(served.http.post(KEYS, json=body, headers=served.admin), 400, "malformed_request")


def test_a_revocation_is_kept_with_who_when_and_why(served: Served) -> None:
    key = made(served, "support")
    gone = revoke(served, key, reason="left the shop")
    assert (gone["revokedBy"], gone["revokedReason"]) == ("tests", "left the shop")
    assert gone["revokedAt"]
    # A repeat changes nothing.
    assert revoke(served, key, reason="again") == gone
    refused(served.http.delete(f"{KEYS}/k-none", headers=served.admin), 404, "key_not_found")


def test_a_revoked_key_ends_within_seconds(served: Served) -> None:
    key = made(served, "viewer")

    def status() -> int:
        return served.http.get("/v1/admin/orders", headers=bearer(key["key"])).status_code

    assert status() == 200
    revoke(served, key)
    eventually(status, lambda found: found == 401, within=REVOKED_WITHIN_SECONDS)


def test_keys_are_listed_a_page_at_a_time_newest_first(served: Served) -> None:
    first, second = made(served, "viewer"), made(served, "viewer")
    found: list[str] = []
    cursor = None
    while cursor is not None or not found:
        query = {"limit": "1", **({"cursor": cursor} if cursor else {})}
        page = served.http.get(KEYS, params=query, headers=served.admin).raise_for_status().json()
        found += [key["keyId"] for key in page["keys"]]
        cursor = page["nextCursor"]
    assert len(found) == len(set(found))
    assert {first["keyId"], second["keyId"]} <= set(found[:4])
    bad = served.http.get(KEYS, params={"cursor": "x"}, headers=served.admin)
    refused(bad, 400, "malformed_request")


def history(
    served: Served, sale_id: str, is_so: Callable[[list[dict[str, str]]], bool]
) -> list[dict[str, str]]:
    """The changes of a sale, once SQL has them."""
    path = f"/v1/admin/sales/{sale_id}/history"

    def read() -> list[dict[str, str]]:
        return served.http.get(path, headers=served.admin).raise_for_status().json()["changes"]

    return eventually(read, lambda found: bool(found) and is_so(found))


def test_a_sales_history_has_each_change_with_who_when_and_why(served: Served) -> None:
    sale_id = served.sale()
    assert switch(served, sale_id, "pause", reason="a fault").status_code == 200
    assert switch(served, sale_id, "resume", reason="repaired").status_code == 200
    stock = served.http.post(
        f"/v1/admin/sales/{sale_id}/stock",
        json={"sku": "a", "delta": 5, "reason": "found five"},
        headers={**served.admin, "Idempotency-Key": f"{sale_id}-stock"},
    )
    assert stock.status_code == 200
    assert served.prepare(sale_id, served.buyer()).status_code == 201
    changes = history(served, sale_id, lambda found: len(found) == 4)
    assert [(one["what"], one["operator"], one["reason"]) for one in changes] == [
        ("restocked", "tests", "found five"),
        ("sale_switched", "tests", "repaired"),
        ("sale_switched", "tests", "a fault"),
        ("sale_put", "tests", None),
    ]
    assert all(one["at"] for one in changes)


def test_a_sales_history_is_paged(served: Served) -> None:
    sale_id = served.sale()
    assert switch(served, sale_id, "pause").status_code == 200
    history(served, sale_id, lambda found: len(found) == 2)
    path = f"/v1/admin/sales/{sale_id}/history"
    first = served.http.get(path, params={"limit": 1}, headers=served.admin).json()
    cursor = first["nextCursor"]
    last = served.http.get(path, params={"cursor": cursor}, headers=served.admin).json()
    assert [one["what"] for one in [*first["changes"], *last["changes"]]] == [
        "sale_switched",
        "sale_put",
    ]
    assert last["nextCursor"] is None
    refused(
        served.http.get(path, params={"cursor": "0"}, headers=served.admin),
        400,
        "malformed_request",
    )
    refused(
        served.http.get("/v1/admin/sales/none/history", headers=served.admin),
        404,
        "sale_not_found",
    )


class Seconds:
    """A monotonic clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds() -> Seconds:
    return Seconds()


async def test_each_process_accepts_a_new_key_and_refuses_a_revoked_one(
    sql: SqlStore, seconds: Seconds
) -> None:
    """Two processes share SQL; a copy is trusted for `FRESH_SECONDS`."""
    here, there = (
        OperatorKeys(sql.operator_keys, clock=SystemClock(), monotonic=seconds) for _ in range(2)
    )
    assert await there.find("rsvk_unknown") is None
    record, key = await here.create(name="Kim", role=Role.SUPPORT, reason="", operator="op")
    assert await here.find(key) == Operator(role=Role.SUPPORT, name="Kim")
    seconds.now += 0.6
    assert await there.find(key) == Operator(role=Role.SUPPORT, name="Kim")
    await here.revoke(record.key_id, reason="", operator="op")
    assert await here.find(key) is None
    seconds.now += FRESH_SECONDS
    assert await there.find(key) is None
    with pytest.raises(KeyNotFound):
        await here.revoke("k-none", reason="", operator="op")


async def test_keys_cost_no_query_per_request(
    sql: SqlStore, seconds: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = OperatorKeys(sql.operator_keys, clock=SystemClock(), monotonic=seconds)
    _, key = await keys.create(name="Kim", role=Role.VIEWER, reason="", operator="op")
    reads = 0
    list_valid = sql.operator_keys.list_valid

    async def counted() -> list[OperatorKeyRecord]:
        nonlocal reads
        reads += 1
        return await list_valid()

    monkeypatch.setattr(sql.operator_keys, "list_valid", counted)
    for number in range(500):
        assert await keys.find(key) is not None
        assert await keys.find(f"rsvk_{number}") is None
    assert reads == 1


async def test_no_key_is_accepted_once_sql_has_not_answered_for_seconds(
    sql: SqlStore, seconds: Seconds, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = OperatorKeys(sql.operator_keys, clock=SystemClock(), monotonic=seconds)
    _, key = await keys.create(name="Kim", role=Role.VIEWER, reason="", operator="op")
    assert await keys.find(key) is not None

    async def away() -> list[OperatorKeyRecord]:
        raise OperationalError("SELECT", {}, Exception("away"))

    with monkeypatch.context() as patch:
        patch.setattr(sql.operator_keys, "list_valid", away)
        seconds.now += STALE_SECONDS - 0.1
        assert await keys.find(key) is not None
        seconds.now += 0.1
        with pytest.raises(Unavailable):
            await keys.find(key)
    seconds.now += 1.0
    assert await keys.find(key) is not None


async def test_the_number_of_valid_keys_is_bounded(
    sql: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository_module, "KEYS_MAX", 2)
    keys = OperatorKeys(sql.operator_keys, clock=SystemClock(), monotonic=time.monotonic)
    first, _ = await keys.create(name="a", role=Role.VIEWER, reason="", operator="op")
    await keys.create(name="b", role=Role.VIEWER, reason="", operator="op")
    with pytest.raises(TooManyKeys):
        await keys.create(name="c", role=Role.VIEWER, reason="", operator="op")
    await keys.revoke(first.key_id, reason="", operator="op")
    await keys.create(name="c", role=Role.VIEWER, reason="", operator="op")


async def test_sql_has_no_key_in_the_clear(sql: SqlStore) -> None:
    keys = OperatorKeys(sql.operator_keys, clock=SystemClock())
    _, key = await keys.create(name="Kim", role=Role.OWNER, reason="", operator="op")
    (record,), _ = await sql.operator_keys.page()
    assert key not in str(record)
    assert len(record.digest) == 64


async def test_a_role_of_a_later_version_grants_nothing(sql: SqlStore, seconds: Seconds) -> None:
    keys = OperatorKeys(sql.operator_keys, clock=SystemClock(), monotonic=seconds)
    record, key = await keys.create(name="Kim", role=Role.OWNER, reason="", operator="op")
    async with sql.database.write() as connection:
        await connection.execute(
            repository_module.operator_keys.update()
            .where(repository_module.operator_keys.c.key_id == record.key_id)
            .values(role="auditor")
        )
    assert await keys.find(key) is None
