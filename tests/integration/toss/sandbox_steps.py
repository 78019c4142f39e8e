"""Steps at the sandbox: a paid order, a status, a refusal's code."""

import time
from typing import Any

import httpx

from tests.support.sandbox import RunningSandbox

AMOUNT = 10_000


MINUTE = 60


DAY = 24 * 3600


WAIT_SECONDS = 20.0


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
