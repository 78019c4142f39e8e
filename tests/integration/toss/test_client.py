"""The PG's client: against the sandbox's faults, and against answers of any shape."""

import asyncio
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from reservation.adapters.toss import client as toss
from reservation.adapters.toss.client import TossGateway, TossLimits, parse_time
from reservation.adapters.toss.error_codes import TABLES, Operation, Verdict
from reservation.adapters.toss.transport import HttpResponse
from reservation.domain.payment_gateway import (
    Answer,
    Answered,
    Declined,
    Misconfigured,
    PaymentMissing,
    RefundAccount,
    TryAgain,
    Unknown,
    VirtualAccount,
)
from tests.support.sandbox import RunningSandbox

AMOUNT = 39_000
ACCOUNT = RefundAccount(bank="20", account_number="1234567890", holder_name="김토스")

#: A short time-out, for tests that reach it.
SHORT = TossLimits(
    connect_seconds=2.0, confirm_seconds=2.0, cancel_seconds=2.0, look_up_seconds=2.0
)

#: Much longer than SHORT: a client that waits for all of it ignored the limit.
LONG_SECONDS = 20.0
#: Until a server sends a response a second time: the connection is idle by then.
AGAIN_SECONDS = 0.05


@asynccontextmanager
async def gateway_of(url: str, secret_key: str = "test_gsk_sandbox", **more: Any):
    gateway = TossGateway(base_url=url, secret_key=secret_key, **more)
    try:
        yield gateway
    finally:
        await gateway.aclose()


@pytest.fixture
async def gateway(sandbox: RunningSandbox) -> AsyncIterator[TossGateway]:
    async with gateway_of(sandbox.url, sandbox.secret_key) as opened:
        yield opened


async def confirm(gateway: TossGateway, payment_key: str, order_id: str, key: str = "") -> Answer:
    return await gateway.confirm(
        payment_key=payment_key,
        order_id=order_id,
        amount=AMOUNT,
        idempotency_key=key or f"confirm-{payment_key}",
    )


