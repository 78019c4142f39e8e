"""Changes that replicas must acknowledge: WAIT as the server runs it, and every script's answer."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from reservation.adapters.redis import replica_acks
from reservation.adapters.redis.ack_probes import AckProbes
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import NotAcknowledged, StoreUncertain, TooFewReplicas
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.replica_acks import ACK_MS_MAX, ACK_ROW, SETTLE_SECONDS
from reservation.application.readiness.redis_monitor import RETRY_AFTER_SECONDS
from reservation.domain.clock import SystemClock
from reservation.domain.errors import OutcomeUnknown, Unavailable
from reservation.domain.payment import Cause, Reason
from tests.support.acknowledgement import acknowledged_bench, reopened
from tests.support.in_process import CONFIRMED, bench
from tests.support.replication import Pair, client_of, pair
from tests.support.topologies import sentinels

pytestmark = pytest.mark.system

#: A round of the service's loops, on a busy machine.
PATIENCE_SECONDS = 20.0
#: A replica of a busy machine: slower than a probe, faster than the WAIT of a change.
SLOW_SECONDS = 0.45
TOUCH_BYTES_MIN = 30


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Pair]:
    with pair(tmp_path / "servers") as started:
        yield started


@asynccontextmanager
async def client(servers: Pair, wanted: int = 1) -> AsyncIterator[RedisClient]:
    connections = RedisClient(servers.address.url, clock=SystemClock(), ack_replicas=wanted)
    try:
        yield connections
    finally:
        await connections.aclose()


async def test_two_rounds_of_probes_send_one(servers: Pair) -> None:
    """The monitor's loop and its check may begin a round in the same turn of the event loop."""
    async with client(servers) as connections:
        probes = AckProbes(connections, Keys())
        await asyncio.gather(probes.run(), probes.run())
        await reopened(connections)


async def test_changes_wait_for_a_slow_replica_that_an_open_server_gains(servers: Pair) -> None:
    async with client(servers) as connections:
        probes = AckProbes(connections, Keys())
        await reopened(connections)
        assert connections.acks.asked == 1
        await asyncio.to_thread(servers.follow)
        servers.lag(SLOW_SECONDS)
        await probes.measure()
        assert connections.acks.asked == 2


async def test_a_server_that_lists_two_replicas_opens_with_both(servers: Pair) -> None:
    await asyncio.to_thread(servers.follow)
    async with client(servers) as connections:
        await reopened(connections)
        assert connections.acks.asked == 2


def raw(servers: Pair, *commands: tuple[Any, ...]) -> list[Any]:
    """Send these commands in one write; their replies, an error as a value."""
    with client_of(servers.master) as found, found.pipeline(transaction=False) as batch:
        for command in commands:
            batch.execute_command(*command)
        return batch.execute(raise_on_error=False)


def test_wait_covers_the_last_write_of_its_own_connection_only(servers: Pair) -> None:
    with servers.frozen_replica(), client_of(servers.master) as writer:
        writer.set("a", "1")
        assert raw(servers, ("WAIT", 1, 200)) == [1], "another connection's write is not covered"
        assert writer.execute_command("WAIT", 1, 200) == 0
        writer.get("a")
        assert writer.execute_command("WAIT", 1, 200) == 0, "a read does not move the position"


def test_wait_inside_a_transaction_confirms_nothing(servers: Pair) -> None:
    with servers.frozen_replica(), client_of(servers.master) as writer:
        with writer.pipeline(transaction=True) as batch:
            batch.set("a", "1")
            batch.execute_command("WAIT", 1, 20_000)
            # It does not block, and the transaction's own writes do not count yet.
            assert batch.execute()[1] == 1
        assert writer.execute_command("WAIT", 1, 200) == 0


