"""OpenAPI document as published, against the contract's tables, written out here."""

import json
from typing import Any

import pytest

from api.http.app import create_app
from api.http.problem_details import STATUSES
from tests.support.service import Served

METHODS = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}
PREPARE = ("POST", "/v1/sales/{sale_id}/reservations")
SUCCESS = ("GET", "/v1/payments/toss/success")

OPERATOR = {"unauthenticated", "forbidden", "unavailable"}
#: Every operation of the contract: the statuses of its answers, and the codes of its refusals.
CONTRACT: dict[tuple[str, str], tuple[set[int], set[str]]] = {
    ("POST", "/v1/guests"): ({201}, {"rate_limited"}),
    ("GET", "/v1/sales"): ({200}, {"malformed_request", "unavailable"}),
    ("GET", "/v1/sales/{sale_id}"): ({200}, {"sale_not_found", "sale_recovering"}),
    ("GET", "/v1/sales/{sale_id}/events"): (
        {200},
        {"sale_not_found", "rate_limited", "sale_recovering"},
    ),
    PREPARE: (
        {201},
        {
            "malformed_request",
            "unauthenticated",
            "sale_not_found",
            "sku_not_found",
            "sold_out",
            "buyer_limit_exceeded",
            "amount_mismatch",
            "invalid_admission",
            "sale_paused",
            "sale_recovering",
            "sale_not_open",
            "sale_closed",
            "idempotency_key_reused",
            "rate_limited",
            "too_many_orders",
            "unavailable",
            "outcome_unknown",
        },
    ),
    ("GET", "/v1/sales/{sale_id}/reservations"): ({200}, {"unauthenticated", "sale_not_found"}),
    ("GET", "/v1/reservations/{order_id}"): (
        {200},
        {"unauthenticated", "reservation_not_found", "hold_lost"},
    ),
    ("POST", "/v1/reservations/{order_id}/release"): (
        {200, 202},
        {
            "unauthenticated",
            "reservation_not_found",
            "payment_in_progress",
            "already_confirmed",
            "hold_lost",
        },
    ),
    SUCCESS: (
        {200, 202, 303},
        {
            "amount_mismatch",
            "invalid_token",
            "reservation_not_found",
            "sold_out",
            "reservation_expired",
            "buyer_limit_exceeded",
            "hold_lost",
            "payment_declined",
        },
    ),
    ("GET", "/v1/payments/toss/fail"): ({200, 303}, {"invalid_token", "hold_lost"}),
    ("POST", "/v1/payments/toss/webhooks"): ({200}, set()),
    ("PUT", "/v1/admin/sales/{sale_id}"): (
        {200, 201},
        {
            *OPERATOR,
            "malformed_request",
            "invalid_sale",
            "total_too_low",
            "precondition_required",
            "precondition_failed",
            "sale_recovering",
        },
    ),
    ("GET", "/v1/admin/sales/{sale_id}"): ({200}, {*OPERATOR, "sale_not_found"}),
    ("POST", "/v1/admin/sales/{sale_id}/stock"): (
        {200},
        {
            *OPERATOR,
            "malformed_request",
            "sale_not_found",
            "sku_not_found",
            "insufficient_available",
            "idempotency_key_reused",
        },
    ),
    **{
        ("POST", f"/v1/admin/sales/{{sale_id}}/{action}"): ({200}, {*OPERATOR, "sale_not_found"})
        for action in ("pause", "resume", "close")
    },
    ("POST", "/v1/admin/sales/{sale_id}/archive"): (
        {200},
        {*OPERATOR, "sale_not_found", "sale_not_settled"},
    ),
    ("GET", "/v1/admin/sales/{sale_id}/audit"): ({200}, {*OPERATOR, "sale_not_found"}),
    ("GET", "/v1/admin/orders"): ({200}, {*OPERATOR, "malformed_request"}),
    ("GET", "/v1/admin/orders/{order_id}"): ({200}, {*OPERATOR, "reservation_not_found"}),
    ("POST", "/v1/admin/orders/{order_id}/refund"): (
        {200, 202},
        {
            *OPERATOR,
            "malformed_request",
            "reservation_not_found",
            "not_refundable",
            "refund_pending",
            "refund_account_required",
            "idempotency_key_reused",
        },
    ),
    ("POST", "/v1/admin/orders/{order_id}/release"): (
        {200, 202},
        {
            *OPERATOR,
            "malformed_request",
            "reservation_not_found",
            "payment_in_progress",
            "already_confirmed",
        },
    ),
    ("POST", "/v1/admin/orders/{order_id}/resolve"): (
        {200, 202},
        {*OPERATOR, "malformed_request", "reservation_not_found"},
    ),
    ("GET", "/v1/admin/sales/{sale_id}/history"): ({200}, {*OPERATOR, "sale_not_found"}),
    ("GET", "/v1/admin/keys"): ({200}, {*OPERATOR, "malformed_request"}),
    ("POST", "/v1/admin/keys"): ({201}, {*OPERATOR, "malformed_request"}),
    ("DELETE", "/v1/admin/keys/{key_id}"): ({200}, {*OPERATOR, "key_not_found"}),
    ("GET", "/v1/admin/refunds"): ({200}, {*OPERATOR, "malformed_request"}),
    ("GET", "/health/live"): ({200}, set()),
    ("GET", "/health/ready"): ({200, 503}, set()),
    ("GET", "/metrics"): ({200}, {"unauthenticated", "forbidden"}),
}

#: The credential of each endpoint: the names of the document's security schemes.
SECURITY = {
    PREPARE: ["buyer"],
    ("GET", "/v1/sales/{sale_id}/reservations"): ["buyer"],
    ("GET", "/v1/reservations/{order_id}"): ["buyer", "reservationToken"],
    ("POST", "/v1/reservations/{order_id}/release"): ["buyer", "reservationToken"],
}


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, Any]:
    answer = served.http.get("/schema/openapi.json")
    assert answer.status_code == 200
    return answer.json()


