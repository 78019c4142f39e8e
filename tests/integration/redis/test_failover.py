"""Failover: connections leave a server that is demoted or gone."""

import asyncio
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis

from reservation.adapters.redis import client as connection
from reservation.adapters.redis import connection_pool as pool
from reservation.adapters.redis import script_calls
from reservation.adapters.redis.audit_reader import AuditReader
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.connection import RedisConnection
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.application.readiness import data_loss as losses
from reservation.application.readiness import redis_monitor as recovery
from reservation.application.sales.catalog import CachedSale
from reservation.domain.errors import ReservationError
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.workers.runner import Worker
from tests.support.in_process import CONFIRMED, Bench, bench
from tests.support.lua_sale import NOW
from tests.support.programs import missing
from tests.support.proxy import MovingAddress, moving_address
from tests.support.valkey import MakeServer

pytestmark = pytest.mark.system

#: Longer than a reply's time-out plus the check that vouches for a server, on a busy machine.
FOLLOWED_SECONDS = 10.0
#: A hundred handshakes on a busy machine.
OPENED_SECONDS = 60.0
#: Rounds of the monitor in which a busy machine answers once in time.
ROUNDS_MAX = 10


@asynccontextmanager
async def client_of(server: EmbeddedServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(server.url, protocol=2, decode_responses=True) as client:
        yield client


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def follow(replica: EmbeddedServer, master: EmbeddedServer) -> None:
    """Let one server replicate another, until it is in sync."""
    port = free_port()
    async with client_of(master) as client:
        await client.config_set("port", port)
        await client.config_set("repl-diskless-sync-delay", 0)
    async with client_of(replica) as client:
        await client.execute_command("REPLICAOF", "127.0.0.1", port)
        async with asyncio.timeout(30):
            while (await client.info("replication"))["master_link_status"] != "up":  # noqa: ASYNC110 - the server sends no event
                await asyncio.sleep(0.02)


async def promote(server: EmbeddedServer) -> None:
    async with client_of(server) as client:
        await client.execute_command("REPLICAOF", "NO", "ONE")


@pytest.fixture
async def servers(make_server: MakeServer) -> tuple[EmbeddedServer, EmbeddedServer]:
    """A master and its replica."""
    first, second = make_server("first"), make_server("second")
    await asyncio.gather(first.start(), second.start())
    await follow(second, first)
    return first, second


@asynccontextmanager
async def vouched(server: EmbeddedServer, folder: Path) -> AsyncIterator[Bench]:
    """A service that has checked its server once, through an address of its own."""
    async with moving_address(server.url) as address, bench(folder, address.url) as here:
        here.service.connections.guard()
        await here.service.redis_monitor.check_redis()
        yield here


@asynccontextmanager
async def watched(address: MovingAddress, folder: Path) -> AsyncIterator[Bench]:
    """A service that checks its server all the time, as an API process does."""
    async with bench(folder, address.url) as here:
        here.service.connections.guard()
        await here.service.redis_monitor.check_redis()
        watching = asyncio.create_task(here.service.redis_monitor.run())
        try:
            yield here
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching


async def leave_idle(connections: RedisClient, count: int) -> None:
    """Open this many connections and return them to the pool."""
    taken: list[RedisConnection] = []
    # On a busy machine a handshake may take longer than a call may wait for its connection.
    async with asyncio.timeout(OPENED_SECONDS):
        while len(taken) < count:
            with suppress(StoreUnavailable):
                taken.append(await connections._pool.take())
    for wire in taken:
        connections._pool.give_back(wire, clean=True)


async def fail_over(here: Bench, address: MovingAddress, replica: EmbeddedServer) -> None:
    """The master's host vanishes under many idle connections, and its replica is promoted."""
    await leave_idle(here.service.connections, 100)
    await promote(replica)
    address.lead_to(replica.url)
    address.vanish()


async def test_a_demoted_master_is_left_for_the_current_one(
    tmp_path: Path, servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    first, second = servers
    async with moving_address(first.url) as address, watched(address, tmp_path) as here:
        sale_id = await here.sale()
        await here.hold(sale_id)
        await leave_idle(here.service.connections, 20)
        await promote(second)
        await follow(first, second)
        address.lead_to(second.url)
        await here.eventually_hold(sale_id)
        async with client_of(second) as client:
            assert await client.xlen(here.service.keys.of(sale_id).outbox) == 3


async def test_a_vanished_host_is_left_after_one_time_out(
    tmp_path: Path, servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    first, second = servers
    async with moving_address(first.url) as address, watched(address, tmp_path) as here:
        sale_id = await here.sale()
        await fail_over(here, address, second)
        await here.eventually_hold(sale_id)
    async with client_of(first) as client:
        assert (await client.info("replication"))["role"] == "master"


async def test_an_idle_service_leaves_a_vanished_host(
    tmp_path: Path, servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    """Only the monitor calls, and its check must not try one dead connection after the other."""
    first, second = servers
    async with moving_address(first.url) as address, watched(address, tmp_path) as here:
        await fail_over(here, address, second)
        async with client_of(second) as client:
            lives = await client.info("server"), await client.info("replication")
        life = f"{lives[0]['run_id']}/{lives[1]['master_replid']}"
        async with asyncio.timeout(FOLLOWED_SECONDS):
            while here.service.connections._guard.life != life:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.02)


async def test_a_check_of_many_sales_may_exceed_one_reply_time_out(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "ANSWER_SECONDS_MAX", 1.0)
    monkeypatch.setattr(losses, "SQL_SECONDS_MAX", 1.0)
    monkeypatch.setattr(losses, "SALES_AT_ONCE", 1)
    async with moving_address(valkey_url) as address, bench(tmp_path, address.url) as here:
        for _ in range(20):
            await here.sale()
        here.service.connections.guard()
        address.delay_seconds = 0.06
        # A busy machine may exceed the time-out of a single answer in some rounds.
        for _ in range(ROUNDS_MAX):
            await here.service.redis_monitor.check_redis()
            if here.service.connections.vouched:
                break
        assert here.service.connections.vouched


async def test_a_master_promoted_again_is_compared_again(
    tmp_path: Path, servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    """Its run id is unchanged, and its losses while it was a replica are unknown."""
    first, second = servers
    async with vouched(first, tmp_path) as here:
        sale_id = await here.sale()
        await promote(second)
        await follow(first, second)
        await promote(first)
        # An open connection does not show the failover: a new one does.
        here.service.connections._pool.renew("test")
        with pytest.raises(ReservationError):
            await here.hold(sale_id)
        assert not here.service.connections.vouched
        await here.service.redis_monitor.check_redis()
        await here.hold(sale_id)


async def test_a_new_replication_id_under_open_connections_is_followed(
    tmp_path: Path, servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    """The replication id changes while every connection stays open and serves."""
    first, second = servers
    async with vouched(first, tmp_path) as here:
        sale_id = await here.sale()
        await asyncio.gather(*(here.hold(sale_id, f"before-{number}") for number in range(8)))
        await promote(second)
        await follow(first, second)
        await promote(first)
        # The service's own checks; nothing else closes a connection.
        await here.service.redis_monitor.check_redis()
        await here.service.redis_monitor.check_redis()
        for number in range(20):
            await here.hold(sale_id, f"after-{number}")


async def test_a_replica_is_not_vouched_for(
    tmp_path: Path, servers: tuple[EmbeddedServer, EmbeddedServer]
) -> None:
    _, second = servers
    async with vouched(second, tmp_path) as here:
        assert not here.service.connections.vouched
        assert "redis-master" in here.service.redis_monitor.missing


REFUSALS = {
    "READONLY": b"-READONLY You can't write against a read only replica.\r\n",
    "MASTERDOWN": b"-MASTERDOWN Link with MASTER is down.\r\n",
    "LOADING": b"-LOADING Redis is loading the dataset in memory\r\n",
}


@pytest.mark.parametrize("code", list(REFUSALS))
async def test_a_readonly_reply_closes_every_connection(code: str, tmp_path: Path) -> None:
    ended: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies = {b"CLIENT": b"+OK\r\n", b"INFO": b"+run_id:x\r\n", b"GET": REFUSALS[code]}
        with suppress(ConnectionError):
            while line := await reader.readline():
                writer.write(replies.get(line.strip(), b""))
        ended.append(code)
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "socket")
    connections = RedisClient(f"unix://{tmp_path / 'socket'}", clock=NOW)
    await leave_idle(connections, 5)
    with pytest.raises(StoreUnavailable):
        await connections.command("GET", "x")
    async with asyncio.timeout(30):
        while len(ended) < 5:  # noqa: ASYNC110 - the sockets send no event
            await asyncio.sleep(0.01)
    # The next refusals follow too soon to be new evidence: they do not cost a connection each.
    for _ in range(20):
        with pytest.raises(StoreUnavailable):
            await connections.command("GET", "x")
    assert len(ended) == 5
    await connections.aclose()
    async with asyncio.timeout(30):
        while len(ended) < 6:  # noqa: ASYNC110 - the sockets send no event
            await asyncio.sleep(0.01)
    server.close()


async def test_idle_connections_are_closed_after_a_minute(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pool.IDLE_SECONDS == 60
    monkeypatch.setattr(pool, "IDLE_SECONDS", 1.0)
    async with moving_address(valkey_url) as address:
        connections = RedisClient(address.url, clock=NOW)
        await leave_idle(connections, 10)
        async with asyncio.timeout(30):
            # One stays in use all the time.
            while address.open > 1:
                assert await connections.command("PING") == "PONG"
                await asyncio.sleep(0.02)
        assert address.accepted == 10
        async with asyncio.timeout(30):
            while address.open:  # noqa: ASYNC110 - the sockets send no event
                await asyncio.sleep(0.02)
        assert await connections.command("PING") == "PONG"
        await connections.aclose()


@pytest.mark.both_loops
async def test_the_kernel_drops_bytes_unacknowledged_by_a_vanished_host(
    valkey_url: str,
) -> None:
    if sys.platform != "linux":
        missing("only Linux has TCP_USER_TIMEOUT")
    async with moving_address(valkey_url) as address:
        connections = RedisClient(address.url, clock=NOW)
        wire = await connections._pool.take()
        kept = wire._transport.get_extra_info("socket")
        assert kept.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2_000
        assert kept.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        connections._pool.give_back(wire, clean=True)
        await connections.aclose()


async def is_refused(call: Callable[[], Awaitable[object]]) -> bool:
    try:
        await call()
    except (ReservationError, StoreUnavailable):
        return True
    return False


def store_calls(
    here: Bench, held: Reservation, claimed: Reservation, known: CachedSale
) -> dict[str, Callable[[], Awaitable[object]]]:
    """One call of each kind about a reservation."""
    store, sale_id, epoch = here.service.store, held.sale_id, known.epoch
    return {
        "prepare": lambda: here.hold(sale_id),
        "claim": lambda: store.claim(held, epoch=epoch, payment_key="k", lease_ms=1),
        "take over": lambda: store.take_over(claimed, epoch=epoch, lease_ms=1),
        "move the lease": lambda: store.move_lease(claimed, epoch=epoch, fence=1, lease_ms=1),
        "finish": lambda: store.finish(claimed, epoch=epoch, fence=1, outcome=CONFIRMED),
        "release": lambda: store.release(held, epoch=epoch, reason=Reason(Cause.BUYER)),
        "expire": lambda: store.expire(sale_id, [held.order_id], epoch=epoch),
        "refund": lambda: store.refund(
            claimed, epoch=epoch, restock=True, reason=Reason(Cause.BUYER)
        ),
        "read": lambda: store.read(held.order_id),
        "list": lambda: store.orders_of_buyer(sale_id, "ann", 5),
        "what is due": lambda: store.due(sale_id, 5),
    }


def sale_calls(
    here: Bench, sale_id: str, known: CachedSale
) -> dict[str, Callable[[], Awaitable[object]]]:
    """One call of each kind about a sale."""
    service, epoch, sale = here.service, known.epoch, known.sale
    sales, outbox = service.sale_store, service.outbox
    inspection = AuditReader(service.connections, service.keys, service.store)
    return {
        "announce": lambda: sales.announce(sale_id),
        "put": lambda: sales.put(
            sale_id,
            epoch=epoch,
            version=1,
            digest="d",
            settings={},
            items=sale.items,
            leaving=[],
            data="{}",
        ),
        "restock": lambda: sales.restock(
            sale_id, epoch=epoch, operation="o", digest="d", sku="a", delta=1, members={}
        ),
        "switch": lambda: sales.switch(
            sale_id, epoch=epoch, status=sale.switched, operator="op", reason="x"
        ),
        "read a sale": lambda: sales.read(sale_id),
        "list the sales": sales.ids,
        "flush": lambda: outbox.read_new(sale_id, 1),
        "make the outbox' group": lambda: outbox.ensure_group(sale_id, 0),
        "trim": lambda: outbox.trim(sale_id, 1),
        "audit": lambda: anext(inspection.buyers(sale_id, 0)),
    }


async def test_no_call_reaches_an_unvouched_server(
    tmp_path: Path, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script_calls, "ATTEMPT_PAUSES_SECONDS", (0.0,) * 4)
    async with bench(tmp_path / "sql", own_server.url) as here:
        service = here.service
        sale_id = await here.sale()
        order, other = await here.hold(sale_id), await here.hold(sale_id, "bob")
        await here.claim(other)
        known = await service.catalog.get(sale_id)
        calls = store_calls(here, order, other, known) | sale_calls(here, sale_id, known)
        service.connections.guard()
        service.connections.vouch_for("another life of the server")
        async with client_of(own_server) as client:
            before = await client.xlen(service.keys.of(sale_id).outbox)
            await client.config_resetstat()
            for name, call in calls.items():
                assert await is_refused(call), name
            asked = set(await client.info("commandstats"))
            assert await client.xlen(service.keys.of(sale_id).outbox) == before
        # A connection may be opened, and greeted; nothing else.
        greeting = {"cmdstat_client|setinfo", "cmdstat_info"}
        assert asked <= {"cmdstat_config|resetstat", *greeting}
        # A check of the server reaches it, and then admits the other calls.
        await service.redis_monitor.check_redis()
        assert (await service.store.read(order.order_id)) is not None


async def test_the_worker_waits_for_a_vouched_server(
    tmp_path: Path, own_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path / "sql", own_server.url) as here:
        sale_id = await here.sale()
        order = await here.hold(sale_id)
        names = here.service.keys.of(sale_id)
        look = here.service.redis_monitor.check_redis
        vouched = asyncio.Event()

        async def later() -> None:
            await vouched.wait()
            await look()

        monkeypatch.setattr(here.service.redis_monitor, "check_redis", later)
        async with client_of(own_server) as client:

            async def status() -> object:
                return await client.hget(names.order(order.order_id), "status")

            await client.zadd(names.deadlines, {order.order_id: 1})
            await client.hset(names.order(order.order_id), "expires_at", "1")
            working = asyncio.create_task(Worker(here.service).run())
            await client.config_resetstat()
            await asyncio.sleep(1.5)
            asked = set(await client.info("commandstats"))
            assert not {name for name in asked if "evalsha" in name or "xread" in name}
            vouched.set()
            async with asyncio.timeout(30):
                while await status() != "EXPIRED":  # noqa: ASYNC110 - the server sends no event
                    await asyncio.sleep(0.05)
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


async def test_a_time_out_leaves_the_outcome_unknown_and_no_idle_connection(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with moving_address(valkey_url) as address:
        connections = RedisClient(address.url, clock=NOW)
        await leave_idle(connections, 5)
        monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", 0.2)
        with pytest.raises(StoreUncertain):
            await connections.command("BLPOP", f"none-{secrets.token_hex(4)}", 5)
        monkeypatch.undo()
        assert not connections._pool._wires
        assert await connections.command("PING") == "PONG"
        await connections.aclose()
