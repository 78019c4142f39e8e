"""The stand-in PG behaves as the PG was seen to: money, states, keys, time, page, webhooks."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest

from reservation.sandbox.faults import Fault
from reservation.sandbox.journal import Journal, JournalDamagedError
from reservation.sandbox.webhooks import RETRY_MINUTES
from tests.support.sandbox import RunningSandbox, running_sandbox, sandbox_process

AMOUNT = 10_000
MINUTE = 60
DAY = 24 * 3600
WAIT_SECONDS = 20.0

SUCCESS = "http://127.0.0.1:9/v1/payments/toss/success?token=a.b-c_d"
FAIL = "http://127.0.0.1:9/v1/payments/toss/fail?token=e.f"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSandbox]:
    with running_sandbox(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


@pytest.fixture
def order_id() -> str:
    return f"order-{uuid4().hex}"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RunningSandbox]:
    """A sandbox of the test's own, since its clock is shared by all clients."""
    with running_sandbox(tmp_path) as running:
        yield running


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


def paid(sandbox: RunningSandbox, order_id: str, **more: Any) -> str:
    payment_key = sandbox.put_payment(order_id, AMOUNT, **more)
    assert sandbox.confirm(payment_key, order_id, AMOUNT).status_code == 200
    return payment_key


def status_of(sandbox: RunningSandbox, payment_key: str) -> str:
    return sandbox.http.get(f"/v1/payments/{payment_key}").raise_for_status().json()["status"]


def until(condition: Any) -> None:
    limit = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.01)


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


def test_an_unfinished_payment_expires_after_half_an_hour(
    own: RunningSandbox, order_id: str
) -> None:
    form = open_page(own, order_id)
    own.turn_clock(30 * MINUTE - 30)
    assert own.ledger(order_id)["payments"][0]["status"] == "READY"
    own.turn_clock(30)
    assert own.ledger(order_id)["payments"][0]["status"] == "EXPIRED"
    sent = press(own, form, "card")
    assert sent.path == "/v1/payments/toss/fail"
    assert sent.query["code"] == "PAY_PROCESS_ABORTED"


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


def test_a_killed_sandbox_keeps_each_answered_change(tmp_path: Path, order_id: str) -> None:
    """Killed between any two answers: payments, money, first answers and the clock are there."""
    with sandbox_process(tmp_path) as process:
        sandbox = process.sandbox
        sandbox.turn_clock(90)
        account = sandbox.put_payment(f"{order_id}-va", AMOUNT, method="virtual_account")
        sandbox.confirm(account, f"{order_id}-va", AMOUNT)
        waiting = sandbox.put_payment(f"{order_id}-waiting", AMOUNT)
        answers: list[tuple[str, str, httpx.Response]] = []
        for number in range(3):
            order = f"{order_id}-{number}"
            payment_key = sandbox.put_payment(order, AMOUNT)
            amount = AMOUNT if number else 1  # The first one is refused, and stays so.
            answer = sandbox.confirm(payment_key, order, amount, key=f"key-{number}")
            answers.append((payment_key, order, answer))
            before = sandbox.ledger()
            process.kill()
            process.start()
            assert sandbox.ledger() == before
        assert [answer.status_code for _, _, answer in answers] == [400, 200, 200]

        for number, (payment_key, order, answer) in enumerate(answers):
            again = sandbox.confirm(payment_key, order, AMOUNT, key=f"key-{number}")
            assert (again.status_code, again.content) == (answer.status_code, answer.content)
        assert sandbox.http.get("/_clock").json()["offsetSeconds"] == 90
        assert sandbox.deposit(account)["status"] == "DONE"
        sandbox.turn_clock(10 * MINUTE)
        assert status_of(sandbox, waiting) == "EXPIRED"
        assert sandbox.ledger()["charged"] == 3 * AMOUNT


