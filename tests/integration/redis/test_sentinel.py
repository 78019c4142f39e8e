"""Sentinel: the whole service on a master that the sentinels name, and wrong addresses."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import AddressUnfit, StoreUnavailable
from reservation.domain.clock import SystemClock
from tests.faults.payments.shop import shop
from tests.support.in_process import bench
from tests.support.topologies import (
    SERVICE,
    Sentinels,
    free_ports,
    sentinels,
    users_of_the_file,
)
from tests.support.whole_sale import hold_when_open, rebuild_and_check, sell_and_check

pytestmark = pytest.mark.system

#: A start with migrations, on a busy machine.
START_SECONDS = 60.0


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    with sentinels(
        tmp_path_factory.mktemp("sentinels"),
        lines=("requirepass app-pw", "masterauth app-pw"),
        sentinel_lines=(f"sentinel auth-pass {SERVICE} app-pw", "requirepass watch-pw"),
        password="app-pw",
        sentinel_password="watch-pw",
    ) as started:
        yield started


async def test_a_whole_sale_on_the_master_of_the_sentinels(
    tmp_path: Path, topology: Sentinels
) -> None:
    async with shop(tmp_path, topology.url) as (here, sandbox):
        here.service.connections.guard()
        await here.service.redis_monitor.check_redis()
        assert here.service.connections.vouched
        await here.until_ready()
        sale_id = await sell_and_check(here, sandbox)
        await rebuild_and_check(here, sale_id)
        info = await here.service.connections.command("INFO", "replication")
        assert "role:master" in info
        assert here.service.connections.client_retries == 0


@pytest.mark.slow
async def test_the_shipped_users_suffice_for_a_failover(tmp_path: Path) -> None:
    with sentinels(
        tmp_path / "redis",
        lines=(
            f"aclfile {users_of_the_file(tmp_path)}",
            "masteruser replica",
            "masterauth change-this-replica-password",
        ),
        sentinel_lines=(
            f"sentinel auth-user {SERVICE} sentinel",
            f"sentinel auth-pass {SERVICE} change-this-sentinel-password",
        ),
        user="admin",
        password="admin-pw",
    ) as made:
        url = made.url.replace(":admin-pw@", "reservation:change-this-service-password@")
        async with bench(tmp_path / "sql", url) as here:
            await here.service.redis_monitor.check_redis()
            await here.until_ready()
            sale_id = await here.sale()
            await here.hold(sale_id)
            first = made.master
            first.kill()
            second = await asyncio.to_thread(made.until_other_master, first)
            await hold_when_open(here, sale_id)
            assert second.info("replication")["connected_slaves"] == 1


async def test_a_sentinel_that_is_down_is_skipped(topology: Sentinels) -> None:
    (unused,) = free_ports(1)
    connections = RedisClient(
        topology.url.replace("@", f"@127.0.0.1:{unused},"), clock=SystemClock()
    )
    try:
        assert await connections.command("PING") == "PONG"
    finally:
        await connections.aclose()


async def test_connections_opened_at_once_ask_the_sentinels_once(topology: Sentinels) -> None:
    def asked() -> int:
        stats = topology.sentinels[0].info("commandstats")
        return int(stats.get("cmdstat_sentinel|get-master-addr-by-name", {"calls": 0})["calls"])

    before = asked()
    connections = RedisClient(topology.url, clock=SystemClock())
    try:
        slow = [connections.command("BLPOP", "nothing-comes", "0.3") for _ in range(12)]
        ends = await asyncio.gather(*slow, return_exceptions=True)
    finally:
        await connections.aclose()
    # On a busy machine a connection may take longer than its caller waits.
    assert all(end is None or isinstance(end, StoreUnavailable) for end in ends)
    assert asked() - before <= 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({SERVICE: "nobody"}, "no sentinel monitors a master named nobody"),
        ({"watch-pw": "wrong"}, "no sentinel answers: .*WRONGPASS|invalid username-password"),
        ({":app-pw@": ":wrong@"}, "WRONGPASS|invalid username-password"),
    ],
    ids=["an unknown service", "the sentinels' password", "the server's password"],
)
async def test_a_wrong_address_is_named(
    topology: Sentinels, change: dict[str, str], reason: str
) -> None:
    url = topology.url
    for old, new in change.items():
        url = url.replace(old, new)
    connections = RedisClient(url, clock=SystemClock())
    try:
        with pytest.raises(AddressUnfit, match=reason):
            await connections.verify()
    finally:
        await connections.aclose()


async def test_hosts_that_cannot_be_resolved_are_unavailable() -> None:
    connections = RedisClient("redis+sentinel://nobody.invalid:26379/stock", clock=SystemClock())
    try:
        with pytest.raises(StoreUnavailable, match=r"no sentinel names a master: nobody.invalid"):
            await connections.command("PING")
    finally:
        await connections.aclose()


def test_a_service_that_no_sentinel_knows_ends_the_start_with_78(
    tmp_path: Path, topology: Sentinels
) -> None:
    (port,) = free_ports(1)
    ended = subprocess.run(
        [sys.executable, "-m", "api.cli", "serve"],
        env={
            "RESERVATION_DATA_DIR": str(tmp_path),
            "RESERVATION_REDIS_URL": topology.url.replace(SERVICE, "nobody"),
            "RESERVATION_PORT": str(port),
        },
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    last = ended.stderr.strip().splitlines()[-1]
    assert (ended.returncode, last) == (
        78,
        "reservation: RESERVATION_REDIS_URL: no sentinel monitors a master named nobody",
    )
