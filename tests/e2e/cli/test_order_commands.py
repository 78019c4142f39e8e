"""Commands about orders against a running service: refund, refunds, why, history."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import Served, eventually

pytestmark = pytest.mark.e2e


def run(served: Served, *words: str, status: int = 0) -> str:
    """The output of a command, or its error message if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "api.cli", *words],
        env={
            "PATH": os.environ["PATH"],
            "RESERVATION_DATA_DIR": str(served.settings.data_dir),
            "RESERVATION_PORT": str(served.settings.port),
            "RESERVATION_ADMIN_API_KEY": served.settings.admin_api_key,
        },
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def awaiting(served: Served) -> tuple[dict[str, Any], str]:
    order = served.hold(served.sale(virtualAccounts=True), served.buyer())
    payment_key = served.pay(order, method="virtual_account")
    assert served.open_success_url(order, payment_key).json()["status"] == "AWAITING_DEPOSIT"
    return order, payment_key


def test_a_deposit_is_refunded_from_the_command_line(served: Served) -> None:
    order, payment_key = awaiting(served)
    order_id, reason = order["orderId"], ("--reason", "a test")
    # SQL gets the order a moment later.
    eventually(
        lambda: served.http.get(f"/v1/admin/orders/{order_id}", headers=served.admin).status_code,
        lambda status: status == 200,
    )
    shown = eventually(
        lambda: run(served, "why", order_id), lambda output: "AWAITING_DEPOSIT:" in output
    )
    assert f"awaits a deposit to Woori Bank (우리은행) {number_of(served, order)}" in shown
    served.sandbox(order, "/_deposits", {"paymentKey": payment_key})
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "CONFIRMED")
    refused = run(served, "refund", order_id, *reason, status=1)
    assert "refund_account_required" in refused
    half = run(served, "refund", order_id, *reason, "--account", "110123456789", status=2)
    assert "--bank, --account and --holder must be given together" in half
    to = ("--bank", "신한은행", "--account", "110123456789", "--holder", "김토스")
    assert "REFUNDED" in run(served, "refund", order_id, *reason, *to)
    assert served.ledger(order)["cancelled"] == order["amount"]
    done = json.loads(run(served, "refunds", "--status", "done", "--json"))["refunds"]
    (one,) = [refund for refund in done if refund["orderId"] == order_id]
    assert one["refundReceiveAccount"]["bank"] == "88"


def number_of(served: Served, order: dict[str, Any]) -> str:
    return served.get_reservation(order)["virtualAccount"]["accountNumber"]


def test_pending_refunds_are_listed_with_the_last_answer_of_the_pg(served: Served) -> None:
    order = served.hold(served.sale(), served.buyer())
    served.open_success_url(order, served.pay(order))
    served.order_fault(order, "error_before_commit", operations=["cancel"], times=1000)
    output = run(served, "refund", order["orderId"], "--reason", "a test")
    assert "the PG's last answer was 500" in output
    listed = run(served, "refunds")
    assert order["orderId"] in listed
    assert "500" in listed
    why = run(served, "why", order["orderId"])
    assert "refund pending, units back on sale" in why
    served.clear_faults(order)
    eventually(lambda: served.get_reservation(order)["status"], lambda seen: seen == "REFUNDED")


def test_a_history_file_is_readable_only_by_its_owner(served: Served, tmp_path: Path) -> None:
    """It names buyers and payment keys."""
    order = served.hold(served.sale(), served.buyer())
    fresh, old = tmp_path / "fresh", tmp_path / "old"
    old.write_text("of another sale")
    old.chmod(0o644)
    for path in (fresh, old):
        run(served, "history", order["saleId"], "--out", str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert order["orderId"] in path.read_text()
    # A failed write empties no file, and reports an error in a line.
    run(served, "history", "no-such-sale", "--out", str(old), status=1)
    assert order["orderId"] in old.read_text()
    said = run(served, "history", order["saleId"], "--out", str(tmp_path / "no" / "way"), status=1)
    assert "No such file or directory" in said
    assert run(served, "history", order["saleId"], "--out", "/dev/stdout").count("\n") > 2


def test_an_order_is_released_and_resolved_with_who_and_why(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    by = ("--reason", "전화 요청", "--operator", "이서연")
    assert "RELEASED" in run(served, "release", order["orderId"], *by)
    eventually(
        lambda: run(served, "why", order["orderId"]),
        lambda said: "operator=이서연" in said and "note=전화 요청" in said,
    )
    paid = served.hold(sale_id, served.buyer())
    served.open_success_url(paid, served.pay(paid))
    refused = run(served, "release", paid["orderId"], *by, status=1)
    assert "already_confirmed" in refused
    assert "CONFIRMED" in run(served, "resolve", paid["orderId"], *by)


def test_the_changes_of_a_sale_are_listed(served: Served) -> None:
    sale_id = served.sale()
    run(served, "sale", "pause", sale_id, "--reason", "점검", "--operator", "박지훈")
    said = eventually(lambda: run(served, "sale", "history", sale_id), lambda out: "점검" in out)
    assert "박지훈" in said
    assert "sale_put" in said


def test_a_key_is_created_used_listed_and_revoked(served: Served) -> None:
    made = json.loads(run(served, "key", "create", "이서연", "--role", "viewer", "--json"))
    listed = run(served, "key", "list")
    assert made["keyId"] in listed
    assert made["key"] not in listed
    shown_once = run(served, "key", "create", "Kim", "--role", "support")
    assert len([line for line in shown_once.splitlines() if line.startswith("rsvk_")]) == 1
    gone = run(served, "key", "revoke", made["keyId"], "--reason", "left")
    assert made["keyId"] in gone
    shown = json.loads(run(served, "key", "list", "--json"))["keys"]
    (one,) = [key for key in shown if key["keyId"] == made["keyId"]]
    assert one["revokedReason"] == "left"