def test_a_torn_last_line_is_truncated_and_the_journal_continues(
    tmp_path: Path, order_id: str
) -> None:
    with running_sandbox(tmp_path) as first:
        paid(first, order_id)
    journal = tmp_path / "sandbox" / "journal.jsonl"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"number":3,"payment":{"payme')
    with running_sandbox(tmp_path) as second:
        assert second.ledger()["charged"] == AMOUNT
        paid(second, f"{order_id}-2")
        assert second.ledger()["charged"] == 2 * AMOUNT
    assert journal.read_bytes().startswith(whole)
    for line in journal.read_bytes().splitlines():
        json.loads(line)


@pytest.mark.parametrize("damage", ["a line that is none", "a line that is missing"])
def test_a_damaged_journal_stops_the_start(tmp_path: Path, damage: str, order_id: str) -> None:
    with running_sandbox(tmp_path) as sandbox:
        paid(sandbox, order_id)
        paid(sandbox, f"{order_id}-2")
    path = tmp_path / "sandbox" / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1:2] = [b"nonsense\n"] if damage == "a line that is none" else []
    path.write_bytes(b"".join(lines))
    journal = Journal(tmp_path / "sandbox")
    try:
        with pytest.raises(JournalDamagedError, match="line 2"):
            journal.replay()
    finally:
        journal.close()


def test_a_journal_belongs_to_one_sandbox(tmp_path: Path) -> None:
    with running_sandbox(tmp_path), pytest.raises(BlockingIOError):
        Journal(tmp_path / "sandbox")


def test_the_journal_holds_no_secret_key(tmp_path: Path, order_id: str) -> None:
    with running_sandbox(tmp_path) as sandbox:
        payment_key = sandbox.put_payment(order_id, AMOUNT)
        sandbox.confirm(payment_key, order_id, AMOUNT, key="k")
        secret_key = sandbox.secret_key
    assert secret_key not in (tmp_path / "sandbox" / "journal.jsonl").read_text()


def test_a_fault_applies_only_to_matching_calls(sandbox: RunningSandbox, order_id: str) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    rule = sandbox.order_fault(
        "rate_limited", paymentKey=payment_key, operations=["look_up"], times=1
    )
    bystander = sandbox.put_payment(f"{order_id}-2", AMOUNT)
    assert status_of(sandbox, bystander) == "IN_PROGRESS"
    assert sandbox.confirm(payment_key, order_id, AMOUNT).status_code == 200
    assert sandbox.http.get(f"/v1/payments/{payment_key}").status_code == 429
    assert sandbox.http.get(f"/v1/payments/{payment_key}").status_code == 200
    faults = sandbox.http.get("/_faults").json()["faults"]
    assert next(fault for fault in faults if fault["id"] == rule["id"])["applied"] == 1


def test_a_seeded_fault_rate_hits_the_same_calls_each_time(own: RunningSandbox) -> None:
    def draw() -> list[int]:
        own.clear_faults()
        own.order_fault("error_before_commit", rate=0.3, seed=7, operations=["look_up"])
        return [own.http.get("/v1/payments/x").status_code for _ in range(60)]

    first = draw()
    assert draw() == first
    assert 5 < first.count(500) < 35
    own.http.delete("/_faults")
    cleared = own.http.get("/_faults").json()
    assert cleared == {"faults": [], "applied": {"error_before_commit": 2 * first.count(500)}}


@pytest.mark.parametrize(
    "order",
    [
        {"fault": "unheard_of"},
        {"fault": "hang", "operations": ["refund"]},
        {"fault": "hang", "rate": 2},
        {"fault": "hang", "times": 0},
        {"fault": "hang", "orderID": "typo"},
        {"clear": False},
        {},
    ],
)
def test_an_unknown_fault_is_refused(sandbox: RunningSandbox, order: dict[str, object]) -> None:
    assert code_of(sandbox.http.post("/_faults", json=order)) == (400, "INVALID_REQUEST")


def test_each_fault_can_be_injected(own: RunningSandbox) -> None:
    for fault in Fault:
        own.order_fault(fault.value, orderId="order-of-nobody")
    assert len(own.http.get("/_faults").json()["faults"]) == len(Fault)
    assert own.clear_faults() == {"faults": [], "applied": {}}


class Form(HTMLParser):
    """The target of the page's form and the names of its buttons."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.action = ""
        self.buttons: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        assert not any(name.startswith("on") or name == "style" for name in found)
        if tag == "form":
            assert found["method"] == "post"
            self.action = found["action"] or ""
        if tag == "button":
            self.buttons.append(found["value"] or "")


class Sent:
    """The target of the browser's redirect."""

    def __init__(self, response: httpx.Response) -> None:
        assert response.status_code == 303, response.text
        parts = urlsplit(response.headers["location"])
        self.path = parts.path
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}


