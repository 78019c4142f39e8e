"""The sandbox behaves as the PG was seen to: money, states, idempotency keys and time."""

import re
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.integration.toss.sandbox_steps import AMOUNT, DAY, MINUTE, code_of, paid, status_of
from tests.support.sandbox import RunningSandbox, running_sandbox


@pytest.mark.parametrize(
    ("header", "refused"),
    [
        (None, (401, "UNAUTHORIZED_KEY")),
        ("Bearer abc", (401, "UNAUTHORIZED_KEY")),
        ("Basic dGVzdF9nc2tfc2FuZGJveA==", (403, "INCORRECT_BASIC_AUTH_FORMAT")),
        ("Basic !!!", (403, "INCORRECT_BASIC_AUTH_FORMAT")),
        ("Basic b3RoZXI6", (401, "UNAUTHORIZED_KEY")),
    ],
    ids=["none", "bearer", "no colon", "no base64", "another key"],
)
def test_only_the_secret_key_with_its_colon_authenticates(
    sandbox: RunningSandbox, header: str | None, refused: tuple[int, str]
) -> None:
    headers = {} if header is None else {"Authorization": header}
    for method, path in [
        ("POST", "/v1/payments/confirm"),
        ("GET", "/v1/payments/x"),
        ("GET", "/v1/payments/orders/x"),
        ("POST", "/v1/payments/x/cancel"),
        ("GET", "/v1/transactions"),
    ]:
        response = httpx.request(method, sandbox.url + path, headers=headers, trust_env=False)
        assert code_of(response) == refused


@pytest.mark.parametrize(
    "code",
    ["REJECT_CARD_PAYMENT", "ALREADY_PROCESSED_PAYMENT", "COMMON_ERROR", "DUPLICATED_ORDER_ID"],
)
def test_a_test_header_forces_an_error_before_the_payment_is_read(
    sandbox: RunningSandbox, code: str
) -> None:
    headers = {"TossPayments-Test-Code": code, "Idempotency-Key": "forced"}
    body = {"paymentKey": "tboxnone", "orderId": "order-none", "amount": 1}
    status = {"REJECT_CARD_PAYMENT": 403, "COMMON_ERROR": 500}.get(code, 400)
    for _ in range(2):
        response = sandbox.http.post("/v1/payments/confirm", json=body, headers=headers)
        assert code_of(response) == (status, code)


def test_a_live_key_ignores_the_test_header(tmp_path: Path, order_id: str) -> None:
    with running_sandbox(tmp_path, secret_key="live_gsk_x") as live:
        payment_key = live.put_payment(order_id, AMOUNT)
        response = live.http.post(
            "/v1/payments/confirm",
            json={"paymentKey": payment_key, "orderId": order_id, "amount": AMOUNT},
            headers={"TossPayments-Test-Code": "COMMON_ERROR"},
        )
        assert response.status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"paymentKey":"x"}', b'{"paymentKey":1,"orderId":"x","amount":1}'],
)
def test_a_malformed_body_is_an_invalid_request(sandbox: RunningSandbox, body: bytes) -> None:
    response = sandbox.http.post("/v1/payments/confirm", content=body)
    assert code_of(response) == (400, "INVALID_REQUEST")


def test_unknown_endpoints_are_refused_in_the_pgs_format(sandbox: RunningSandbox) -> None:
    assert code_of(sandbox.http.get("/v2/payments")) == (404, "NOT_FOUND")
    assert code_of(sandbox.http.delete("/v1/payments/x")) == (405, "INVALID_REQUEST")


