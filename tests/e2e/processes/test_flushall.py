"""Loss of a sale in Redis: detected, refused, and restored from SQL."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.service import Served, eventually, refused, running_service

#: Time limit for /health/ready to name a lost sale.
NOTICED_SECONDS = 6.0


def rebuild(service: Served, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`reservation rebuild` as an operator on the service's machine runs it."""
    return subprocess.run(
        [sys.executable, "-m", "api.cli", "rebuild", *arguments],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("RESERVATION_")},
            "RESERVATION_DATA_DIR": str(service.settings.data_dir),
            **environ,
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
    assert service.open_success_url(paid, service.pay(paid)).json()["status"] == "CONFIRMED"
    assert service.release(orders["released"][0]).status_code == 200
    declined = orders["declined"][0]
    card = service.pay(declined, decline="REJECT_CARD_COMPANY")
    refused(service.open_success_url(declined, card), 402, "payment_declined")
    return sale_id, orders


@pytest.mark.e2e
def test_a_flushed_server_is_refused_reported_and_rebuilt(served: Served) -> None:
    sale_id, orders = half_sold(served)
    flushed(served, sale_id)
    before = served.dump(sale_id)
    lose(served, sale_id)
    refused(served.prepare(sale_id, served.buyer()), 503, "sale_recovering")
    name = f"sale-recovering:{sale_id}"
    eventually(lambda: missing(served), lambda names: name in names, within=NOTICED_SECONDS)
    gap = served.http.get("/health/ready").json()["recovering"][sale_id]
    assert "Redis has no such sale" in gap

    done = rebuild(served, sale_id)
    assert done.returncode == 0, done
    assert "restored 4 orders" in done.stdout

    eventually(lambda: missing(served), lambda names: name not in names)
    assert without_head(served.dump(sale_id)) == without_head(before)
    assert served.audit(sale_id)["ok"]
    assert served.hold(sale_id, served.buyer())["status"] == "HELD"
    held, buyer = orders["held"]
    assert served.hold(sale_id, buyer, key="key-held")["orderId"] == held["orderId"]
    assert served.open_success_url(held, served.pay(held)).json()["status"] == "CONFIRMED"
    assert served.ledger(held)["charged"] == held["amount"]
    assert served.ledger(orders["paid"][0])["charged"] == 1000
    assert served.ledger(orders["declined"][0])["charged"] == 0
    assert served.audit(sale_id)["ok"]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_truncated_file_is_detected_before_a_sale(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    with running_service(data_dir, RESERVATION_WORKERS="1") as service:
        sale_id, orders = half_sold(service)
        flushed(service, sale_id)
        before = service.dump(sale_id)
    (log,) = data_dir.rglob("*.incr.aof")
    # The worker's heartbeats follow the sale's last events: cut into those events.
    content = log.read_bytes()
    log.write_bytes(content[: content.rindex(b"declined:REJECT_CARD_COMPANY") - 40])

    with running_service(
        data_dir, but_for=("sale-recovering:",), RESERVATION_WORKERS="1"
    ) as service:
        refused(service.prepare(sale_id, service.buyer()), 503, "sale_recovering")
        assert missing(service) == [f"sale-recovering:{sale_id}"]
        gap = service.http.get("/health/ready").json()["recovering"][sale_id]
        assert "events are lost" in gap
        done = rebuild(service)
        assert done.returncode == 0, done
        eventually(lambda: missing(service), lambda names: names == [])
        assert without_head(service.dump(sale_id)) == without_head(before)
        assert service.audit(sale_id)["ok"]
        held, buyer = orders["held"]
        assert service.hold(sale_id, buyer, key="key-held")["orderId"] == held["orderId"]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_hold_missing_in_sql_is_reported_as_lost(tmp_path: Path) -> None:
    """And the one whose payment was attempted is restored from its intent, and sold."""
    data_dir = tmp_path / "data"
    with running_service(data_dir, RESERVATION_WORKERS="1") as service:
        sale_id = service.sale()
        kept = service.hold(sale_id, service.buyer())
        flushed(service, sale_id)
        worker = int(worker_pid(service))
        os.kill(worker, signal.SIGSTOP)
        try:
            lost = service.hold(sale_id, service.buyer())
            paid = service.hold(sale_id, service.buyer())
            assert service.open_success_url(kept, service.pay(kept)).json()["status"] == "CONFIRMED"
            assert service.open_success_url(paid, service.pay(paid)).json()["status"] == "CONFIRMED"
            with service.redis() as client:
                client.flushall()
            refused(service.prepare(sale_id, service.buyer()), 503, "sale_recovering")
            sandbox = kept["payment"]["checkoutUrl"].removesuffix("/checkout")
            done = rebuild(service, sale_id, RESERVATION_TOSS_API_URL=sandbox)
        finally:
            os.kill(worker, signal.SIGCONT)
        assert done.returncode == 0, done
        for order in (kept, paid):
            assert f"{order['orderId']} payment in progress" in done.stdout
        refused(service.open_success_url(lost, service.pay(lost)), 409, "hold_lost")
        for order in (kept, paid):
            eventually(
                lambda order=order: service.get_reservation(order)["status"],
                lambda status: status == "CONFIRMED",
            )
            books = service.ledger(order)
            assert (books["charged"], books["cancelled"]) == (1000, 0)
        assert service.audit(sale_id)["ok"]
        again = rebuild(service, sale_id)
        assert again.returncode == 0, again
        assert "nothing to do" in again.stdout


def worker_pid(service: Served) -> str:
    with service.redis() as client:
        names = [
            name
            for name in client.scan_iter("rsv:proc:*", count=1000)
            if client.hget(name, "role") == "worker"
        ]
    return names[0].rpartition("-")[2]


def lose(service: Served, sale_id: str) -> None:
    """Every key of the sale is gone, as after FLUSHALL."""
    with service.redis() as client:
        client.delete(*client.scan_iter(f"rsv:{{{sale_id}}}:*", count=1000))


def without_head(dump: dict[str, Any]) -> dict[str, Any]:
    """The state that a rebuild restores."""
    forgotten = {":sale": {"epoch", "seq", "chain", "created_at"}, ":order:": {"claim_id"}}
    kept: dict[str, Any] = {}
    for key, value in dump.items():
        if ":rate:" in key or key.endswith(":outbox"):
            continue
        names = {name for part, some in forgotten.items() if part in key for name in some}
        kept[key] = (
            {name: text for name, text in value.items() if name not in names} if names else value
        )
    return kept
