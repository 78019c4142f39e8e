"""Redis loses all data during a sale, and the service rebuilds it without an operator."""

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest

from tests.support.service import Served, eventually, item, refused, running_service
from tests.support.topologies import Node, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

UNITS = 40
HELD_BEFORE = 5
HELD_AFTER = 7
#: Latency of the PG's confirm: the server dies meanwhile.
PG_SECONDS = 3.0
PATIENCE_SECONDS = 60.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "redis", free_ports(1)[0])
    node.start()
    yield node
    node.close()


@pytest.fixture
def served(tmp_path: Path, server: Node) -> Iterator[Served]:
    with running_service(
        tmp_path / "data",
        RESERVATION_REDIS_URL=f"redis://127.0.0.1:{server.port}",
        RESERVATION_REBUILD="auto",
        RESERVATION_WORKERS="1",
    ) as started:
        yield started


def lose_all(server: Node) -> None:
    """The server crashes, and its disk is gone."""
    server.kill()
    shutil.rmtree(server.folder / "appendonlydir")
    server.start()
    assert server.execute("DBSIZE") == 0


def metric(served: Served, name: str) -> float:
    lines = served.http.get("/metrics", headers=served.admin).text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def paused_worker(served: Served) -> Iterator[None]:
    """The worker's process does not run within."""
    children = psutil.Process(served.process.pid).children()
    [worker] = [child for child in children if "worker" in child.cmdline()]
    worker.suspend()
    try:
        yield
    finally:
        worker.resume()


def come_back(served: Served, paying: dict[str, Any]) -> tuple[list[httpx.Response], Thread]:
    """The buyer returns from the PG, which takes its time; the money is taken by now."""
    key = served.pay(paying)
    served.order_fault(paying, "slow_drip", seconds=PG_SECONDS)
    answers: list[httpx.Response] = []
    back = Thread(
        target=lambda: answers.append(
            httpx.get(
                served.success_url(paying, key),
                headers={"Accept": "application/json"},
                timeout=60,
                trust_env=False,
            )
        )
    )
    back.start()
    # The claim and its intent come before the money.
    eventually(
        lambda: served.ledger(paying)["charged"], lambda charged: charged > 0, within=PG_SECONDS * 9
    )
    return answers, back


def test_a_sale_without_its_redis_is_rebuilt_with_its_payments(
    server: Node, served: Served
) -> None:
    sale_id = served.sale(items=[item("a", total=UNITS)])
    kept = [served.hold(sale_id, served.buyer()) for _ in range(HELD_BEFORE)]
    paying = served.hold(sale_id, served.buyer())
    eventually(lambda: served.audit(sale_id), lambda report: report["lag"] == 0)
    answers, back = come_back(served, paying)
    with closing(sqlite3.connect(served.settings.data_dir / "orders.sqlite3", timeout=30)) as sql:
        # No mark reaches SQL; nor does an event, which the worker could have read before the loss.
        sql.execute("BEGIN IMMEDIATE")
        with paused_worker(served):
            lost = [served.hold(sale_id, served.buyer()) for _ in range(HELD_AFTER)]
            lose_all(server)
        sql.rollback()
    report = eventually(
        lambda: served.audit(sale_id),
        lambda report: report.get("ok") is True,
        within=PATIENCE_SECONDS,
    )
    assert report["problems"] == []
    back.join(PATIENCE_SECONDS)
    # Its payment is undecided while the sale is closed, and never "nothing was charged".
    assert answers[0].status_code in (200, 202), answers[0].text
    eventually(
        lambda: served.get_reservation(paying)["status"],
        lambda status: status == "CONFIRMED",
        within=PATIENCE_SECONDS,
    )
    ledger = served.ledger(paying)
    assert ledger["charged"] - ledger["cancelled"] == paying["amount"]
    for order in kept:
        assert served.get_reservation(order)["status"] == "HELD"
    for order in lost:
        refused(read(served, order), 409, "hold_lost")
    assert metric(served, "reservation_lost_events_total") >= HELD_AFTER
    assert metric(served, "reservation_rebuilds_total") == 1
    # Each unit is sold once: the lost ones are for sale again.
    eventually(
        lambda: served.http.get(f"/v1/sales/{sale_id}").status_code,
        lambda status: status == 200,
        within=PATIENCE_SECONDS,
    )
    available, held, sold = served.stock(sale_id)
    assert (available, held, sold) == (UNITS - HELD_BEFORE - 1, HELD_BEFORE, 1)
    for _ in range(available):
        served.hold(sale_id, served.buyer())
    refused(served.prepare(sale_id, served.buyer()), 409, "sold_out")
    eventually(lambda: served.audit(sale_id)["ok"], bool, within=PATIENCE_SECONDS)


def read(served: Served, order: dict[str, Any]) -> httpx.Response:
    return served.http.get(
        f"/v1/reservations/{order['orderId']}", headers={"X-Reservation-Token": order["token"]}
    )


def test_every_sale_of_a_lost_server_is_rebuilt(server: Node, served: Served) -> None:
    sale_ids = [served.sale(items=[item("a", total=UNITS)]) for _ in range(12)]
    for sale_id in sale_ids:
        served.hold(sale_id, served.buyer())
    eventually(
        lambda: [served.audit(sale_id)["lag"] for sale_id in sale_ids],
        lambda lags: not any(lags),
        within=PATIENCE_SECONDS,
    )
    for _ in range(2):
        lose_all(server)
        for sale_id in sale_ids:
            eventually(
                lambda sale_id=sale_id: served.prepare(sale_id, served.buyer()).status_code,
                lambda status: status == 201,
                within=PATIENCE_SECONDS,
            )
    for sale_id in sale_ids:
        report = eventually(
            lambda sale_id=sale_id: served.audit(sale_id),
            lambda report: report.get("ok") is True,
            within=PATIENCE_SECONDS,
        )
        assert report["problems"] == []
