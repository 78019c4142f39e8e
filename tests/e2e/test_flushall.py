"""Redis loses a sale in the middle of it: noticed, refused, and brought back from SQL."""

import os
import subprocess
import sys
from typing import Any

import pytest

from tests.fixtures.service import Served, eventually, refused

#: Within which /health/ready must name a lost sale.
NOTICED_SECONDS = 6.0


def rebuild(service: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`reservation rebuild` as an operator on the service's machine runs it."""
    return subprocess.run(
        [sys.executable, "-m", "api.cli", "rebuild", *arguments],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("RESERVATION_")},
            "RESERVATION_DATA_DIR": str(service.settings.data_dir),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def missing(service: Served) -> list[str]:
    return service.http.get("/health/ready").json().get("missing", [])


def flushed(service: Served, sale_id: str) -> None:
    """Wait until SQL has every event."""
    assert service.audit(sale_id)["lag"] == 0


def half_sold(service: Served) -> tuple[str, dict[str, tuple[dict[str, Any], dict[str, str]]]]:
    """A sale with an order of each kind; the orders and their buyers."""
    sale_id = service.sale()
    orders: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for kind in ("paid", "held", "released", "declined"):
        buyer = service.buyer()
        orders[kind] = (service.hold(sale_id, buyer, key=f"key-{kind}"), buyer)
    paid = orders["paid"][0]
    assert service.come_back(paid, service.pay(paid)).json()["status"] == "CONFIRMED"
    assert service.release(orders["released"][0]).status_code == 200
    declined = orders["declined"][0]
    card = service.pay(declined, decline="REJECT_CARD_COMPANY")
    refused(service.come_back(declined, card), 402, "payment_declined")
    return sale_id, orders


@pytest.mark.e2e
def test_a_flushed_server_is_refused_named_rebuilt_and_clean(served: Served) -> None:
    sale_id, orders = half_sold(served)
    flushed(served, sale_id)
    before = served.dump(sale_id)
    with served.redis() as client:
        for key in client.scan_iter(f"rsv:{{{sale_id}}}:*"):
            client.delete(key)
    refused(served.prepare(sale_id, served.buyer()), 503, "sale_recovering")
    name = f"sale-recovering:{sale_id}"
    eventually(lambda: missing(served), lambda names: name in names, within=NOTICED_SECONDS)
    gap = served.http.get("/health/ready").json()["recovering"][sale_id]
    assert "Redis has no such sale" in gap

    done = rebuild(served, sale_id)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "restored 4 orders" in done.stdout

    eventually(lambda: missing(served), lambda names: name not in names)
    assert without_head(served.dump(sale_id)) == without_head(before)
    assert served.audit(sale_id)["ok"]
    assert served.hold(sale_id, served.buyer())["status"] == "HELD"
    held, buyer = orders["held"]
    assert served.hold(sale_id, buyer, key="key-held")["orderId"] == held["orderId"]
    assert served.come_back(held, served.pay(held)).json()["status"] == "CONFIRMED"
    assert served.ledger(held)["charged"] == held["amount"]
    assert served.ledger(orders["paid"][0])["charged"] == 1000
    assert served.ledger(orders["declined"][0])["charged"] == 0
    assert served.audit(sale_id)["ok"]


def without_head(dump: dict[str, Any]) -> dict[str, Any]:
    """Everything that a rebuild brings back as it was."""
    kept = {}
    for key, value in dump.items():
        if ":rate:" in key or key.endswith(":outbox"):
            continue
        if key.endswith(":sale"):
            names = ("epoch", "seq", "chain", "created_at")
            value = {name: text for name, text in value.items() if name not in names}
        if ":order:" in key:
            value = {name: text for name, text in value.items() if name != "claim_id"}
        kept[key] = value
    return kept
