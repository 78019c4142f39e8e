"""Redis Cluster: the whole service on sales in the slots of all masters, and wrong addresses."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from reservation.adapters.redis import cluster_slots
from reservation.adapters.redis.cluster import ClusterClient, ClusterNode, open_client
from reservation.adapters.redis.cluster_slots import slot_of
from reservation.adapters.redis.errors import AddressUnfit, StoreUnavailable
from reservation.domain.clock import SystemClock
from reservation.domain.sale import Sale
from tests.faults.payments.shop import shop
from tests.support.in_process import bench
from tests.support.programs import find
from tests.support.topologies import (
    Cluster,
    Node,
    cluster,
    free_ports,
    migrate_atomically,
    until,
    users_of_the_file,
)
from tests.support.whole_sale import hold_when_open, rebuild_and_check, sell_and_check

pytestmark = pytest.mark.system

#: A start with migrations, on a busy machine.
START_SECONDS = 60.0
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.mark.parametrize(
    "key", ["123456789", "rsv:{demo}:sale", "{demo}", "demo", "a{}b", "a{b", "a{b}{c}", "한{국}"]
)
def test_a_key_has_the_slot_that_the_server_computes(topology: Cluster, key: str) -> None:
    assert topology.nodes[0].execute("CLUSTER", "KEYSLOT", key) == slot_of(key)


async def test_whole_sales_in_the_slots_of_all_masters(
    tmp_path: Path, topology: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Sequence[Any]] = []
    exchange = ClusterNode._exchange_with_server

    async def recorded(self: ClusterNode, commands: Sequence[Sequence[Any]]) -> list[Any]:
        sent.extend(command for command in commands if command[0] != "WAIT")
        return await exchange(self, commands)

    monkeypatch.setattr(ClusterNode, "_exchange_with_server", recorded)
    async with shop(tmp_path, topology.url) as (here, sandbox):
        service = here.service
        service.connections.guard()
        await service.redis_monitor.check_redis()
        assert service.connections.vouched
        await here.until_ready()
        masters: set[str] = set()
        while len(masters) < 3:
            sale_id = await sell_and_check(here, sandbox)
            node = service.connections.node_of(sale_id)
            assert node is not None
            if node.identity not in masters:
                await rebuild_and_check(here, sale_id)
            masters.add(node.identity)
        sale_ids = await service.sale_store.ids()
        found = await service.sale_store.read_many(sale_ids)
        assert all(isinstance(found[sale_id], Sale) for sale_id in sale_ids)
    assert len(sent) > 500
    wrong = [command for command in sent if len({*map(slot_of, keys_of(command))}) > 1]
    assert wrong == [], "a command touches two slots"


def keys_of(command: Sequence[Any]) -> list[str]:
    """Every key of a command, as the server finds them."""
    if command[0] == "EVALSHA":
        return [str(key) for key in command[3 : 3 + int(command[2])]]
    key = cluster_slots.key_of(command)
    return [] if key is None else [key]


async def test_a_pipeline_over_masters_keeps_the_order_of_its_replies(topology: Cluster) -> None:
    connections = open_client(topology.url, clock=SystemClock())
    try:
        keys = [f"x:{{{number}}}" for number in range(50)]
        await connections.pipeline([("SET", key, key) for key in keys])
        found = await connections.pipeline([("GET", key) for key in reversed(keys)])
        assert found == list(reversed(keys))
        owners = {node.identity for key in keys if (node := connections.node_of(key))}
        assert len(owners) == 3
    finally:
        await connections.aclose()


async def test_a_redirection_corrects_an_outdated_map(topology: Cluster) -> None:
    connections = open_client(topology.url, clock=SystemClock())
    assert isinstance(connections, ClusterClient)
    try:
        await connections.command("SET", "{moved}", "1")
        right = connections._map.owners[slot_of("moved")]
        wrong = next(one for one in connections._map.nodes.values() if one is not right)
        connections._map.owners[slot_of("moved")] = wrong
        assert await connections.command("GET", "{moved}") == "1"
        assert connections._map.owners[slot_of("moved")] is right
    finally:
        await connections.aclose()


async def test_a_command_without_a_key_needs_one_with_a_key(topology: Cluster) -> None:
    connections = open_client(topology.url, clock=SystemClock())
    try:
        with pytest.raises(ValueError, match="names no server"):
            await connections.command("TIME")
        time, _ = await connections.pipeline([("TIME",), ("GET", "{a}")])
        assert len(time) == 2
    finally:
        await connections.aclose()


async def test_the_user_and_password_of_a_cluster_are_checked(topology: Cluster) -> None:
    url = topology.url.replace("redis+cluster://", "redis+cluster://nobody:wrong@")
    connections = open_client(url, clock=SystemClock())
    try:
        with pytest.raises(AddressUnfit, match="username-password"):
            await connections.verify()
    finally:
        await connections.aclose()


async def test_a_cluster_that_cannot_be_resolved_is_unavailable() -> None:
    connections = open_client("redis+cluster://nobody.invalid:7000", clock=SystemClock())
    try:
        with pytest.raises(StoreUnavailable, match=r"nobody\.invalid"):
            await connections.command("GET", "x")
    finally:
        await connections.aclose()


async def test_concurrent_calls_read_the_slots_once(topology: Cluster) -> None:
    connections = open_client(topology.url, clock=SystemClock())
    try:
        await asyncio.gather(*(connections.command("GET", f"{{{one}}}") for one in range(40)))
        assert len(connections.nodes) == 3
    finally:
        await connections.aclose()


async def test_masters_of_different_versions_are_reported(tmp_path: Path) -> None:
    other = find("redis-server")
    with cluster(tmp_path / "redis", last_binary=other) as mixed:
        async with bench(tmp_path / "sql", mixed.url) as here:
            await here.until_ready()
            found = await here.service.readiness.check()
            assert "redis-cluster-versions" in found.warnings


async def test_masters_of_one_version_are_not_reported(tmp_path: Path, topology: Cluster) -> None:
    async with bench(tmp_path, topology.url) as here:
        assert "redis-cluster-versions" not in (await here.service.readiness.check()).warnings


@pytest.mark.slow
async def test_the_shipped_users_suffice_in_a_cluster(tmp_path: Path) -> None:
    users = users_of_the_file(tmp_path)
    # Replication between masters needs more permissions than a replica's, as the page says.
    page = (ROOT / "docs/how-to/cluster.md").read_text()
    (line,) = re.findall(r"^user replica on .*$", page, re.MULTILINE)
    text = re.sub(r"^user replica .*$", line, users.read_text(), flags=re.MULTILINE)
    users.write_text(text)
    lines = (f"aclfile {users}", "masteruser replica", "masterauth REPLICA_PASSWORD")
    with cluster(tmp_path / "redis", lines=lines, user="admin", password="admin-pw") as made:
        url = made.url.replace(":admin-pw@", "reservation:change-this-service-password@")
        async with bench(tmp_path / "sql", url) as here:
            await here.until_ready()
            await here.service.redis_monitor.check_redis()
            sale_id = await here.sale()
            order = await here.hold(sale_id)
            assert (await here.claim(order)).is_acknowledged
            slot = slot_of(sale_id)
            source = made.owner(slot)
            target = next(node for node in made.masters() if node is not source)
            migrate_atomically(source, target, slot)
            until(lambda: made.owner(slot) is target, "the slot did not move")
            await hold_when_open(here, sale_id)
            for master in made.masters():
                master.execute("ACL", "SETUSER", "reservation", "-cluster|info")
            found = await here.service.readiness.check()
            assert {row.partition("@")[0] for row in found.missing} == {"redis-rights"}


def test_a_plain_server_given_as_a_cluster_ends_the_start_with_78(tmp_path: Path) -> None:
    server_port, port = free_ports(2)
    address = f"127.0.0.1:{server_port}"
    node = Node(tmp_path / "redis", server_port)
    node.start()
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "api.cli", "serve"],
            env={
                "RESERVATION_DATA_DIR": str(tmp_path / "data"),
                "RESERVATION_REDIS_URL": f"redis+cluster://{address}",
                "RESERVATION_PORT": str(port),
            },
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
    finally:
        node.close()
    last = ended.stderr.strip().splitlines()[-1]
    assert (ended.returncode, last) == (
        78,
        f"reservation: RESERVATION_REDIS_URL: {address} is a server without a cluster",
    )