def page_query(sandbox: RunningSandbox, order_id: str, **more: str) -> dict[str, str]:
    return {
        "clientKey": sandbox.client_key,
        "customerKey": "customer-1",
        "orderId": order_id,
        "orderName": "콘서트 <티켓> & 1",
        "amount": str(AMOUNT),
        "currency": "KRW",
        "successUrl": SUCCESS,
        "failUrl": FAIL,
    } | more


def get_page(sandbox: RunningSandbox, query: dict[str, str]) -> httpx.Response:
    return httpx.get(sandbox.checkout_url, params=query, trust_env=False)


def open_page(sandbox: RunningSandbox, order_id: str) -> Form:
    response = get_page(sandbox, page_query(sandbox, order_id))
    assert response.status_code == 200
    return Form(response.text)


def press(sandbox: RunningSandbox, form: Form, button: str) -> Sent:
    """Submit the form as a browser without JavaScript does."""
    url = sandbox.url + form.action
    return Sent(httpx.post(url, data={"action": button}, trust_env=False))


def test_the_page_shows_the_order_and_loads_nothing_from_elsewhere(
    sandbox: RunningSandbox, order_id: str
) -> None:
    response = get_page(sandbox, page_query(sandbox, order_id))
    form = Form(response.text)
    assert form.buttons == ["card", "virtual_account", "insufficient", "decline", "cancel"]
    assert "콘서트 &lt;티켓&gt; &amp; 1" in response.text
    assert "₩10,000" in response.text
    assert 'name="viewport"' in response.text
    assert not form.tags & {"script", "style", "img", "iframe"}
    assert "//" not in response.text.replace("<!doctype", "")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    assert response.headers["referrer-policy"] == "no-referrer"
    style = httpx.get(f"{sandbox.url}/checkout.css", trust_env=False)
    assert style.headers["content-type"].startswith("text/css")
    assert "url(" not in style.text


def test_paying_redirects_to_the_success_url_and_keeps_its_query(
    sandbox: RunningSandbox, order_id: str
) -> None:
    sent = press(sandbox, open_page(sandbox, order_id), "card")
    payment_key = sent.query.pop("paymentKey")
    assert sent.path == "/v1/payments/toss/success"
    assert sent.query == {
        "token": "a.b-c_d",
        "paymentType": "NORMAL",
        "orderId": order_id,
        "amount": str(AMOUNT),
    }
    assert status_of(sandbox, payment_key) == "IN_PROGRESS"
    assert sandbox.ledger(order_id)["charged"] == 0
    confirmed = sandbox.confirm(payment_key, order_id, AMOUNT)
    assert (confirmed.status_code, confirmed.json()["orderName"]) == (200, "콘서트 <티켓> & 1")


def test_a_second_press_redirects_to_the_same_url(sandbox: RunningSandbox, order_id: str) -> None:
    form = open_page(sandbox, order_id)
    first, again = press(sandbox, form, "card"), press(sandbox, form, "card")
    assert first.query == again.query
    assert len(sandbox.ledger(order_id)["payments"]) == 1


def test_a_card_without_funds_is_declined_at_the_charge(
    sandbox: RunningSandbox, order_id: str
) -> None:
    sent = press(sandbox, open_page(sandbox, order_id), "insufficient")
    assert sent.path == "/v1/payments/toss/success"
    refused = sandbox.confirm(sent.query["paymentKey"], order_id, AMOUNT)
    assert code_of(refused) == (403, "REJECT_CARD_PAYMENT")


def test_a_virtual_account_waits_for_a_deposit(sandbox: RunningSandbox, order_id: str) -> None:
    sent = press(sandbox, open_page(sandbox, order_id), "virtual_account")
    payment = sandbox.confirm(sent.query["paymentKey"], order_id, AMOUNT).json()
    assert payment["status"] == "WAITING_FOR_DEPOSIT"


def test_a_card_refused_on_the_page_redirects_to_the_fail_url(
    sandbox: RunningSandbox, order_id: str
) -> None:
    form = open_page(sandbox, order_id)
    sent = press(sandbox, form, "decline")
    assert sent.path == "/v1/payments/toss/fail"
    assert sent.query.pop("message")
    assert sent.query == {"token": "e.f", "code": "REJECT_CARD_COMPANY", "orderId": order_id}
    # The window is still open: another card may be accepted.
    assert press(sandbox, form, "card").path == "/v1/payments/toss/success"


