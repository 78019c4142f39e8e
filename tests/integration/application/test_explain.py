"""The explanation of an order and of an item for operators, by the command and by HTTP."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.service import Served, eventually, refused


def run(service: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command with the admin key."""
    return subprocess.run(
        [sys.executable, "-m", "api.cli", *arguments],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("RESERVATION_")},
            "RESERVATION_DATA_DIR": str(service.settings.data_dir),
            "RESERVATION_PUBLIC_URL": service.url,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_why_shows_the_history_and_the_next_step_of_an_order(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    payment_key = served.pay(order)
    assert served.open_success_url(order, payment_key).json()["status"] == "CONFIRMED"
    served.audit(sale_id)
    ran = run(served, "why", order["orderId"])
    assert (ran.returncode, ran.stderr) == (0, "")
    for part in ("CONFIRMED since", "prepared", "intent", "answer", "confirmed", "next: CONFIRMED"):
        assert part in ran.stdout
    assert payment_key not in ran.stdout


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("hold", "HELD: the stock is held until"),
        ("release", "RELEASED: the stock is released"),
        ("refund", "REFUNDED: the payment was refunded"),
    ],
)
def test_each_status_has_an_explained_next_step(served: Served, end: str, said: str) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    if end == "release":
        assert served.release(order).status_code == 200
    if end == "refund":
        served.open_success_url(order, served.pay(order))
        done = run(served, "refund", order["orderId"], "--reason", "sorry", "--no-restock")
        assert (done.returncode, done.stderr) == (0, "")
        # The command does not wait longer than ten seconds for the PG.
        eventually(
            lambda: served.get_reservation(order)["status"], lambda status: status == "REFUNDED"
        )
        assert served.ledger(order)["cancelled"] == 1000
        sale = served.http.get(f"/v1/sales/{sale_id}").json()
        assert sale["items"][0]["total"] == 99
    served.audit(sale_id)
    path = f"/v1/admin/orders/{order['orderId']}"
    assert said in served.http.get(path, headers=served.admin).json()["next"]


@pytest.mark.slow
def test_an_undecided_payment_shows_its_next_check_and_release(served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    try:
        served.order_fault(order, "error_before_commit", operations=["confirm"], times=1000)
        assert served.open_success_url(order, served.pay(order)).status_code == 202
        path = f"/v1/admin/orders/{order['orderId']}"
        served.audit(sale_id)
        said = served.http.get(path, headers=served.admin).json()["next"]
        assert "CONFIRMING under fence" in said
        assert "the settler asks the PG" in said
        assert "the stock is released at" in said
        item = served.http.get(
            f"/v1/admin/sales/{sale_id}/items/a/why", headers=served.admin
        ).json()
        assert [row["orderId"] for row in item["undecided"]] == [order["orderId"]]
    finally:
        served.clear_faults(order)
    eventually(
        lambda: served.get_reservation(order)["status"], lambda status: status == "CONFIRMED"
    )


def test_an_item_shows_its_holders_and_next_deadlines(served: Served) -> None:
    sale_id = served.sale()
    name, buyer = served.named_buyer()
    first = served.hold(sale_id, buyer, items=[("a", 3)], amount=3000)
    served.hold(sale_id, served.buyer())
    served.audit(sale_id)
    answer = run(served, "why", f"{sale_id}/a", "--json")
    item = json.loads(answer.stdout)
    assert (item["total"], item["available"], item["held"], item["sold"]) == (100, 96, 4, 0)
    assert (item["holders"][0]["buyerId"], item["holders"][0]["quantity"]) == (name, 3)
    assert item["nextDeadlines"][0]["orderId"] == first["orderId"]
    assert item["nextDeadlines"][0]["until"] == first["expiresAt"]
    assert item["undecided"] == []
    ran = run(served, "why", f"{sale_id}/a")
    assert "holders: 2" in ran.stdout
    assert name in ran.stdout


def test_unknown_items_are_listed_as_missing(served: Served) -> None:
    sale_id = served.sale()
    path = f"/v1/admin/sales/{sale_id}/items/z/why"
    refused(served.http.get(path, headers=served.admin), 404, "sku_not_found")
    refused(served.http.get(path, headers=served.buyer()), 403, "forbidden")
    assert run(served, "why", f"{sale_id}-{'x' * 24}").returncode == 1


def test_a_sale_is_paused_resumed_and_closed_by_command(served: Served) -> None:
    sale_id = served.sale()
    for command, code in (("pause", "sale_paused"), ("resume", None), ("close", "sale_closed")):
        done = run(served, "sale", command, sale_id, "--reason", "because")
        assert (done.returncode, done.stderr) == (0, "")
        answer = served.prepare(sale_id, served.buyer())
        assert answer.json().get("code") == code
    refusal = run(served, "sale", "resume", sale_id, "--reason", "oops")
    assert refusal.returncode == 1
    assert "sale_closed" in refusal.stderr
