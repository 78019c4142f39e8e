"""Readiness on a real server: a failed condition is reported, and closes no more than it must."""

import asyncio
import re
from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path

import msgspec
import pytest
import redis
import structlog.testing

from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.errors import StoreUnavailable
from reservation.adapters.sql.sales import SaleHead
from reservation.application.readiness import sale_conditions, sync_time
from reservation.application.readiness.check import Preflight
from reservation.application.readiness.clock_skew import DRIFT_MS_MAX, Clocks
from reservation.application.readiness.conditions import Disk
from reservation.application.readiness.sync_time import SyncTimes
from reservation.domain.clock import SystemClock
from reservation.domain.errors import Unavailable
from reservation.domain.states import SaleStatus
from reservation.workers.runner import Worker
from tests.faults.processes.bad_machine import Machine, ServerOn, build
from tests.support.in_process import Bench, bench
from tests.support.programs import needs
from tests.support.service import Served, eventually, refused
from tests.support.valkey import MakeServer, binary_of

ROOT = Path(__file__).resolve().parents[3]
#: The rights that the shipped file grants; the service cannot work with less.
(RIGHTS,) = re.findall(
    r"^user reservation on \S+ (.*)$", (ROOT / "deploy/valkey-users.acl").read_text(), re.MULTILINE
)


class StoppedClock:
    """A clock that advances only by hand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def now_ms(self) -> int:
        return int(self.seconds * 1000)


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


@pytest.fixture
async def server(make_server: MakeServer) -> EmbeddedServer:
    started = make_server()
    await started.start()
    return started


def as_user(server: EmbeddedServer, *changes: str) -> str:
    """The server's address for a user with the shipped rights and these changes to them."""
    with redis.Redis(unix_socket_path=str(server.socket_path)) as admin:
        admin.execute_command("ACL", "SETUSER", "limited", "on", ">pass", *RIGHTS.split(), *changes)
    return f"unix://limited:pass@{server.socket_path}"


@pytest.mark.parametrize("name", ["valkey", "redis-server"])
async def test_the_embedded_server_passes_its_own_preflight(
    name: str, tmp_path: Path, make_server: MakeServer
) -> None:
    server = make_server(binary=binary_of(name))
    await server.start()
    async with bench(tmp_path / "sql", server.url) as here:
        found = await here.service.readiness.check()
        assert (found.missing, found.stops, found.trusted) == ((), (), ())


@pytest.fixture
def everysec(served: Served) -> Iterator[None]:
    """The service's own server, synced once a second only."""
    with served.redis() as client:
        client.config_set("appendfsync", "everysec")
        try:
            yield
        finally:
            client.config_set("appendfsync", "always")
    eventually(lambda: missing(served), lambda names: names == [])


def missing(service: Served) -> list[str]:
    return service.http.get("/health/ready").json()["missing"]


@pytest.mark.slow
def test_a_weaker_fsync_policy_closes_only_prepare(
    served: Served, request: pytest.FixtureRequest
) -> None:
    sale_id, buyer = served.sale(), served.buyer()
    paid, given_back = served.hold(sale_id, buyer), served.hold(sale_id, buyer)
    request.getfixturevalue("everysec")

    eventually(lambda: missing(served), lambda names: names == ["redis-fsync-policy"], within=6)
    eventually(
        lambda: served.prepare(sale_id, buyer),
        lambda answer: answer.json().get("missing") == ["redis-fsync-policy"],
        within=6,
    )
    refusal = refused(served.prepare(sale_id, buyer), 503, "unavailable")
    assert "redis-fsync-policy" in refusal["detail"]
    assert served.open_success_url(paid, served.pay(paid)).json()["status"] == "CONFIRMED"
    assert served.release(given_back).json()["status"] == "RELEASED"
    assert served.audit(sale_id)["lag"] == 0

    with served.redis() as client:
        client.config_set("appendfsync", "always")
    eventually(lambda: missing(served), lambda names: names == [])
    eventually(
        lambda: served.prepare(sale_id, buyer).status_code, lambda status: status == 201, within=6
    )