def test_cancelling_redirects_to_the_fail_url_without_the_order(
    sandbox: RunningSandbox, order_id: str
) -> None:
    sent = press(sandbox, open_page(sandbox, order_id), "cancel")
    assert sent.query["code"] == "PAY_PROCESS_CANCELED"
    assert "orderId" not in sent.query
    assert sandbox.ledger(order_id)["payments"][0]["status"] == "READY"


@pytest.mark.parametrize(
    "wrong",
    [
        {"clientKey": "test_gck_other"},
        {"amount": "1.5"},
        {"amount": "-1"},
        {"amount": "0"},
        {"amount": "٣"},
        {"orderId": "a/b"},
        {"orderName": ""},
        {"orderName": "x" * 101},
        {"customerKey": "a b"},
        {"currency": "won"},
        {"successUrl": "javascript:alert(1)"},
        {"successUrl": "//evil"},
        {"failUrl": "http://x/\r\nSet-Cookie: a=b"},
        {"failUrl": ""},
    ],
)
def test_an_invalid_page_request_explains_the_error(
    sandbox: RunningSandbox, order_id: str, wrong: dict[str, str]
) -> None:
    response = get_page(sandbox, page_query(sandbox, order_id, **wrong))
    assert response.status_code in {400, 401}
    assert "This payment cannot continue" in response.text
    assert Form(response.text).buttons == []
    assert sandbox.ledger(order_id)["payments"] == []


def test_an_unknown_button_or_payment_redirects_nowhere(
    sandbox: RunningSandbox, order_id: str
) -> None:
    form = open_page(sandbox, order_id)
    url = sandbox.url + form.action
    assert httpx.post(url, data={"action": "steal"}, trust_env=False).status_code == 400
    assert httpx.post(url, content=b"\xff\xfe", trust_env=False).status_code == 400
    without_page = sandbox.put_payment(f"{order_id}-2", AMOUNT)
    for payment_key in ("tboxnone", without_page):
        url = f"{sandbox.url}/checkout/{payment_key}"
        assert httpx.post(url, data={"action": "card"}, trust_env=False).status_code == 404


class Listener:
    """Accepts webhooks; refuses a configured number of them."""

    def __init__(self, refusing: int) -> None:
        self.heard: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.refusing = refusing
        self.url = ""

    def events(self, order_id: str) -> list[dict[str, Any]]:
        return [
            body
            for _, body in list(self.heard)
            if order_id in {body.get("orderId"), body.get("data", {}).get("orderId")}
        ]

    def statuses(self, order_id: str) -> list[str]:
        return [event["data"]["status"] for event in self.events(order_id) if "data" in event]


@contextmanager
def listening(refusing: int = 0) -> Iterator[Listener]:
    listener = Listener(refusing)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            listener.heard.append((headers, json.loads(body)))
            self.send_response(200 if len(listener.heard) > listener.refusing else 503)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.url = f"http://127.0.0.1:{server.server_port}/webhooks"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield listener
    finally:
        server.shutdown()
        thread.join(WAIT_SECONDS)
        server.server_close()


@contextmanager
def with_listener(
    tmp_path: Path, *, refusing: int = 0
) -> Iterator[tuple[RunningSandbox, Listener]]:
    """A sandbox with microseconds instead of minutes between two tries, and its listener."""
    with (
        listening(refusing) as listener,
        running_sandbox(tmp_path, webhook_urls=(listener.url,), webhook_scale=1e-7) as sandbox,
    ):
        yield sandbox, listener


def test_each_change_sends_an_unsigned_webhook(tmp_path: Path, order_id: str) -> None:
    with with_listener(tmp_path) as (sandbox, listener):
        payment_key = paid(sandbox, order_id)
        until(lambda: listener.statuses(order_id) == ["DONE"])
        sandbox.cancel(payment_key, cancelAmount=1)
        until(lambda: listener.statuses(order_id) == ["DONE", "PARTIAL_CANCELED"])
        (event, _) = listener.events(order_id)
        headers, _ = listener.heard[0]
    assert event["eventType"] == "PAYMENT_STATUS_CHANGED"
    assert event["data"]["paymentKey"] == payment_key
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", event["createdAt"])
    assert headers["tosspayments-webhook-transmission-id"]
    assert headers["tosspayments-webhook-transmission-time"].endswith("+09:00")
    assert headers["tosspayments-webhook-transmission-retried-count"] == "0"
    assert not any("signature" in name for name in headers)


