"""Webhooks of the sandbox: their events, secrets, retries and storms."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from reservation.sandbox.config import SandboxConfig
from reservation.sandbox.state import Sandbox
from reservation.sandbox.webhooks import RETRY_MINUTES
from tests.integration.toss.sandbox_steps import (
    AMOUNT,
    MINUTE,
    WAIT_SECONDS,
    paid,
    until,
)
from tests.support.sandbox import RunningSandbox, running_sandbox


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


@pytest.mark.parametrize("host", ["127.0.0.1:9", f"{'a' * 70}.test", "..test"])
async def test_an_unreachable_receiver_leaves_the_sandbox_running(
    tmp_path: Path, host: str
) -> None:
    """The errors of some host names arrive as ValueErrors."""
    sandbox = Sandbox(
        SandboxConfig(journal_dir=tmp_path, webhook_urls=(f"http://{host}/",), webhook_scale=0)
    )
    async with sandbox.running():
        sandbox.webhooks._deliver(b"{}")
        async with asyncio.timeout(20):
            while sandbox.webhooks.counts["pending"]:  # noqa: ASYNC110 - the counts have no event
                await asyncio.sleep(0.01)
        assert sandbox.webhooks.counts["failed"] == 1
        assert sandbox.ledger is not None