async def test_a_confirmed_payment_has_the_fields_of_the_pg(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    answer = await confirm(gateway, payment_key, order_id)

    assert isinstance(answer, Answered)
    payment = answer.payment
    assert (payment.payment_key, payment.order_id) == (payment_key, order_id)
    assert (payment.status, payment.total_amount, payment.balance_amount) == (
        "DONE",
        AMOUNT,
        AMOUNT,
    )
    assert (payment.currency, payment.method) == ("KRW", "카드")
    assert payment.secret
    assert payment.approved_at is not None
    assert payment.approved_at.tzinfo is UTC
    assert abs((datetime.now(UTC) - payment.approved_at).total_seconds()) < 60
    assert await gateway.look_up(payment_key) == answer
    assert await gateway.look_up_order(order_id) == answer


async def test_a_virtual_account_shows_its_due_date(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT, method="virtual_account")
    answer = await confirm(gateway, payment_key, order_id)
    assert isinstance(answer, Answered)
    assert answer.payment.status == "WAITING_FOR_DEPOSIT"
    assert answer.payment.due_at is not None
    assert answer.payment.due_at > datetime.now(UTC)
    assert answer.payment.approved_at is None


async def test_a_deposit_is_refunded_to_the_given_account(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT, method="virtual_account")
    await confirm(gateway, payment_key, order_id)
    sandbox.deposit(payment_key)

    nowhere = await gateway.cancel(payment_key=payment_key, reason="r", idempotency_key="c-1")
    assert nowhere == Declined("INVALID_REFUND_ACCOUNT_INFO", "결제가 거절되었습니다.")
    answer = await gateway.cancel(
        payment_key=payment_key, reason="r", idempotency_key="c-2", refund_account=ACCOUNT
    )
    assert isinstance(answer, Answered)
    assert (answer.payment.status, answer.payment.balance_amount) == ("CANCELED", 0)


async def test_a_cancel_refunds_the_full_amount_once(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    await confirm(gateway, payment_key, order_id)
    reason = "무" * 300  # Longer than the PG accepts: it is cut, not refused.
    first = await gateway.cancel(payment_key=payment_key, reason=reason, idempotency_key="one")
    again = await gateway.cancel(payment_key=payment_key, reason=reason, idempotency_key="one")
    other = await gateway.cancel(payment_key=payment_key, reason=reason, idempotency_key="two")

    assert isinstance(first, Answered)
    assert (first.payment.status, first.payment.balance_amount) == ("CANCELED", 0)
    assert again == first
    assert other == Unknown("400 ALREADY_CANCELED_PAYMENT", bound_to_key=True)
    assert sandbox.ledger(order_id)["cancelled"] == AMOUNT


async def test_a_decline_has_the_code_of_the_pg(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT, decline="REJECT_CARD_COMPANY")
    answer = await confirm(gateway, payment_key, order_id)
    assert answer == Declined("REJECT_CARD_COMPANY", "결제 승인이 거절되었습니다.")
    seen = await gateway.look_up(payment_key)
    assert isinstance(seen, Answered)
    assert (seen.payment.status, seen.payment.failure_code) == ("ABORTED", "REJECT_CARD_COMPANY")


async def test_a_forged_payment_key_is_missing_in_each_look_up(gateway: TossGateway) -> None:
    missing = PaymentMissing("NOT_FOUND_PAYMENT")
    assert await confirm(gateway, "tboxmadeup", "order-made-up") == missing
    assert await gateway.look_up("tboxmadeup") == missing
    assert await gateway.look_up_order("order-made-up") == missing
    assert await gateway.cancel(payment_key="x", reason="r", idempotency_key="k") == missing


async def test_a_wrong_secret_key_is_a_misconfiguration(sandbox: RunningSandbox) -> None:
    async with gateway_of(sandbox.url, "test_gsk_of_somebody_else") as gateway:
        for answer in (
            await confirm(gateway, "tboxany", "order-any"),
            await gateway.look_up("tboxany"),
            await gateway.cancel(payment_key="tboxany", reason="r", idempotency_key="k"),
        ):
            assert isinstance(answer, Misconfigured)
            assert answer.code == "UNAUTHORIZED_KEY"


#: Fault, answer, and whether the money moved.
FAULTS: list[tuple[str, Answer | None, bool]] = [
    ("refuse", Unknown("ServerDisconnectedError"), False),
    ("in_progress", TryAgain("IDEMPOTENT_REQUEST_PROCESSING"), False),
    ("rate_limited", Unknown("429 TOO_MANY_REQUESTS"), False),
    ("redirect", Unknown("302 unreadable answer"), False),
    ("error_before_commit", Unknown("500 FAILED_INTERNAL_SYSTEM_PROCESSING"), False),
    ("error_after_commit", Unknown("500 FAILED_INTERNAL_SYSTEM_PROCESSING"), True),
    ("commit_then_drop", Unknown("ServerDisconnectedError"), True),
    ("garbage", Unknown("200 unreadable answer"), True),
    ("oversized", Unknown("200 oversized answer"), True),
    ("webhook_storm", None, True),
]


@pytest.mark.parametrize(("fault", "expected", "moved"), FAULTS, ids=lambda case: str(case)[:20])
async def test_each_failure_yields_an_answer_no_stronger_than_the_facts(
    sandbox: RunningSandbox,
    gateway: TossGateway,
    order_id: str,
    fault: str,
    expected: Answer | None,
    moved: bool,
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    rule = sandbox.order_fault(fault, orderId=order_id, times=1)
    answer = await confirm(gateway, payment_key, order_id)

    if expected is None:
        assert isinstance(answer, Answered)
    else:
        assert answer == expected
    assert applied(sandbox, rule) == 1
    assert sandbox.ledger(order_id)["charged"] == (AMOUNT if moved else 0)
    seen = await gateway.look_up(payment_key)
    assert isinstance(seen, Answered)
    assert seen.payment.status == ("DONE" if moved else "IN_PROGRESS")


@pytest.mark.parametrize("fault", [fault for fault, _, _ in FAULTS])
async def test_a_repeated_idempotency_key_moves_money_once(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str, fault: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    sandbox.order_fault(fault, orderId=order_id, times=1)
    await confirm(gateway, payment_key, order_id)
    answer = await confirm(gateway, payment_key, order_id)
    if fault == "error_after_commit":
        assert answer == Unknown("400 ALREADY_PROCESSED_PAYMENT", bound_to_key=True)
    else:
        assert isinstance(answer, Answered)
    assert sandbox.ledger(order_id)["charged"] == AMOUNT


@pytest.mark.parametrize(
    ("fault", "field", "expected"),
    [
        ("other_order", "order_id", "another-order-of-another-buyer"),
        ("other_key", "payment_key", "tboxanother"),
        ("other_amount", "total_amount", 1),
        ("other_currency", "currency", "USD"),
    ],
)
async def test_a_mismatched_answer_is_returned_to_the_caller(
    sandbox: RunningSandbox,
    gateway: TossGateway,
    order_id: str,
    fault: str,
    field: str,
    expected: object,
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    sandbox.order_fault(fault, orderId=order_id, times=2, operations=["confirm", "look_up"])
    for answer in (
        await confirm(gateway, payment_key, order_id),
        await gateway.look_up(payment_key),
    ):
        assert isinstance(answer, Answered)
        assert getattr(answer.payment, field) == expected


@pytest.mark.parametrize("operation", ["look_up", "look_up_order", "cancel"])
async def test_look_ups_and_cancels_report_faults_like_confirms(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str, operation: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    await confirm(gateway, payment_key, order_id)
    sandbox.order_fault("garbage", orderId=order_id, times=1, operations=["look_up", "cancel"])
    calls = {
        "look_up": lambda: gateway.look_up(payment_key),
        "look_up_order": lambda: gateway.look_up_order(order_id),
        "cancel": lambda: gateway.cancel(
            payment_key=payment_key, reason="r", idempotency_key=f"cancel-{order_id}"
        ),
    }
    assert await calls[operation]() == Unknown("200 unreadable answer")
    assert isinstance(await calls[operation](), Answered)


async def test_an_unresponsive_pg_times_out_and_is_retried_with_the_same_key(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    sandbox.order_fault("hang", orderId=order_id, times=1, seconds=LONG_SECONDS)
    async with gateway_of(sandbox.url, limits=SHORT) as gateway:
        began = time.monotonic()
        assert await confirm(gateway, payment_key, order_id) == Unknown("timeout")
        assert time.monotonic() - began < LONG_SECONDS / 2
        running = await confirm(gateway, payment_key, order_id)
        assert running == TryAgain("IDEMPOTENT_REQUEST_PROCESSING")
        # The client has gone, and the PG still finishes the request.
        sandbox.clear_faults()
        answer = await confirmed_in_the_end(gateway, payment_key, order_id)
    assert answer.payment.status == "DONE"
    assert sandbox.ledger(order_id)["charged"] == AMOUNT


async def test_a_second_key_during_the_first_call_stays_undecided(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    rule = sandbox.order_fault("hang", orderId=order_id, times=1, seconds=LONG_SECONDS)
    first = asyncio.create_task(confirm(gateway, payment_key, order_id, "first"))
    await until(lambda: applied(sandbox, rule) == 1)
    second = await confirm(gateway, payment_key, order_id, "second")
    assert second == Unknown("500 FAILED_PAYMENT_INTERNAL_SYSTEM_PROCESSING")
    sandbox.clear_faults()
    assert isinstance(await first, Answered)
    assert sandbox.ledger(order_id)["charged"] == AMOUNT


async def test_a_trickling_response_ends_at_the_deadline(
    sandbox: RunningSandbox, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    operations = ["confirm", "look_up"]
    sandbox.order_fault("slow_drip", orderId=order_id, operations=operations, seconds=LONG_SECONDS)
    async with gateway_of(sandbox.url, limits=SHORT) as gateway:
        began = time.monotonic()
        assert await confirm(gateway, payment_key, order_id) == Unknown("timeout")
        assert await gateway.look_up(payment_key) == Unknown("timeout")
        assert time.monotonic() - began < LONG_SECONDS / 2


async def test_hanging_confirms_do_not_delay_look_ups(
    sandbox: RunningSandbox, order_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toss, "CONFIRMS_MAX", 2)
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    other_key = sandbox.put_payment(order_id, AMOUNT)
    third_key = sandbox.put_payment(order_id, AMOUNT)
    rule = sandbox.order_fault("hang", orderId=order_id, seconds=LONG_SECONDS)
    limits = TossLimits(connect_seconds=0.5)
    async with gateway_of(sandbox.url, limits=limits) as gateway, asyncio.TaskGroup() as tasks:
        hanging = [
            tasks.create_task(confirm(gateway, key, order_id)) for key in (payment_key, other_key)
        ]
        await until(lambda: applied(sandbox, rule) == 2)
        # There is no connection left, so this one was never sent.
        assert await confirm(gateway, third_key, order_id) == TryAgain("ConnectionTimeoutError")
        assert isinstance(await gateway.look_up(payment_key), Answered)
        assert not any(task.done() for task in hanging)
        sandbox.clear_faults()
    assert all(isinstance(task.result(), Answered) for task in hanging)


async def test_nothing_is_sent_to_a_closed_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound and not listening: a connection is refused.
        async with gateway_of(f"http://127.0.0.1:{taken.getsockname()[1]}") as gateway:
            assert await confirm(gateway, "tboxany", "order-any") == TryAgain(
                "ClientConnectorError"
            )
            assert await gateway.look_up("tboxany") == TryAgain("ClientConnectorError")


async def test_a_cancelled_caller_returns_at_once(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    rule = sandbox.order_fault("hang", orderId=order_id, times=1, seconds=LONG_SECONDS)
    call = asyncio.create_task(confirm(gateway, payment_key, order_id))
    await until(lambda: applied(sandbox, rule) == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    sandbox.clear_faults()


async def test_an_abandoned_call_does_not_affect_a_later_one(
    sandbox: RunningSandbox, order_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one connection only; it is dropped, times out and is cancelled again and again."""
    monkeypatch.setattr(toss, "LOOK_UPS_MAX", 1)
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    async with gateway_of(sandbox.url, limits=SHORT) as gateway:
        for pause_seconds in (0.0, 0.001, 0.005):
            call = asyncio.create_task(gateway.look_up(payment_key))
            await asyncio.sleep(pause_seconds)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            for fault in ("oversized", "slow_drip"):
                operations = ["look_up"]
                sandbox.order_fault(fault, orderId=order_id, operations=operations, times=1)
                assert isinstance(await gateway.look_up(payment_key), Unknown)
                assert isinstance(await gateway.look_up(payment_key), Answered)


async def test_closing_waits_for_a_running_call(sandbox: RunningSandbox, order_id: str) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    rule = sandbox.order_fault("hang", orderId=order_id, times=1, seconds=LONG_SECONDS)
    async with gateway_of(sandbox.url) as gateway:
        call = asyncio.create_task(confirm(gateway, payment_key, order_id))
        await until(lambda: applied(sandbox, rule) == 1)
    sandbox.clear_faults()
    assert isinstance(await call, Answered)


@pytest.mark.parametrize(
    ("call", "expected", "requests"),
    [
        ("confirm", Unknown("ServerDisconnectedError"), ["POST", "GET", "POST"]),
        ("look_up", PaymentMissing("NOT_FOUND_PAYMENT"), ["POST", "GET", "GET", "GET"]),
    ],
)
async def test_only_a_look_up_is_repeated_on_a_connection_that_was_closed(
    monkeypatch: pytest.MonkeyPatch, call: str, expected: Answer, requests: list[str]
) -> None:
    """A confirm may have been read before the connection was closed."""
    monkeypatch.setattr(toss, "CONFIRMS_MAX", 1)
    monkeypatch.setattr(toss, "LOOK_UPS_MAX", 1)
    missing = b'{"code":"NOT_FOUND_PAYMENT","message":"m"}'
    head = b"HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\n"
    answer = head + b"content-length: %d\r\n\r\n" % len(missing) + missing
    async with answering(answer, times=1) as (url, received), gateway_of(url) as gateway:
        # Each pool has a connection that the server closes at its second request.
        await confirm(gateway, "tboxany", "order-any")
        await gateway.look_up("tboxany")
        found = await {
            "confirm": lambda: confirm(gateway, "tboxany", "order-any"),
            "look_up": lambda: gateway.look_up("tboxany"),
        }[call]()
    assert found == expected
    assert [request.split()[0].decode() for request in received] == requests


async def test_a_response_that_no_request_asked_for_decides_no_payment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy sends one refusal twice; the second would be the answer to the next payment."""
    monkeypatch.setattr(toss, "CONFIRMS_MAX", 1)
    refused = b'{"code":"REJECT_CARD_PAYMENT","message":"m"}'
    head = b"HTTP/1.1 403 Forbidden\r\ncontent-type: application/json\r\n"
    answer = head + b"content-length: %d\r\n\r\n" % len(refused) + refused
    async with (
        answering(answer, times=9, again=True) as (url, received),
        gateway_of(url) as gateway,
    ):
        for number in (1, 2, 3):
            found = await confirm(gateway, f"tboxkey{number}", "order-any")
            assert isinstance(found, Declined)
            # Each was sent: none was answered by the response before it.
            assert len(received) == number
            assert f"tboxkey{number}".encode() in received[-1]
            await asyncio.sleep(4 * AGAIN_SECONDS)


async def test_a_response_with_many_large_headers_is_read() -> None:
    """A proxy may add a policy of many kilobytes, or a hundred headers."""
    missing = b'{"code":"NOT_FOUND_PAYMENT","message":"m"}'
    more = b"content-security-policy: " + b"x" * 20_000 + b"\r\n" + b"x-more: y\r\n" * 300
    head = b"HTTP/1.1 404 Not Found\r\n" + more
    answer = head + b"content-length: %d\r\n\r\n" % len(missing) + missing
    async with answering(answer) as (url, _), gateway_of(url) as gateway:
        assert await gateway.look_up("tboxany") == PaymentMissing("NOT_FOUND_PAYMENT")


async def test_a_closed_gateway_sends_nothing() -> None:
    async with answering(b"") as (url, received):
        async with gateway_of(url) as gateway:
            pass
        assert await confirm(gateway, "tboxany", "order-any") == TryAgain("closed")
        assert received == []


async def test_proxies_of_the_environment_are_ignored(
    sandbox: RunningSandbox, order_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    async with gateway_of(sandbox.url) as gateway:
        assert isinstance(await gateway.look_up(payment_key), Answered)


async def test_the_log_has_the_trace_id_and_no_secret(
    sandbox: RunningSandbox, gateway: TossGateway, order_id: str
) -> None:
    payment_key = sandbox.put_payment(order_id, AMOUNT)
    with structlog.testing.capture_logs() as logs:
        answer = await confirm(gateway, payment_key, order_id)
    assert isinstance(answer, Answered)
    (line,) = logs
    assert line["event"] == "toss_answered"
    assert line["log_level"] == "debug"
    assert len(line["trace_id"]) == 32
    text = repr(logs) + repr(gateway)
    for secret in (sandbox.secret_key, payment_key, str(answer.payment.secret), "Basic "):
        assert secret not in text


@pytest.mark.parametrize(
    "payment_key",
    ["", "../../admin", "a/b", "a?b", "a#b", "a%2fb", "a b", "a\n", "키", "x" * 201, "a.b"],
)
async def test_an_invalid_payment_key_is_not_sent(payment_key: str) -> None:
    async with gateway_of("http://127.0.0.1:9") as gateway:
        for call in (
            gateway.look_up(payment_key),
            confirm(gateway, payment_key, "order-any", "key"),
            gateway.cancel(payment_key=payment_key, reason="r", idempotency_key="k"),
        ):
            with pytest.raises(ValueError, match="payment key"):
                await call


@pytest.mark.parametrize("order_id", ["", "short", "a/../b", "order id", "x" * 65, "order-1\n"])
async def test_an_invalid_order_id_is_not_sent(order_id: str) -> None:
    async with gateway_of("http://127.0.0.1:9") as gateway:
        with pytest.raises(ValueError, match="order id"):
            await gateway.look_up_order(order_id)
        with pytest.raises(ValueError, match="order id"):
            await confirm(gateway, "tboxany", order_id)


@pytest.mark.parametrize("key", ["", "x" * 301, "a\r\nHost: b", "키"])
async def test_an_invalid_idempotency_key_is_not_sent(key: str) -> None:
    async with gateway_of("http://127.0.0.1:9") as gateway:
        with pytest.raises(ValueError, match="idempotency key"):
            await gateway.cancel(payment_key="tboxany", reason="r", idempotency_key=key)


@pytest.mark.parametrize("secret_key", ["", "\ufefftest_gsk_x", "test_gsk_x\n", "a:b", "키"])
async def test_a_damaged_secret_key_is_refused_before_the_first_call(secret_key: str) -> None:
    with pytest.raises(ValueError, match="secret key"):
        TossGateway(base_url="http://127.0.0.1:9", secret_key=secret_key)


PAYMENT = {
    "paymentKey": "tboxany",
    "orderId": "order-any",
    "status": "DONE",
    "totalAmount": AMOUNT,
    "balanceAmount": AMOUNT,
    "currency": "KRW",
}


@pytest.mark.parametrize(
    "more",
    [
        {"newField": {"deep": [1, 2, {"x": None}]}, "easyPay": {"provider": "토스페이"}},
        {"totalAmount": float(AMOUNT), "method": None, "virtualAccount": None, "failure": None},
        {"approvedAt": "some day", "virtualAccount": {"dueDate": 5 * "9"}},
        {"virtualAccount": {"accountNumber": 110, "bankCode": {"x": 1}, "customerName": []}},
        {"virtualAccount": {"accountNumber": "1\x1b[31m", "bankCode": "20"}},
    ],
    ids=[
        "unknown fields",
        "a whole number with a point",
        "times that are none",
        "an account of other types",
        "an account that no page should print",
    ],
)
async def test_unreadable_optional_fields_are_ignored(more: dict[str, object]) -> None:
    async with answering(http(200, json.dumps(PAYMENT | more))) as (url, _), gateway_of(url) as pg:
        answer = await pg.look_up("tboxany")
    assert isinstance(answer, Answered)
    assert answer.payment.total_amount == AMOUNT
    assert answer.payment.approved_at is None
    assert answer.payment.virtual_account is None


@pytest.mark.parametrize(
    ("account", "read"),
    [
        (
            {"accountNumber": "X65", "bankCode": "20", "customerName": "박토스"},
            VirtualAccount(bank="20", account_number="X65", holder_name="박토스"),
        ),
        # As versions of the API before 2022-11-16 write it.
        (
            {"accountNumber": "X65", "bank": "우리"},
            VirtualAccount(bank="20", account_number="X65", holder_name=""),
        ),
        (
            {"accountNumber": 300 * "1", "bankCode": "S9"},
            VirtualAccount(bank="S9", account_number=100 * "1", holder_name=""),
        ),
        ({"accountNumber": "X65"}, None),
        ({"bankCode": "20"}, None),
    ],
)
async def test_a_virtual_account_is_read_with_its_bank_and_due_date(
    account: dict[str, object], read: VirtualAccount | None
) -> None:
    body = json.dumps(PAYMENT | {"virtualAccount": account})
    async with answering(http(200, body)) as (url, _), gateway_of(url) as pg:
        answer = await pg.look_up("tboxany")
    assert isinstance(answer, Answered)
    assert answer.payment.virtual_account == read


def http(status: int, body: str | bytes, *headers: str) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + content


STRANGE = {
    "no body": http(200, ""),
    "no json": http(200, "<html>"),
    "no object": http(200, "[]"),
    "no utf-8": http(200, b'{"paymentKey":"\xff\xfe"}'),
    "half a payment": http(200, json.dumps({"paymentKey": "tboxany"})),
    "parts of a won": http(200, json.dumps(PAYMENT | {"totalAmount": 0.5})),
    "an amount in words": http(200, json.dumps(PAYMENT | {"totalAmount": "39000"})),
    "a refusal with status 200": http(200, '{"code":"REJECT_CARD_COMPANY","message":""}'),
    "a payment with status 201": http(201, json.dumps(PAYMENT)),
    "nothing more to say": b"HTTP/1.1 204 X\r\n\r\n",
    "a nest without end": http(200, b'{"x":' + b"[" * 60_000),
    "a redirect to nowhere": http(302, "", "Location: http://[::bad"),
    "an error page": http(404, "<h1>not found</h1>"),
    "a refusal without a code": http(400, '{"message":"no"}'),
    "a code that is not a word": http(400, '{"code":"A\\nB","message":"no"}'),
    "an empty code": http(400, '{"code":"","message":"no"}'),
    "a code in a list": http(400, '[{"code":"REJECT_CARD_COMPANY"}]'),
    "a decline with status 500": http(500, '{"code":"REJECT_CARD_COMPANY","message":"no"}'),
    "cut in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{",
    "cut in the head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "no http": b"SSH-2.0-x\r\n",
    "no answer": b"",
    "a broken gzip": http(200, b"no gzip", "Content-Encoding: gzip"),
    "a gzip that unfolds": http(200, gzip.compress(b" " * 5_000_000), "Content-Encoding: gzip"),
    "too long a body": http(200, b" " * (toss.ANSWER_BYTES_MAX + 1)),
}


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE.keys())
async def test_an_unreadable_answer_leaves_the_payment_undecided(answer: bytes) -> None:
    async with answering(answer) as (url, _), gateway_of(url) as gateway:
        for call in (confirm(gateway, "tboxany", "order-any"), gateway.look_up("tboxany")):
            got = await call
            assert isinstance(got, Unknown), got
            assert not got.bound_to_key


@pytest.mark.parametrize("body", ['{"code":"C","message":"m"}', '{"error":{"code":"C"}}'])
async def test_a_refusal_inside_an_error_object_is_read(body: str) -> None:
    body = body.replace('"C"', '"REJECT_CARD_COMPANY"')
    async with answering(http(403, body)) as (url, _), gateway_of(url) as gateway:
        answer = await confirm(gateway, "tboxany", "order-any")
    assert isinstance(answer, Declined)
    assert answer.code == "REJECT_CARD_COMPANY"


async def test_requests_match_the_pgs_documentation() -> None:
    async with (
        answering(http(200, json.dumps(PAYMENT))) as (url, requests),
        gateway_of(url, "test_gsk_abc") as gateway,
    ):
        await confirm(gateway, "tboxany", "order-any", "key-1")
        await gateway.look_up_order("order-any")
    sent, looked_up = (request.decode().split("\r\n\r\n", 1) for request in requests)
    head, body = sent
    assert head.startswith("POST /v1/payments/confirm HTTP/1.1\r\n")
    lines = {line.lower() for line in head.split("\r\n")}
    # test_gsk_abc, a colon, no password.
    assert "authorization: basic dgvzdf9nc2tfywjjog==" in lines
    assert {"idempotency-key: key-1", "content-type: application/json"} <= lines
    assert json.loads(body) == {"paymentKey": "tboxany", "orderId": "order-any", "amount": AMOUNT}
    assert looked_up[0].startswith("GET /v1/payments/orders/order-any HTTP/1.1\r\n")
    assert "idempotency-key" not in looked_up[0].lower()


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-11-23T10:00:00+09:00", datetime(2026, 11, 23, 1, tzinfo=UTC)),
        ("2026-11-23T10:00:00", datetime(2026, 11, 23, 1, tzinfo=UTC)),
        ("2026-11-23T10:00:00.123456", datetime(2026, 11, 23, 1, 0, 0, 123456, tzinfo=UTC)),
        ("2026-11-23T01:00:00Z", datetime(2026, 11, 23, 1, tzinfo=UTC)),
        ("0001-01-01T00:00:00+09:00", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_a_time_without_an_offset_is_korean_time(text: str | None, at: datetime | None) -> None:
    assert parse_time(text) == at


@given(text=st.text(max_size=40))
def test_any_text_is_parsed_as_a_time_without_an_exception(text: str) -> None:
    at = parse_time(text)
    assert at is None or at.tzinfo is UTC


@given(
    operation=st.sampled_from(Operation),
    status=st.integers(100, 599),
    body=st.binary(max_size=200)
    | st.dictionaries(
        st.sampled_from(["code", "message", "error", *PAYMENT]),
        st.none() | st.integers() | st.floats() | st.text() | st.just("REJECT_CARD_PAYMENT"),
    ).map(lambda found: json.dumps(found).encode()),
)
def test_any_body_gives_an_answer_without_a_wrong_decline(
    operation: Operation, status: int, body: bytes
) -> None:
    answer = toss._read_answer(operation, HttpResponse(status, {}, body))
    if isinstance(answer, Declined):
        assert 400 <= status < 500
        assert TABLES[operation][answer.code] is Verdict.DECLINED
    if isinstance(answer, Answered):
        assert status == 200


@asynccontextmanager
async def answering(
    answer: bytes, *, times: int = 0, again: bool = False
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives every client the same response, and what it received.

    Args:
        answer: the response.
        times: the connection is closed at the request after this many; 0 closes it after the first
            response.
        again: whether each response is sent once more, a moment later.
    """
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answered = 0
        with suppress(asyncio.IncompleteReadError):
            while True:
                requests.append(await _request_of(reader))
                if times and answered == times:
                    break
                writer.write(answer)
                answered += 1
                if again:
                    await asyncio.sleep(AGAIN_SECONDS)
                    writer.write(answer)
                if not times:
                    break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", requests


async def _request_of(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-len")]
    body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
    return head + body


async def confirmed_in_the_end(gateway: TossGateway, payment_key: str, order_id: str) -> Answered:
    limit = time.monotonic() + LONG_SECONDS
    while time.monotonic() < limit:
        answer = await confirm(gateway, payment_key, order_id)
        if isinstance(answer, Answered):
            return answer
        await asyncio.sleep(0.05)
    raise AssertionError("the payment was never confirmed")


async def until(condition: Any) -> None:
    limit = time.monotonic() + LONG_SECONDS
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < limit, "it never happened"
        await asyncio.sleep(0.02)


def applied(sandbox: RunningSandbox, rule: dict[str, Any]) -> int:
    rules = sandbox.http.get("/_faults").json()["faults"]
    return next(found["applied"] for found in rules if found["id"] == rule["id"])
