"""Virtual accounts: only the buyer and the operators see the account number."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.service import Served, eventually, refused


@pytest.fixture(scope="module")
def account(served: Served) -> dict[str, Any]:
    """An order that waits for its deposit, its buyer's headers, and the PG's account of it."""
    buyer = served.buyer()
    order = served.hold(served.sale(virtualAccounts=True), buyer)
    payment_key = served.pay(order, method="virtual_account")
    answer = served.open_success_url(order, payment_key)
    assert answer.json()["status"] == "AWAITING_DEPOSIT"
    sandbox = order["payment"]["checkoutUrl"].removesuffix("/checkout")
    shown = served.http.get(
        f"{sandbox}/v1/payments/{payment_key}", auth=(served.settings.toss_secret_key, "")
    )
    return {
        "order": order,
        "buyer": buyer,
        "payment_key": payment_key,
        "answer": answer.json(),
        "at_the_pg": shown.raise_for_status().json()["virtualAccount"],
    }


def test_the_buyer_sees_the_virtual_account(served: Served, account: dict[str, Any]) -> None:
    found = served.get_reservation(account["order"], account["buyer"])
    shown, pg = found["virtualAccount"], account["at_the_pg"]
    assert (shown["bank"], shown["bankEnglish"]) == ("우리은행", "Woori Bank")
    assert (shown["accountNumber"], shown["holderName"]) == (
        pg["accountNumber"],
        pg["customerName"],
    )
    assert shown["dueAt"] == found["expiresAt"]


def test_each_response_to_the_buyer_has_the_account(
    served: Served, account: dict[str, Any]
) -> None:
    order, shown = account["order"], account["answer"]["virtualAccount"]
    path = f"/v1/sales/{order['saleId']}/reservations"
    own = served.http.get(path, headers=account["buyer"]).json()["reservations"]
    assert [one["virtualAccount"] for one in own] == [shown]
    # By a token, as the page that a card company's app came back into has one.
    assert served.get_reservation(order)["virtualAccount"] == shown
    again = served.open_success_url(order, account["payment_key"])
    assert again.json()["virtualAccount"] == shown


def test_other_buyers_cannot_see_the_account(served: Served, account: dict[str, Any]) -> None:
    order, number = account["order"], account["answer"]["virtualAccount"]["accountNumber"]
    path = f"/v1/reservations/{order['orderId']}"
    refused(served.http.get(path, headers=served.buyer()), 404, "reservation_not_found")
    refused(served.http.get(path), 401, "unauthenticated")
    sale = served.http.get(f"/v1/sales/{order['saleId']}")
    others = served.http.get(f"/v1/sales/{order['saleId']}/reservations", headers=served.buyer())
    for answer in (sale, others, served.http.get("/metrics")):
        assert number not in answer.text


def test_operators_see_the_account_with_the_order(served: Served, account: dict[str, Any]) -> None:
    path = f"/v1/admin/orders/{account['order']['orderId']}"

    def read_order() -> dict[str, Any]:
        return served.http.get(path, headers=served.admin).json()

    detail = eventually(read_order, lambda found: found.get("status") == "AWAITING_DEPOSIT")
    shown = account["answer"]["virtualAccount"]
    assert detail["virtualAccount"] == shown
    assert detail["paymentMethod"] == "가상계좌"
    (confirm,) = [one for one in detail["history"] if one["what"] == "confirm"]
    kept = confirm["facts"]["answer"]["payment"]["virtual_account"]
    assert kept["account_number"] == shown["accountNumber"]


def test_logs_and_exports_do_not_contain_the_account(
    served: Served, account: dict[str, Any]
) -> None:
    number = account["answer"]["virtualAccount"]["accountNumber"]
    sale_id = account["order"]["saleId"]
    assert served.audit(sale_id)["ok"]
    done = subprocess.run(
        [sys.executable, "-m", "api.cli", "history", sale_id],
        env={"RESERVATION_DATA_DIR": str(served.settings.data_dir), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    )
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert any(one.get("event") == "awaiting_deposit" for one in events)
    assert number not in done.stdout
    assert number not in served.log.read_text(errors="replace")


def test_a_paid_order_shows_no_account(served: Served) -> None:
    order = served.hold(served.sale(virtualAccounts=True), served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    assert "virtualAccount" in served.open_success_url(order, payment_key).json()
    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    found = eventually(
        lambda: served.get_reservation(order), lambda seen: seen["status"] == "CONFIRMED"
    )
    assert "virtualAccount" not in found