def test_a_deposit_sends_two_webhooks_one_with_its_secret(tmp_path: Path, order_id: str) -> None:
    with with_listener(tmp_path) as (sandbox, listener):
        payment_key = sandbox.put_payment(order_id, AMOUNT, method="virtual_account")
        secret = sandbox.confirm(payment_key, order_id, AMOUNT).json()["secret"]
        sandbox.deposit(payment_key)
        until(lambda: len(listener.events(order_id)) == 4)
        events = listener.events(order_id)
    flat = sorted((event for event in events if "data" not in event), key=lambda e: e["status"])
    assert [event["status"] for event in flat] == ["DONE", "WAITING_FOR_DEPOSIT"]
    for event in flat:
        assert set(event) == {"createdAt", "secret", "status", "transactionKey", "orderId"}
        assert event["secret"] == secret


def test_declines_and_expiries_send_webhooks(tmp_path: Path, order_id: str) -> None:
    with with_listener(tmp_path) as (sandbox, listener):
        declined = sandbox.put_payment(order_id, AMOUNT, decline="REJECT_CARD_COMPANY")
        sandbox.confirm(declined, order_id, AMOUNT)
        sandbox.put_payment(f"{order_id}-2", AMOUNT)
        sandbox.turn_clock(10 * MINUTE)
        until(lambda: listener.statuses(order_id) == ["ABORTED"])
        until(lambda: listener.statuses(f"{order_id}-2") == ["EXPIRED"])


def test_an_unacknowledged_webhook_is_resent_seven_times(tmp_path: Path, order_id: str) -> None:
    with with_listener(tmp_path, refusing=1000) as (sandbox, listener):
        paid(sandbox, order_id)
        until(lambda: sandbox.http.get("/_webhooks").json()["failed"] == 1)
        counts = sandbox.http.get("/_webhooks").json()
        tries = [headers for headers, _ in listener.heard]
    assert (counts["pending"], counts["delivered"], counts["retried"]) == (0, 0, 7)
    assert RETRY_MINUTES == (1, 4, 16, 64, 256, 1024, 4096)
    numbers = [int(each["tosspayments-webhook-transmission-retried-count"]) for each in tries]
    assert numbers == list(range(8))
    assert len({each["tosspayments-webhook-transmission-id"] for each in tries}) == 1


def test_an_acknowledged_webhook_is_not_resent(tmp_path: Path, order_id: str) -> None:
    with with_listener(tmp_path, refusing=2) as (sandbox, listener):
        paid(sandbox, order_id)
        until(lambda: sandbox.http.get("/_webhooks").json()["delivered"] == 1)
        assert listener.statuses(order_id) == ["DONE"] * 3


@pytest.mark.slow
def test_a_webhook_storm_mixes_outdated_statuses_with_the_real_one(
    tmp_path: Path, order_id: str
) -> None:
    with with_listener(tmp_path) as (sandbox, listener):
        payment_key = sandbox.put_payment(order_id, AMOUNT)
        sandbox.order_fault("webhook_storm", orderId=order_id, times=1)
        sandbox.confirm(payment_key, order_id, AMOUNT)
        until(lambda: len(listener.statuses(order_id)) == 81)
        statuses = listener.statuses(order_id)
    assert statuses.count("DONE") == 21
    assert {"ABORTED", "CANCELED", "EXPIRED"} < set(statuses)


def test_a_sandbox_stops_with_unacknowledged_webhooks(tmp_path: Path, order_id: str) -> None:
    nobody = "http://127.0.0.1:9/webhooks"
    with running_sandbox(tmp_path, webhook_urls=(nobody,)) as sandbox:
        paid(sandbox, order_id)
        until(lambda: sandbox.http.get("/_webhooks").json()["retried"] == 1)
        began = time.monotonic()
    assert time.monotonic() - began < WAIT_SECONDS