async def test_a_missing_permission_closes_prepare_before_it_is_needed(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    async with bench(tmp_path / "sql", as_user(server, "-xtrim")) as here:
        sale_id = await here.sale()
        await here.service.redis_monitor.check_redis()
        with pytest.raises(Unavailable, match="redis-rights"):
            await here.hold(sale_id)
        as_user(server, "+xtrim")
        await here.service.redis_monitor.check_redis()
        await here.hold(sale_id)


async def test_acknowledgement_needs_the_permission_to_wait(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    url = as_user(server, "-wait")
    async with bench(tmp_path / "without", url) as here:
        assert (await here.service.readiness.check()).missing == ()
    async with bench(tmp_path / "with", url, RESERVATION_REDIS_ACK_REPLICAS="1") as here:
        missing = (await here.service.readiness.check()).missing
        # The server has no replica either.
        assert missing == ("redis-ack-replicas", "redis-rights")


async def test_a_user_of_another_key_prefix_lacks_our_keys(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    url = as_user(server, "resetkeys", "~other:*")
    async with bench(tmp_path / "sql", url) as here:
        assert (await here.service.readiness.check()).missing == ("redis-rights",)


async def test_hidden_facts_of_a_managed_server_close_prepare_until_waived(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    url = as_user(server, "-config|get", "-acl|dryrun")
    hidden = ("redis-fsync-policy", "redis-fsync-on-rewrite")
    async with bench(tmp_path / "sql", url) as here:
        found = await here.service.readiness.check()
        assert found.missing == tuple(f"{name}:unknown" for name in hidden)
        assert found.stops == ()
    async with bench(tmp_path / "sql", url, RESERVATION_REDIS_TRUST=", ".join(hidden)) as here:
        found = await here.service.readiness.check()
        assert (found.missing, found.trusted) == ((), hidden)


async def test_a_server_without_info_permission_is_compared_with_sql(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    async with bench(tmp_path / "sql", as_user(server, "-info")) as here:
        here.service.connections.guard()
        await here.service.redis_monitor.check_redis()
        assert here.service.connections.vouched
        missing = here.service.redis_monitor.missing
        assert "redis-run-id:unknown" in missing
        assert "redis-append-only-file:unknown" in missing


async def test_a_full_disk_closes_prepare(here: Bench) -> None:
    service = here.service
    asked: list[Path] = []

    def full(folder: Path) -> Disk:
        asked.append(folder)
        return Disk(total=10**9, free=10**6)

    look = Preflight(
        service.connections, service.keys, service.settings, clock=service.clock, disk=full
    )
    assert (await look.check()).missing == ("redis-disk", "sql-disk")
    config = await service.connections.command("CONFIG", "GET", "dir")
    assert asked == [Path(config[1]), service.settings.data_dir]


async def test_a_slow_disk_is_reported_by_the_second_check(tmp_path: Path) -> None:
    needs("cc")
    server = ServerOn(tmp_path / "redis")
    server.machine = Machine(build(tmp_path), tmp_path / "syncs")
    server.machine.be(sync_delay=0.02)
    await server.start()
    try:
        async with bench(tmp_path / "sql", server.url) as here:
            service = here.service
            look = Preflight(
                service.connections, service.keys, service.settings, clock=service.clock
            )
            assert (await look.check()).warnings == ()
            with structlog.testing.capture_logs() as lines:
                assert (await look.check()).warnings == ("redis-sync-slow",)
            [line] = [line for line in lines if line["event"] == "redis_sync_measured"]
            assert line["sync_ms"] >= 20
            assert line["holds_per_second_max"] <= 128 / 0.0232
            server.machine.be()
            assert (await look.check()).warnings == ("redis-sync-slow",), "it is measured once"
    finally:
        await server.stop()


async def test_the_sync_is_measured_once_in_each_life_of_a_server(here: Bench) -> None:
    connections = here.service.connections
    times = SyncTimes(connections, here.service.keys.sync, clock=here.service.clock)
    assert await times.of(connections, "first") is None
    measured = await times.of(connections, "first")
    assert measured is not None
    assert measured > 0
    assert await times.of(connections, "first") == measured
    assert await times.of(connections, "second") is None


async def test_a_server_that_refuses_writes_has_no_sync_time(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    async with bench(tmp_path / "sql", server.url) as here:
        connections = here.service.connections
        times = SyncTimes(connections, here.service.keys.sync, clock=here.service.clock)
        with redis.Redis(unix_socket_path=str(server.socket_path)) as admin:
            admin.config_set("min-replicas-to-write", 1)
            assert await times.of(connections, "life") is None
            assert await times.of(connections, "life") is None
            admin.config_set("min-replicas-to-write", 0)
        assert await times.of(connections, "life") is not None


async def test_a_process_that_is_paused_before_the_first_write_measures_again(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = here.service.connections
    times = SyncTimes(connections, here.service.keys.sync, clock=here.service.clock)
    await times.of(connections, "life")
    with monkeypatch.context() as patch:
        patch.setattr(sync_time, "SECONDS_MAX", -1.0)
        assert await times.of(connections, "life") is None
    assert await times.of(connections, "life") is not None


async def test_flushed_scripts_are_loaded_by_the_next_check(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    async with bench(tmp_path / "sql", server.url) as here:
        await here.service.connections.command("SCRIPT", "FLUSH")
        assert (await here.service.readiness.check()).missing == ()
        info = await here.service.connections.command("INFO", "memory")
        assert "number_of_cached_scripts:0" not in info


async def test_concurrent_probes_share_one_check(here: Bench) -> None:
    service, clock = here.service, StoppedClock()
    look = Preflight(service.connections, service.keys, service.settings, clock=clock)
    first = await look.recent()
    assert all(found is first for found in await asyncio.gather(*(look.recent() for _ in "abc")))
    clock.seconds += 1
    assert await look.recent() is not first


async def test_a_loading_server_is_waited_for(server: EmbeddedServer, tmp_path: Path) -> None:
    async with bench(tmp_path / "sql", server.url) as here:
        with redis.Redis(unix_socket_path=str(server.socket_path)) as admin:
            pipe = admin.pipeline(transaction=False)
            for number in range(5_000):
                pipe.set(f"rsv:{{x}}:{number}", "1")
            pipe.execute()
            # A millisecond a key; the server answers in between.
            admin.config_set("key-load-delay", 1_000)
            admin.config_set("loading-process-events-interval-bytes", 1_024)
        reloading = asyncio.create_task(here.service.connections.command("DEBUG", "RELOAD"))
        try:
            async with asyncio.timeout(30):
                missing: tuple[str, ...] = ()
                while not missing:
                    missing = (await here.service.readiness.check()).missing
            assert missing == ("redis-loading",)
        finally:
            reloading.cancel()


async def test_a_truncated_outbox_closes_only_its_sale(here: Bench) -> None:
    sale_id, other_id = await here.sale(), await here.sale()
    for _ in range(3):
        await here.hold(sale_id)
    watch, outbox = here.service.redis_monitor, here.service.keys.of(sale_id).outbox
    await watch.check_redis()
    assert watch.missing_of == {}
    await here.service.connections.command("XTRIM", outbox, "MAXLEN", 1)
    await watch.check_redis()
    assert watch.missing_of == {sale_id: ("sale-outbox",)}
    with pytest.raises(Unavailable, match="sale-outbox"):
        await here.hold(sale_id)
    await here.hold(other_id)


async def test_a_consumer_group_moved_past_events_closes_its_sale(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    await here.hold(sale_id)
    watch, outbox = here.service.redis_monitor, here.service.keys.of(sale_id).outbox
    await watch.check_redis()
    assert watch.missing_of == {}
    await here.service.connections.command("XGROUP", "SETID", outbox, "sql", "$")
    await watch.check_redis()
    assert watch.missing_of == {sale_id: ("sale-outbox",)}
    await here.service.connections.command("XGROUP", "SETID", outbox, "sql", "1-0")
    await watch.check_redis()
    assert watch.missing_of == {}


async def test_an_outbox_without_its_consumer_group_still_reaches_sql(here: Bench) -> None:
    """A promoted replica may lack a group whose creation was not replicated."""
    sale_id = await here.sale()
    await here.flush(sale_id)
    watch, outbox = here.service.redis_monitor, here.service.keys.of(sale_id).outbox
    await here.service.connections.command("XGROUP", "DESTROY", outbox, "sql")
    await watch.check_redis()
    assert watch.missing_of == {}
    order = await here.hold(sale_id)
    with pytest.raises(StoreUnavailable, match="its group is missing"):
        await here.flush(sale_id)
    await here.flush(sale_id)
    assert await here.service.sql.orders.get(order.order_id) is not None


async def test_the_outboxes_of_quiet_sales_are_checked_in_turn(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was truncated closes its sale within a turn, one with a new event at once."""
    monkeypatch.setattr(sale_conditions, "QUIET_AT_ONCE", 2)
    sale_ids = [await here.sale() for _ in range(6)]
    for sale_id in sale_ids:
        await here.flush(sale_id)
    # Sales that other tests have left on the server take turns as well.
    others = set(await here.service.sale_store.ids()) - set(sale_ids)
    check = here.service.redis_monitor._preflight_sales
    assert await check(others) == {}
    command, keys = here.service.connections.command, here.service.keys
    for sale_id in sale_ids:
        await command("DEL", keys.of(sale_id).outbox)
    busy = sale_ids[-1]
    epoch = await command("HGET", keys.of(busy).sale, "epoch")
    here.service.connections.marks.learn(busy, epoch, 100, "")
    found = [await check(others) for _ in range(3)]
    assert all(busy in missing for missing in found)
    assert len(found[0]) == 3
    assert set(found[-1]) == set(sale_ids)


async def test_a_first_flush_during_a_check_closes_no_sale(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    heads, watch = here.service.sql.sales.heads, here.service.redis_monitor

    async def after_a_flush(sale_ids: Collection[str]) -> dict[str, SaleHead]:
        # Between the read of Redis, without a consumer group yet, and the read of SQL.
        await here.flush(sale_id)
        return await heads(sale_ids)

    monkeypatch.setattr(here.service.sql.sales, "heads", after_a_flush)
    assert await watch._preflight_sales(()) == {}
    assert (await heads())[sale_id].seq == 1


@pytest.mark.parametrize("value", ["101", "-1", "many"])
async def test_manually_edited_counters_close_only_their_sale(here: Bench, value: str) -> None:
    sale_id, other_id = await here.sale(), await here.sale()
    watch, stock = here.service.redis_monitor, here.service.keys.of(sale_id).stock("a")
    await here.service.connections.command("HSET", stock, "held", value)
    await watch.check_redis()
    assert watch.missing_of == {sale_id: ("sale-counters",)}
    with pytest.raises(Unavailable, match="sale-counters"):
        await here.hold(sale_id)
    await here.hold(other_id)
    await here.service.connections.command("HSET", stock, "held", 0)
    await watch.check_redis()
    assert watch.missing_of == {}
    await here.hold(sale_id)


async def test_an_ended_sale_does_not_affect_readiness(here: Bench) -> None:
    closed_id, ended_id, open_id = await here.sale(), await here.sale(), await here.sale()
    command = here.service.connections.command
    await here.service.sales.switch(closed_id, SaleStatus.CLOSED, operator="op", reason="over")
    await command("HSET", here.service.keys.of(ended_id).sale, "closes_at", 1)
    for sale_id in (closed_id, ended_id, open_id):
        await command("HSET", here.service.keys.of(sale_id).stock("a"), "held", 7)
    await here.service.redis_monitor.check_redis()
    assert here.service.redis_monitor.missing_of == {open_id: ("sale-counters",)}


class PausingClock(SystemClock):
    """The machine's clocks in a process that is paused for a second after each reading."""

    def __init__(self) -> None:
        self.paused_seconds = 0.0

    def now_ms(self) -> int:
        at_ms = super().now_ms() + round(self.paused_seconds * 1000)
        self.paused_seconds += 1.0
        return at_ms

    def monotonic(self) -> float:
        at = super().monotonic() + self.paused_seconds
        self.paused_seconds += 1.0
        return at


async def test_a_paused_process_is_no_jump_of_a_clock(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = here.service.readiness._connections
    monkeypatch.setattr(connections, "_clock", SystemClock())
    await here.service.readiness.measure_clocks()
    monkeypatch.setattr(connections, "_clock", PausingClock())
    await here.service.readiness.measure_clocks()
    assert not here.service.readiness.clocks.jumped
    assert abs(here.service.readiness.clocks.offset_ms) < DRIFT_MS_MAX


async def test_a_clock_jump_stops_expiry(here: Bench) -> None:
    sale_id = await here.sale(hold_seconds=1)
    await here.hold(sale_id)
    service, worker = here.service, Worker(here.service)
    await service.readiness.measure_clocks()
    reading = await service.connections.read_clock()
    service.readiness.clocks.observe(
        msgspec.structs.replace(reading, server_ms=reading.server_ms + 60_000)
    )
    await asyncio.sleep(1.2)
    assert await worker._reap(sale_id) == 0
    service.readiness.clocks = Clocks()
    assert await worker._reap(sale_id) == 1