def test_money_moves_at_the_confirm(sandbox: RunningSandbox, order_id: str) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    assert status_of(sandbox, payment_key) == "IN_PROGRESS"
    assert sandbox.ledger(order_id)["charged"] == 0

    payment = sandbox.confirm(payment_key, order_id, AMOUNT).raise_for_status().json()
    assert (payment["status"], payment["totalAmount"], payment["method"]) == (
        "DONE",
        10_000,
        "카드",
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+09:00", payment["approvedAt"])
    assert payment["suppliedAmount"] + payment["vat"] == AMOUNT
    ledger = sandbox.ledger(order_id)
    (entry,) = ledger["entries"]
    assert (entry["kind"], entry["amount"], entry["paymentKey"]) == ("charge", AMOUNT, payment_key)
    assert ledger["payments"][0]["status"] == "DONE"
    assert (ledger["charged"], ledger["cancelled"]) == (AMOUNT, 0)
    assert sandbox.http.get(f"/v1/payments/orders/{order_id}").json() == payment


def test_a_second_confirm_is_answered_as_already_processed(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = paid(sandbox, order_id)
    again = sandbox.confirm(payment_key, order_id, AMOUNT, key="another")
    assert code_of(again) == (400, "ALREADY_PROCESSED_PAYMENT")
    assert sandbox.ledger(order_id)["charged"] == AMOUNT


def test_a_wrong_amount_or_order_moves_no_money(sandbox: RunningSandbox, order_id: str) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    assert code_of(sandbox.confirm(payment_key, order_id, 1)) == (400, "INVALID_REQUEST")
    other = sandbox.confirm(payment_key, "order-of-another", AMOUNT)
    assert code_of(other) == (403, "FORBIDDEN_REQUEST")
    strange = sandbox.confirm(payment_key, "ord/er", AMOUNT)
    assert code_of(strange) == (400, "INVALID_REQUEST")
    assert sandbox.ledger(order_id)["charged"] == 0
    assert sandbox.confirm(payment_key, order_id, AMOUNT).status_code == 200


def test_a_declined_payment_cannot_be_confirmed_again(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT, decline="INVALID_CARD_EXPIRATION")
    first = sandbox.confirm(payment_key, order_id, AMOUNT)
    assert code_of(first) == (400, "INVALID_CARD_EXPIRATION")
    again = sandbox.confirm(payment_key, order_id, AMOUNT)
    assert code_of(again) == (400, "ALREADY_PROCESSED_PAYMENT")
    payment = sandbox.http.get(f"/v1/payments/{payment_key}").json()
    assert payment["status"] == "ABORTED"
    assert payment["failure"]["code"] == "INVALID_CARD_EXPIRATION"
    assert sandbox.ledger(order_id)["charged"] == 0


def test_a_look_up_by_order_shows_the_approved_payment(
    sandbox: RunningSandbox, order_id: str
) -> None:
    approved = paid(sandbox, order_id)
    sandbox.put_payment(order_id, AMOUNT)
    shown = sandbox.http.get(f"/v1/payments/orders/{order_id}").json()
    assert shown["paymentKey"] == approved
    missing = sandbox.http.get("/v1/payments/orders/order-nobody-made")
    assert code_of(missing) == (404, "NOT_FOUND_PAYMENT")


def test_an_idempotency_key_replays_the_first_response_for_any_body(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    other_key = sandbox.put_payment(f"{order_id}-2", AMOUNT)
    key = uuid4().hex
    first = sandbox.confirm(payment_key, order_id, AMOUNT, key=key)
    other = sandbox.confirm(other_key, f"{order_id}-2", AMOUNT, key=key)
    assert (first.status_code, other.content) == (200, first.content)
    assert sandbox.ledger(f"{order_id}-2")["charged"] == 0


def test_a_refusal_is_bound_to_its_idempotency_key(sandbox: RunningSandbox, order_id: str) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    key = uuid4().hex
    wrong = sandbox.confirm(payment_key, order_id, 1, key=key)
    corrected = sandbox.confirm(payment_key, order_id, AMOUNT, key=key)
    assert (corrected.status_code, corrected.content) == (400, wrong.content)
    assert sandbox.confirm(payment_key, order_id, AMOUNT, key=uuid4().hex).status_code == 200


def test_an_idempotency_key_is_bound_to_its_url(sandbox: RunningSandbox, order_id: str) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    key = uuid4().hex
    assert sandbox.confirm(payment_key, order_id, AMOUNT, key=key).json()["status"] == "DONE"
    assert sandbox.cancel(payment_key, key=key).json()["status"] == "CANCELED"


def test_a_server_error_is_not_bound_to_its_idempotency_key(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT, decline="COMMON_ERROR")
    key = uuid4().hex
    assert code_of(sandbox.confirm(payment_key, order_id, AMOUNT, key=key))[0] == 500
    again = sandbox.confirm(payment_key, order_id, AMOUNT, key=key)
    assert code_of(again) == (400, "ALREADY_PROCESSED_PAYMENT")


def test_an_idempotency_key_above_300_characters_is_refused(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    refused = sandbox.confirm(payment_key, order_id, AMOUNT, key="k" * 301)
    assert code_of(refused) == (400, "INVALID_IDEMPOTENCY_KEY")
    assert sandbox.confirm(payment_key, order_id, AMOUNT, key="k" * 300).status_code == 200


def test_an_idempotency_key_expires_after_fifteen_days(own: RunningSandbox, order_id: str) -> None:
    payment_key = own.put_payment(order_id, AMOUNT)
    own.confirm(payment_key, order_id, AMOUNT, key="k")
    own.turn_clock(15 * DAY - MINUTE)
    assert own.confirm(payment_key, order_id, AMOUNT, key="k").status_code == 200
    own.turn_clock(2 * MINUTE)
    again = own.confirm(payment_key, order_id, AMOUNT, key="k")
    assert code_of(again) == (400, "ALREADY_PROCESSED_PAYMENT")


def test_a_full_cancel_cannot_be_followed_by_another(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = paid(sandbox, order_id)
    payment = sandbox.cancel(payment_key).raise_for_status().json()
    assert (payment["status"], payment["balanceAmount"]) == ("CANCELED", 0)
    (cancel,) = payment["cancels"]
    assert (cancel["cancelAmount"], cancel["cancelStatus"]) == (AMOUNT, "DONE")
    assert cancel["transactionKey"] == payment["lastTransactionKey"]
    assert code_of(sandbox.cancel(payment_key)) == (400, "ALREADY_CANCELED_PAYMENT")
    ledger = sandbox.ledger(order_id)
    assert (ledger["charged"], ledger["cancelled"]) == (AMOUNT, AMOUNT)


def test_a_partly_cancelled_payment_is_never_shown_as_cancelled(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = paid(sandbox, order_id)
    part = sandbox.cancel(payment_key, cancelAmount=4_000, refundableAmount=AMOUNT).json()
    assert (part["status"], part["balanceAmount"]) == ("PARTIAL_CANCELED", 6_000)
    guarded = sandbox.cancel(payment_key, cancelAmount=1, refundableAmount=AMOUNT)
    assert code_of(guarded) == (400, "NOT_MATCHES_REFUNDABLE_AMOUNT")
    too_much = sandbox.cancel(payment_key, cancelAmount=6_001)
    assert code_of(too_much) == (403, "NOT_CANCELABLE_AMOUNT")
    rest = sandbox.cancel(payment_key).json()
    assert (rest["status"], rest["balanceAmount"]) == ("PARTIAL_CANCELED", 0)
    assert code_of(sandbox.cancel(payment_key)) == (403, "NOT_CANCELABLE_AMOUNT")
    assert sandbox.ledger(order_id)["cancelled"] == AMOUNT


def test_an_invalid_cancel_is_refused(sandbox: RunningSandbox, order_id: str) -> None:
    unpaid = sandbox.put_payment(order_id, AMOUNT)
    assert code_of(sandbox.cancel(unpaid)) == (403, "NOT_CANCELABLE_PAYMENT")
    assert code_of(sandbox.cancel("tboxnone")) == (404, "NOT_FOUND_PAYMENT")
    payment_key = paid(sandbox, f"{order_id}-2")
    wrong: list[dict[str, Any]] = [
        {"cancelReason": ""},
        {"cancelReason": "x" * 201},
        {"cancelAmount": 0},
        {"currency": "USD"},
        {"refundReceiveAccount": {"bank": "20", "accountNumber": "1", "holderName": "x"}},
    ]
    for body in wrong:
        assert code_of(sandbox.cancel(payment_key, **body)) == (400, "INVALID_REQUEST")


def test_a_virtual_account_is_paid_after_it_was_confirmed(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT, method="virtual_account")
    payment = sandbox.confirm(payment_key, order_id, AMOUNT).json()
    assert (payment["status"], payment["method"]) == ("WAITING_FOR_DEPOSIT", "가상계좌")
    assert payment["virtualAccount"]["dueDate"].endswith("+09:00")
    assert (payment["virtualAccount"]["expired"], payment["approvedAt"]) == (False, None)
    assert sandbox.ledger(order_id)["charged"] == 0

    assert sandbox.deposit(payment_key)["status"] == "DONE"
    assert sandbox.ledger(order_id)["charged"] == AMOUNT
    assert sandbox.deposit(payment_key, reverse=True)["status"] == "WAITING_FOR_DEPOSIT"
    ledger = sandbox.ledger(order_id)
    assert ledger["charged"] == 0
    assert [entry["kind"] for entry in ledger["entries"]] == ["deposit", "deposit_reversed"]


def test_an_unpaid_virtual_account_can_only_be_cancelled_in_full(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT, method="virtual_account")
    sandbox.confirm(payment_key, order_id, AMOUNT)
    part = sandbox.cancel(payment_key, cancelAmount=1)
    assert code_of(part) == (403, "NOT_ALLOWED_PARTIAL_REFUND_WAITING_DEPOSIT")
    assert sandbox.cancel(payment_key).json()["status"] == "CANCELED"
    assert sandbox.ledger(order_id)["entries"] == []
    refused = sandbox.http.post("/_deposits", json={"paymentKey": payment_key})
    assert refused.status_code == 400


def test_an_overdue_virtual_account_keeps_its_status(own: RunningSandbox, order_id: str) -> None:
    payment_key = own.put_payment(order_id, AMOUNT, method="virtual_account")
    own.confirm(payment_key, order_id, AMOUNT)
    own.turn_clock(DAY)
    payment = own.http.get(f"/v1/payments/{payment_key}").json()
    assert payment["status"] == "WAITING_FOR_DEPOSIT"
    assert payment["virtualAccount"]["expired"] is True
    refused = own.http.post("/_deposits", json={"paymentKey": payment_key})
    assert code_of(refused) == (400, "INVALID_REQUEST")


def test_a_confirm_later_than_ten_minutes_is_refused(own: RunningSandbox, order_id: str) -> None:
    early, late = own.put_payment(order_id, AMOUNT), own.put_payment(f"{order_id}-2", AMOUNT)
    own.turn_clock(10 * MINUTE - 30)
    assert own.confirm(early, order_id, AMOUNT).status_code == 200
    own.turn_clock(30)
    refused = own.confirm(late, f"{order_id}-2", AMOUNT)
    assert code_of(refused) == (404, "NOT_FOUND_PAYMENT_SESSION")
    payment = own.http.get(f"/v1/payments/{late}").json()
    assert (payment["status"], payment["failure"]["code"]) == ("EXPIRED", "EXPIRED_PAYMENT")
    assert own.ledger()["charged"] == AMOUNT


def test_the_sandbox_clock_does_not_go_back(own: RunningSandbox) -> None:
    assert own.turn_clock(60)["offsetSeconds"] == 60
    refused = own.http.post("/_clock", json={"advanceSeconds": -1})
    assert refused.status_code == 400
    assert own.http.get("/_clock").json()["offsetSeconds"] == 60


def test_transactions_are_listed_by_time_in_pages(own: RunningSandbox, order_id: str) -> None:
    keys = [paid(own, f"{order_id}-{n}") for n in range(3)]
    own.cancel(keys[0])
    span = {"startDate": "2020-01-01T00:00:00", "endDate": "2100-01-01T00:00:00"}
    listed = own.http.get("/v1/transactions", params=span).json()
    assert [line["paymentKey"] for line in listed] == [*keys, keys[0]]
    assert [line["status"] for line in listed] == ["DONE", "DONE", "DONE", "CANCELED"]
    page = {"limit": 2, "startingAfter": listed[0]["transactionKey"]}
    assert own.http.get("/v1/transactions", params=span | page).json() == listed[1:3]
    past = {"startDate": "2020-01-01T00:00:00", "endDate": "2020-02-01T00:00:00"}
    assert own.http.get("/v1/transactions", params=past).json() == []
    assert code_of(own.http.get("/v1/transactions")) == (400, "INVALID_REQUEST")
    refused = own.http.get("/v1/transactions", params=span | {"limit": 5001})
    assert code_of(refused) == (400, "INVALID_REQUEST")