def test_a_touch_is_one_more_write_of_its_connection(servers: Pair) -> None:
    with client_of(servers.master) as found:
        script = (Path(__file__).parents[3] / "scripts/lua/touch.lua").read_text()
        sha = found.script_load(script)
        found.hset("rsv:{s}:sale", mapping={"epoch": "e", "seq": "7"})
        before = found.info("replication")["master_repl_offset"]
        assert found.evalsha(sha, 1, "rsv:{s}:sale") == ["done"]
        assert found.info("replication")["master_repl_offset"] - before > TOUCH_BYTES_MIN
        assert found.hgetall("rsv:{s}:sale") == {"epoch": "e", "seq": "7"}
        assert found.evalsha(sha, 1, "rsv:{gone}:sale") == ["not_found"]
        assert not found.exists("rsv:{gone}:sale")
    with servers.frozen_replica():
        # No write of this connection before it.
        _, touched, count = raw(
            servers, ("PING",), ("EVALSHA", sha, 1, "rsv:{s}:sale"), ("WAIT", 1, 200)
        )
        assert (touched, count) == (["done"], 0)


async def test_sql_gets_no_event_that_replicas_may_lack(
    servers: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else SQL is ahead of the replica that is promoted, and the sale waits for a rebuild."""
    monkeypatch.setattr(replica_acks, "OVERDUE_SECONDS", 60.0)
    folder = tmp_path / "shop"
    async with (
        acknowledged_bench(servers, folder) as here,
        acknowledged_bench(servers, folder, RESERVATION_REDIS_ACK_REPLICAS="0") as hasty,
    ):
        sale_id = await here.sale()
        await reopened(here.service.connections)
        await here.flush(sale_id)
        before = await here.service.sql.events.cursor(sale_id)
        with servers.frozen_replica():
            await hasty.hold(sale_id)
            with pytest.raises(NotAcknowledged):
                await here.flush(sale_id)
            for _ in range(2):
                with pytest.raises(TooFewReplicas):
                    await here.flush(sale_id)
            assert await here.service.sql.events.cursor(sale_id) == before
            monkeypatch.setattr(replica_acks, "OVERDUE_SECONDS", 0.0)
            await here.flush(sale_id)
            assert (await here.service.sql.events.cursor(sale_id))[0] == before[0] + 1
        await hasty.hold(sale_id, "bob")
        await reopened(here.service.connections)
        await here.flush(sale_id)
        assert (await here.service.sql.events.cursor(sale_id))[0] == before[0] + 2


async def test_a_change_that_replicas_may_lack_raises_no_mark(
    servers: Pair, tmp_path: Path
) -> None:
    """A promoted replica without it has lost nothing that was promised."""
    async with acknowledged_bench(servers, tmp_path / "shop") as here:
        service = here.service
        sale_id = await here.sale()
        await reopened(service.connections)
        order = await here.hold(sale_id)
        epoch = (await service.catalog.get(sale_id)).epoch
        before = service.connections.marks.of(sale_id, epoch)
        assert before[0]
        with servers.frozen_replica():
            with pytest.raises(OutcomeUnknown):
                await here.hold(sale_id, "bob")
            with pytest.raises(NotAcknowledged):
                await service.store.release(order, epoch=epoch, reason=Reason(Cause.BUYER))
            assert service.connections.marks.of(sale_id, epoch) == before
        await reopened(service.connections)
        await here.hold(sale_id, "cat")
        assert service.connections.marks.of(sale_id, epoch)[0] > before[0]


async def test_an_expiry_raises_no_mark_where_replicas_must_acknowledge(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "shop") as here:
        service = here.service
        sale_id = await here.sale(hold_seconds=1)
        await reopened(service.connections)
        order = await here.hold(sale_id)
        epoch = (await service.catalog.get(sale_id)).epoch
        before = service.connections.marks.of(sale_id, epoch)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await service.store.expiry(sale_id, [order.order_id], epoch=epoch):  # noqa: ASYNC110 - in Redis
                await asyncio.sleep(0.1)
        assert service.connections.marks.of(sale_id, epoch) == before


async def test_events_are_read_once_by_a_server_that_forgot_its_scripts(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "shop") as here:
        sale_id = await here.sale()
        await reopened(here.service.connections)
        outbox = RedisOutbox(here.service.connections, here.service.keys)
        await outbox.ensure_group(sale_id, 0)
        await here.service.connections.command("SCRIPT", "FLUSH")
        assert [event.seq for event in await outbox.read_new(sale_id, 9)] == [1]


async def test_events_that_a_flusher_left_pending_are_acknowledged_as_well(
    servers: Pair, tmp_path: Path
) -> None:
    """Reading them again writes nothing that replicas could acknowledge."""
    async with acknowledged_bench(servers, tmp_path / "shop") as here:
        sale_id = await here.sale()
        await here.hold(sale_id)
        outbox = RedisOutbox(here.service.connections, here.service.keys)
        await outbox.ensure_group(sale_id, 0)
        read = await outbox.read_new(sale_id, 9)
        assert await outbox.read_pending(sale_id, 9) == read != []
        with servers.frozen_replica(), pytest.raises(NotAcknowledged):
            await outbox.read_pending(sale_id, 9)


async def test_a_demoted_server_ends_the_wait_with_an_error(servers: Pair) -> None:
    async with client(servers) as connections:
        await reopened(connections)
        with servers.frozen_replica():
            writing = asyncio.create_task(connections.acked_pipeline([("SET", "a", "1")]))
            await asyncio.sleep(0.2)
            with client_of(servers.master) as master:
                master.execute_command("REPLICAOF", "127.0.0.1", 1)
            with pytest.raises(StoreUncertain):
                await writing
            assert not connections.acks.is_open


async def test_a_write_is_acknowledged_or_says_that_it_is_not(servers: Pair) -> None:
    async with client(servers) as connections:
        await reopened(connections)
        assert await connections.acked_pipeline([("SET", "a", "1")]) == ["OK"]
        with servers.frozen_replica():
            began = time.monotonic()
            with pytest.raises(NotAcknowledged) as short:
                await connections.acked_pipeline([("SET", "a", "2"), ("GET", "a")])
            assert short.value.reply == ["OK", "2"]
            assert time.monotonic() - began >= ACK_MS_MAX / 1000 - 0.05
            with pytest.raises(TooFewReplicas):
                connections.require_acks("rsv:{s}:sale")
        await reopened(connections)
        connections.require_acks("rsv:{s}:sale")


async def test_a_refused_command_needs_no_acknowledgement(servers: Pair) -> None:
    async with client(servers) as connections:
        await reopened(connections)
        with client_of(servers.master) as master:
            master.hset("h", "f", "1")
        with servers.frozen_replica():
            [reply] = await connections.acked_pipeline([("GET", "h")])
        assert isinstance(reply, Exception)
        assert connections.acks.is_open


async def test_a_slow_replica_delays_only_its_own_connection(servers: Pair) -> None:
    async with client(servers) as connections:
        await reopened(connections)
        servers.lag(0.4)
        writing = asyncio.create_task(connections.acked_pipeline([("SET", "a", "1")]))
        await asyncio.sleep(0.05)
        assert await connections.command("GET", "a") == "1"
        assert not writing.done()
        assert await writing == ["OK"]


async def test_a_batch_that_falls_short_is_unknown_and_the_next_is_refused_unsent(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        sale_id = await here.sale()
        await here.hold(sale_id)
        with servers.frozen_replica():
            batch = [here.hold(sale_id, f"buyer-{number}") for number in range(20)]
            found = await asyncio.gather(*batch, return_exceptions=True)
            assert {type(one) for one in found} <= {OutcomeUnknown, Unavailable}
            assert any(isinstance(one, OutcomeUnknown) for one in found)
            began = time.monotonic()
            with pytest.raises(Unavailable) as refused:
                await here.hold(sale_id, "late")
            assert refused.value.facts["missing"] == [ACK_ROW]
            assert refused.value.facts["retryAfter"] == RETRY_AFTER_SECONDS
            assert time.monotonic() - began < ACK_MS_MAX / 1000
        await reopened(here.service.connections)
        # The key of an unknown outcome gets the one true answer.
        for number in range(20):
            await here.hold(sale_id, f"buyer-{number}")
        assert (await here.audited(sale_id)) == ()


async def test_a_replay_is_acknowledged_itself(servers: Pair, tmp_path: Path) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        sale_id = await here.sale()
        order = await here.hold(sale_id, key="same")
        store = here.service.store
        assert await store.read_acknowledged(order.order_id) == await store.read(order.order_id)
        with servers.frozen_replica(), pytest.raises(NotAcknowledged):
            await store.read_acknowledged(order.order_id)
        await reopened(here.service.connections)
        again = await here.hold(sale_id, key="same")
        assert again.order_id == order.order_id


async def test_a_claim_that_falls_short_says_so(servers: Pair, tmp_path: Path) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        order = await here.hold(await here.sale())
        assert (await here.claim(order, "pay-1")).is_acknowledged
        other = await here.hold(order.sale_id, "bob")
        with servers.frozen_replica():
            claimed = await here.claim(other, "pay-2")
        assert not claimed.is_acknowledged


async def test_every_answer_of_a_payment_falls_short_together_with_the_replica(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        order = await here.hold(await here.sale())
        claimed = await here.claim(order)
        second = await here.hold(order.sale_id, "bob")
        with servers.frozen_replica():
            for _ in range(2):
                # The second call finds the change of the first.
                with pytest.raises(NotAcknowledged):
                    await here.finish(order, claimed.fence)
            for _ in range(2):
                with pytest.raises(NotAcknowledged):
                    await here.service.store.release(
                        second,
                        epoch=(await here.service.catalog.get(order.sale_id)).epoch,
                        reason=Reason(Cause.BUYER),
                    )
        await reopened(here.service.connections)
        await here.finish(order, claimed.fence, CONFIRMED)
        assert await here.audited(order.sale_id) == ()


async def test_scripts_that_the_server_forgot_are_loaded_again(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        order = await here.hold(await here.sale())
        with client_of(servers.master) as master:
            master.script_flush()
        assert (await here.claim(order)).is_acknowledged
        with client_of(servers.master) as master:
            master.script_flush()
        assert await here.service.store.read_acknowledged(order.order_id)


async def test_a_server_without_a_replica_closes_by_name_and_opens_with_it(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_bench(servers, tmp_path / "data") as here:
        sale_id = await here.sale()
        await here.hold(sale_id)
        with client_of(servers.replica) as replica:
            replica.execute_command("REPLICAOF", "NO", "ONE")
        for _ in range(100):
            await here.service.redis_monitor.check_redis()
            if here.service.redis_monitor.missing == (ACK_ROW,):
                break
        assert here.service.redis_monitor.missing == (ACK_ROW,)
        with pytest.raises(Unavailable) as refused:
            await here.hold(sale_id, "bob")
        assert refused.value.facts["missing"] == [ACK_ROW]
        await asyncio.to_thread(servers.follow)
        await reopened(here.service.connections)
        await here.hold(sale_id, "bob")


@pytest.mark.slow
async def test_a_replica_that_leaves_closes_the_server_until_a_failover_would_be_over(
    tmp_path: Path,
) -> None:
    """The other replica still acknowledges, but would follow the departed one."""
    with sentinels(tmp_path / "redis") as topology:
        async with bench(tmp_path / "data", topology.url) as here:
            acks = here.service.connections.acks
            here.service.connections.guard()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not (acks.is_open and acks.asked == 2):
                    await here.service.redis_monitor.check_redis()
            sale_id = await here.sale()
            await here.hold(sale_id)
            leaving = next(node for node in topology.nodes if node is not topology.master)
            leaving.execute("REPLICAOF", "NO", "ONE")
            began = time.monotonic()
            with pytest.raises(OutcomeUnknown):
                await here.hold(sale_id, "bob")
            await here.service.connections.probe_replicas("rsv:acks")
            with pytest.raises(Unavailable) as refused:
                await here.hold(sale_id, "bob")
            assert refused.value.facts["missing"] == [ACK_ROW]
            await reopened(here.service.connections)
            assert time.monotonic() - began >= SETTLE_SECONDS
            await here.hold(sale_id, "bob")


async def test_without_required_replicas_no_wait_is_sent(servers: Pair, tmp_path: Path) -> None:
    async with acknowledged_bench(
        servers, tmp_path / "data", RESERVATION_REDIS_ACK_REPLICAS="0"
    ) as here:
        sale_id = await here.sale()
        with client_of(servers.master) as master, suppress(RedisError):
            master.config_resetstat()
        with servers.frozen_replica():
            order = await here.hold(sale_id)
            claimed = await here.claim(order)
            await here.finish(order, claimed.fence)
        with client_of(servers.master) as master:
            calls = master.info("commandstats")
        assert "cmdstat_wait" not in calls
