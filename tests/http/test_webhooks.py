"""Webhooks: only the PG's own record of a payment changes an order, not a webhook's content."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from reservation.sandbox.webhooks import ANSWER_SECONDS, RETRY_MINUTES, STORM_TIMES
from tests.support.sandbox import running_sandbox
from tests.support.service import Served, eventually, free_port, running_service

WEBHOOKS = "/v1/payments/toss/webhooks"
#: Factor on the pauses between the tries of a webhook in a storm.
SCALE = 1e-4
#: When the last try of each webhook has ended, however late each answer comes.
TRIES_END_SECONDS = 60 * SCALE * sum(RETRY_MINUTES) + ANSWER_SECONDS * (len(RETRY_MINUTES) + 1)


def notify(served: Served, body: object) -> httpx.Response:
    """The response; retried after a 503, as the PG does, because a busy machine may give one."""
    return eventually(
        lambda: served.http.post(WEBHOOKS, json=body), lambda answer: answer.status_code != 503
    )


def changed(order: dict[str, Any], payment_key: str, status: str, **more: Any) -> dict[str, Any]:
    """A webhook as the PG sends it when a payment changed."""
    return {
        "eventType": "PAYMENT_STATUS_CHANGED",
        "createdAt": "2026-01-01T00:00:00.000000",
        "data": {
            "orderId": order["orderId"],
            "paymentKey": payment_key,
            "status": status,
            "totalAmount": order["amount"],
            "balanceAmount": order["amount"],
            "currency": "KRW",
            "method": "카드",
            **more,
        },
    }


def deposited(order: dict[str, Any], secret: str, status: str = "DONE") -> dict[str, Any]:
    """A webhook as the PG sends it when a virtual account was paid."""
    return {
        "createdAt": "2026-01-01T00:00:00.000000",
        "secret": secret,
        "status": status,
        "transactionKey": "x",
        "orderId": order["orderId"],
    }


def at_the_pg(
    served: Served, order: dict[str, Any], path: str, body: dict[str, Any]
) -> httpx.Response:
    """A call of the PG's own API that this service did not make."""
    sandbox = order["payment"]["checkoutUrl"].removesuffix("/checkout")
    url = f"{sandbox}/v1/payments/{path}"
    key = (served.settings.toss_secret_key, "")
    return served.http.post(url, json=body, auth=key).raise_for_status()


def bought(served: Served, sale_id: str) -> tuple[dict[str, Any], str]:
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    assert served.open_success_url(order, payment_key).json()["status"] == "CONFIRMED"
    return order, payment_key


def account(served: Served, sale_id: str) -> tuple[dict[str, Any], str]:
    """An order that waits for the deposit into its virtual account."""
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    assert served.open_success_url(order, payment_key).json()["status"] == "AWAITING_DEPOSIT"
    return order, payment_key


@pytest.mark.parametrize("status", ["DONE", "CANCELED", "ABORTED", "EXPIRED", "NONSENSE"])
def test_a_forged_webhook_of_a_hold_changes_nothing(served: Served, status: str) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    before = served.dump(sale_id)
    for key in (payment_key, "made-up"):
        assert notify(served, changed(order, key, status)).status_code == 200
    assert served.dump(sale_id) == before
    assert served.ledger(order)["charged"] == 0


@pytest.mark.parametrize("status", ["CANCELED", "ABORTED", "PARTIAL_CANCELED", "DONE"])
def test_a_forged_webhook_of_a_sold_order_changes_nothing(served: Served, status: str) -> None:
    sale_id = served.sale()
    order, payment_key = bought(served, sale_id)
    before = served.dump(sale_id)
    for key in (payment_key, "made-up"):
        assert notify(served, changed(order, key, status, balanceAmount=0)).status_code == 200
    assert served.dump(sale_id) == before
    assert served.ledger(order)["cancelled"] == 0


def test_a_webhook_with_a_foreign_payment_changes_neither_order(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    other, payment_key = bought(served, sale_id)
    before = served.dump(sale_id)
    assert notify(served, changed(order, payment_key, "DONE")).status_code == 200
    assert served.dump(sale_id) == before
    assert served.get_reservation(other)["status"] == "CONFIRMED"


def test_repeated_genuine_webhooks_change_nothing(served: Served) -> None:
    sale_id = served.sale()
    order, payment_key = bought(served, sale_id)
    before = served.dump(sale_id)
    for _ in range(20):
        assert notify(served, changed(order, payment_key, "DONE")).status_code == 200
    assert served.dump(sale_id) == before
    assert len(served.ledger(order)["entries"]) == 1


def test_outdated_webhooks_leave_a_sold_order_sold(tmp_path: Path) -> None:
    """The PG repeats a refused webhook for days. The tries of this one end in half a minute."""
    port = free_port()
    webhooks = f"http://127.0.0.1:{port}{WEBHOOKS}"
    with (
        running_sandbox(tmp_path, webhook_urls=(webhooks,), webhook_scale=SCALE) as sandbox,
        running_service(
            tmp_path / "service",
            RESERVATION_PORT=str(port),
            RESERVATION_TOSS_API_URL=sandbox.url,
            RESERVATION_TOSS_CHECKOUT_URL=sandbox.checkout_url,
            RESERVATION_WORKERS="1",
        ) as served,
    ):
        sale_id = served.sale()
        order = served.hold(sale_id, served.buyer())
        served.order_fault(order, "webhook_storm")
        assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
        counts = eventually(
            lambda: sandbox.http.get("/_webhooks").json(),
            lambda counts: counts["delivered"] + counts["failed"] == 1 + 4 * STORM_TIMES,
            within=TRIES_END_SECONDS,
        )
        # Those beyond the limits were refused and sent again. None was abandoned.
        assert counts["failed"] == 0
        assert served.get_reservation(order)["status"] == "CONFIRMED"
        assert served.audit(sale_id)["problems"] == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"0",
        b'"text"',
        b"{",
        b"{}",
        b'{"data":null}',
        b'{"data":[]}',
        b'{"data":{"orderId":1}}',
        b'{"orderId":{"$gt":""}}',
        b'{"orderId":"x{y}-aaaaaaaaaaaaaaaaaaaaaaaa","paymentKey":"k"}',
        b'{"orderId":"nothing-aaaaaaaaaaaaaaaaaaaaaaaa","paymentKey":"k"}',
        b'{"orderId":"nothing-aaaaaaaaaaaaaaaaaaaaaaaa\\n","paymentKey":"k"}',
        b'{"orderId":"\\u0000","paymentKey":"../../cancel"}',
        b'{"orderId":"\xff\xfe"}',
        b'{"orderId":"\\ud800","secret":"\\ud800"}',
        b"\x00\x01\x02",
        b'{"data":' + b"[" * 8000,
        b'{"x":' + b"[" * 8000 + b"]" * 7000,
        b"orderId=1&status=DONE",
    ],
)
def test_malformed_webhooks_are_acknowledged_and_ignored(served: Served, body: bytes) -> None:
    for content_type in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        answer = served.http.post(WEBHOOKS, content=body, headers={"Content-Type": content_type})
        assert answer.status_code == 200, answer.text