def operation_of(document: dict[str, Any], call: tuple[str, str]) -> dict[str, Any]:
    method, path = call
    return document["paths"][path][method.lower()]


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    return document["components"]["schemas"][reference.rsplit("/", 1)[1]]


def published(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method in METHODS
    }


def test_the_document_has_each_operation_of_the_contract(document: dict[str, Any]) -> None:
    assert set(published(document)) >= set(CONTRACT)


def test_endpoints_beyond_the_contract_are_for_operators(document: dict[str, Any]) -> None:
    added = set(published(document)) - set(CONTRACT)
    assert all(path.startswith("/v1/admin/") for _, path in added)


def test_each_operation_has_a_unique_id_and_a_description(
    document: dict[str, Any],
) -> None:
    operations = list(published(document).values())
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(operation["description"] for operation in operations)


@pytest.mark.parametrize("call", CONTRACT, ids=" ".join)
def test_each_response_and_refusal_is_documented(
    document: dict[str, Any], call: tuple[str, str]
) -> None:
    statuses, codes = CONTRACT[call]
    responses = operation_of(document, call)["responses"]
    assert {str(status) for status in statuses} <= set(responses)
    for code in codes:
        status = STATUSES[code] if code != "amount_mismatch" else 400 if call == SUCCESS else 409
        assert f"`{code}`" in responses[str(status)]["description"], code


def test_each_refusal_is_a_problem_document(document: dict[str, Any]) -> None:
    for call, operation in published(document).items():
        for status, response in operation["responses"].items():
            is_readiness = status == "503" and call == ("GET", "/health/ready")
            if int(status) < 400 or is_readiness:
                continue
            assert list(response["content"]) == ["application/problem+json"], (call, status)
            schema = resolved(document, response["content"]["application/problem+json"]["schema"])
            members = {"type", "title", "status", "detail", "code", "instance"}
            assert set(schema["properties"]) >= members


@pytest.mark.parametrize("call", CONTRACT, ids=" ".join)
def test_required_credentials_are_documented(
    document: dict[str, Any], call: tuple[str, str]
) -> None:
    _, path = call
    expected = ["operatorKey"] if path.startswith("/v1/admin/") else SECURITY.get(call, [])
    security = operation_of(document, call).get("security") or []
    assert [name for alternative in security for name in alternative] == expected
    assert set(expected) <= set(document["components"]["securitySchemes"])


def test_the_limits_of_prepares_body_are_documented(document: dict[str, Any]) -> None:
    prepare = operation_of(document, PREPARE)
    body = prepare["requestBody"]
    assert body["required"] is True
    wish = resolved(document, body["content"]["application/json"]["schema"])
    assert set(wish["properties"]) == {"items", "amount", "orderName"}
    assert set(wish["required"]) == {"items", "amount"}
    items = wish["properties"]["items"]
    assert (items["minItems"], items["maxItems"]) == (1, 20)
    assert wish["properties"]["amount"]["type"] == "integer"
    assert wish["properties"]["amount"]["minimum"] == 1
    assert wish["properties"]["orderName"]["maxLength"] == 100
    line = resolved(document, items["items"])
    assert set(line["required"]) == set(line["properties"]) == {"sku", "quantity"}
    assert line["properties"]["quantity"]["minimum"] == 1
    assert "{1,64}" in line["properties"]["sku"]["pattern"]


def test_prepares_idempotency_key_is_documented_as_required(document: dict[str, Any]) -> None:
    parameters = operation_of(document, PREPARE)["parameters"]
    (key,) = (one for one in parameters if one["name"] == "Idempotency-Key")
    assert (key["in"], key["required"]) == ("header", True)
    assert "{1,255}" in key["schema"]["pattern"]


@pytest.mark.parametrize(
    ("call", "status", "members"),
    [
        (
            PREPARE,
            "201",
            "orderId saleId status items amount currency orderName expiresAt token payment",
        ),
        (
            ("GET", "/v1/sales/{sale_id}"),
            "200",
            "saleId name currency status opensAt closesAt holdSeconds holdPolicy serverTime items",
        ),
        (("GET", "/v1/sales"), "200", "sales nextCursor"),
        (("GET", "/v1/sales/{sale_id}/reservations"), "200", "reservations"),
        (("POST", "/v1/guests"), "201", "buyerId token"),
        (
            ("GET", "/v1/admin/sales/{sale_id}/audit"),
            "200",
            "ok checkedAt lag skus problems",
        ),
        (("GET", "/v1/admin/orders"), "200", "orders nextCursor"),
        (("GET", "/v1/admin/orders/{order_id}"), "200", "orderId status seq history"),
    ],
)
def test_responses_have_the_members_of_the_contract(
    document: dict[str, Any], call: tuple[str, str], status: str, members: str
) -> None:
    response = operation_of(document, call)["responses"][status]
    schema = resolved(document, response["content"]["application/json"]["schema"])
    assert set(schema["properties"]) >= set(members.split())


def test_the_document_is_equal_at_each_start(served: Served, document: dict[str, Any]) -> None:
    """This process has another hash seed than the service's."""
    made = create_app(served.settings).openapi_schema.to_schema()
    assert json.dumps(made) == json.dumps(document)


def test_the_document_does_not_contain_the_pages(document: dict[str, Any]) -> None:
    assert not {"/", "/docs", "/result", "/static/{file_path}"} & set(document["paths"])


def test_the_document_page_loads_without_a_network(served: Served) -> None:
    page = served.http.get("/docs")
    assert page.status_code == 200
    assert "https://" not in page.text
    assert "http://" not in page.text