def lines_written(served: Served, event: str, send: Callable[[], object]) -> tuple[int, float]:
    """Lines of an event that webhooks write, a hundred at a time, and the seconds that they take.

    A line of the same second by another test may keep the first hundred silent.
    """
    seen, began = len(served.log.read_bytes()), time.monotonic()

    def lines_of_a_hundred() -> int:
        for _ in range(100):
            send()
        return served.log.read_bytes()[seen:].decode().count(event)

    lines = eventually(lines_of_a_hundred, bool)
    return lines, time.monotonic() - began


def lines_at_most(seconds: float) -> int:
    """One a second in each of the two processes of the API, in any second that has begun."""
    return 2 * (math.ceil(seconds) + 1)


def test_unreadable_webhooks_write_few_lines(served: Served) -> None:
    lines, seconds = lines_written(
        served, "webhook_malformed", lambda: served.http.post(WEBHOOKS, content=b"{")
    )
    assert lines <= lines_at_most(seconds)


def test_forged_webhooks_write_few_lines(served: Served) -> None:
    order, _ = account(served, served.sale(virtualAccounts=True))
    forged = deposited(order, "secret-of-nobody")
    lines, seconds = lines_written(
        served, "webhook_forged", lambda: served.http.post(WEBHOOKS, json=forged)
    )
    assert lines <= lines_at_most(seconds)


def test_a_long_webhook_is_processed(served: Served) -> None:
    sale_id = served.sale(virtualAccounts=True)
    order, payment_key = account(served, sale_id)
    body = changed(order, payment_key, "DONE", cancels=[{"cancelReason": "x" * 200}] * 90)
    assert notify(served, body).status_code == 200
    assert served.get_reservation(order)["status"] == "AWAITING_DEPOSIT"


def test_an_endless_webhook_body_is_not_read(served: Served) -> None:
    answer = served.http.post(WEBHOOKS, content=b" " * 1_000_000)
    assert answer.status_code == 413


def test_a_forged_deposit_webhook_sells_nothing(served: Served) -> None:
    sale_id = served.sale(virtualAccounts=True)
    order, payment_key = account(served, sale_id)
    before = served.dump(sale_id)
    for body in (
        deposited(order, "ps_guessed"),
        deposited(order, ""),
        deposited(order, "ps_guessed", "CANCELED"),
        changed(order, payment_key, "DONE"),
    ):
        assert notify(served, body).status_code == 200
    assert served.dump(sale_id) == before


def test_a_reversed_deposit_is_awaited_again(served: Served) -> None:
    sale_id = served.sale(virtualAccounts=True)
    order, payment_key = account(served, sale_id)
    for reverse, status in ((False, "CONFIRMED"), (True, "AWAITING_DEPOSIT")):
        body = {"paymentKey": payment_key, "reverse": reverse}
        served.sandbox(order, "/_deposits", body)
        eventually(
            lambda: served.get_reservation(order)["status"], lambda seen, to=status: seen == to
        )
    assert served.stock(sale_id) == (99, 1, 0)
    assert served.audit(sale_id)["problems"] == []


def test_late_money_of_an_ended_order_is_refunded(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    served.release(order)
    body = {"paymentKey": payment_key, "orderId": order["orderId"], "amount": order["amount"]}
    at_the_pg(served, order, "confirm", body)

    def status_after_a_webhook() -> str:
        # The PG repeats a webhook that a limit has refused.
        notify(served, changed(order, payment_key, "DONE"))
        return served.get_reservation(order)["status"]

    eventually(status_after_a_webhook, lambda seen: seen == "REFUNDED")
    ledger = served.ledger(order)
    assert ledger["charged"] == ledger["cancelled"] == 1000
    assert served.stock(sale_id) == (100, 0, 0)
    assert served.audit(sale_id)["problems"] == []


def test_a_cancel_made_at_the_pg_changes_no_order(
    served: Served,
) -> None:
    sale_id = served.sale()
    order, payment_key = bought(served, sale_id)
    before = served.dump(sale_id)
    at_the_pg(served, order, f"{payment_key}/cancel", {"cancelReason": "by hand"})
    assert notify(served, changed(order, payment_key, "CANCELED")).status_code == 200
    assert served.dump(sale_id) == before


def test_only_a_post_is_a_webhook(served: Served) -> None:
    assert served.http.get(WEBHOOKS).status_code == 405
