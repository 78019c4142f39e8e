"""The Redis monitor detects data loss before the service sells from that server."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.sale_writer import RedisSaleHead
from reservation.adapters.sql.payment_intents import Intent
from reservation.adapters.sql.sales import SaleHead
from reservation.application.readiness import head_comparison
from reservation.application.readiness.head_comparison import compare
from reservation.domain.errors import SaleRecovering, Unavailable
from reservation.domain.sale_settings import SaleDefinition, document_of
from reservation.telemetry.metrics import PREPARE_CLOSED
from tests.support.in_process import Bench, bench, sale_definition

HEAD = SaleHead(epoch="e", seq=5, chain="c5")


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


@pytest.mark.parametrize(
    ("found", "gap"),
    [
        (RedisSaleHead(epoch="e", seq=5, chain="c5", chains={5: "c5"}), None),
        (RedisSaleHead(epoch="e", seq=9, chain="c9", chains={5: "c5"}), None),
        (RedisSaleHead(epoch="e", seq=9, chain="c9", chains={}), None),
        (None, "no such sale"),
        (RedisSaleHead(epoch="d", seq=5, chain="c5", chains={5: "c5"}), "another epoch"),
        (RedisSaleHead(epoch="e", seq=3, chain="c3", chains={}), "2 events are lost"),
        (RedisSaleHead(epoch="e", seq=5, chain="x", chains={5: "x"}), "event 5 in Redis differs"),
        (RedisSaleHead(epoch="e", seq=9, chain="c9", chains={5: "x"}), "event 5 in Redis differs"),
    ],
)
def test_only_events_in_sql_missing_in_redis_are_a_loss(
    found: RedisSaleHead | None, gap: str | None
) -> None:
    compared = compare(HEAD, found)
    assert compared is None if gap is None else compared is not None and gap in compared


async def test_a_sale_behind_sql_is_closed_and_reopened(here: Bench) -> None:
    sale_id, other_id = await here.sale(), await here.sale()
    await here.hold(sale_id)
    memory = await here.remembered(sale_id)
    await here.hold(sale_id)
    await here.flush(sale_id)
    await here.put_back(sale_id, memory)
    watch = here.service.redis_monitor
    await watch.check_redis()
    assert list(watch.gaps) == [sale_id]
    assert closed_for("sale-recovering") == 1
    assert "1 events are lost" in watch.gaps[sale_id]
    with pytest.raises(SaleRecovering):
        await here.hold(sale_id)
    await here.hold(other_id)
    await here.service.rebuild.run(sale_id, operator="op")
    await watch.check_redis()
    assert watch.gaps == {}
    assert closed_for("sale-recovering") == 0
    await here.hold(sale_id)


async def test_a_sale_under_creation_is_not_a_loss(here: Bench) -> None:
    await here.service.sql.sales.register("soon", "{}", 1)
    watch = here.service.redis_monitor
    await watch.check_redis()
    assert watch.gaps == {}
    await watch.check_redis()
    assert list(watch.gaps) == ["soon"]


async def test_an_interrupted_creation_is_completed_by_the_same_put(
    here: Bench,
) -> None:
    sale_id, change = await unfinished(here)
    with pytest.raises(SaleRecovering):
        await here.service.sales.put(
            sale_id, msgspec.structs.replace(change, name="Other"), if_match=None, operator="op"
        )
    before = (await here.service.sql.sales.epochs())[sale_id]
    sale, created = await here.service.sales.put(sale_id, change, if_match=None, operator="op")
    assert (created, sale.version) == (True, 1)
    # Tokens of an unrecorded life of the sale belong to another epoch.
    assert sale.epoch == (await here.service.sql.sales.epochs())[sale_id] != before
    await here.service.redis_monitor.check_redis()
    assert here.service.redis_monitor.gaps == {}
    await here.hold(sale_id)


@pytest.mark.parametrize("seconds_ago", [0, 5])
async def test_a_creation_that_may_still_arrive_is_waited_for(
    here: Bench, seconds_ago: int
) -> None:
    sale_id, change = await unfinished(here, seconds_ago=seconds_ago)
    with pytest.raises(SaleRecovering):
        await here.service.sales.put(sale_id, change, if_match=None, operator="op")


@pytest.mark.parametrize("trace", ["an event", "an intent"])
async def test_a_sale_with_events_is_not_created_again(here: Bench, trace: str) -> None:
    sale_id, change = await unfinished(here)
    made = await here.service.sales.put(sale_id, change, if_match=None, operator="op")
    if trace == "an event":
        await here.flush(sale_id)
    else:
        order = await here.hold(sale_id)
        claimed = await here.claim(order, "pk-1")
        await here.service.sql.intents.add(
            Intent(
                order_id=order.order_id,
                sale_id=sale_id,
                fence=claimed.fence,
                payment_key="pk-1",
                amount=order.amount,
                currency=order.currency,
                idempotency_key="ik-1",
                now_ms=1,
            )
        )
    await here.lose(sale_id)
    with pytest.raises(SaleRecovering):
        await here.service.sales.put(sale_id, change, if_match=None, operator="op")
    assert (await here.service.sql.sales.epochs())[sale_id] == made[0].epoch


async def unfinished(here: Bench, *, seconds_ago: int = 60) -> tuple[str, SaleDefinition]:
    """A sale that was registered in SQL this long ago, and never reached Redis."""
    now_ms = here.service.clock.now_ms()
    change = sale_definition(now_ms)
    sale_id = f"s{secrets.token_hex(5)}"
    await here.service.sql.sales.register(sale_id, document_of(change), now_ms - seconds_ago * 1000)
    return sale_id, change


async def test_an_event_that_both_have_is_read_once_in_each_life_of_the_server(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    data_loss, asked = here.service.data_loss, list[set[int]]()
    restorer = data_loss._restorer
    read_heads, lives = restorer.read_heads, ["first", "first", "first", "second", "second"]

    async def heads(seqs: Mapping[str, Collection[int]], node: Any) -> Any:
        asked.append(set(seqs[sale_id]))
        _, found = await read_heads(seqs, node)
        return lives[len(asked) - 1], found

    monkeypatch.setattr(restorer, "read_heads", heads)
    head = (await here.service.sql.sales.heads())[sale_id]
    node = here.service.connections
    for _ in range(3):
        assert (await data_loss._read_heads({sale_id: head}, {}, node))[1][sale_id] is not None
    # The first life is new. The second one is found by a read without the event.
    assert asked == [{1}, {1}, set(), set(), {1}]


async def test_unchanged_sales_are_compared_in_turn(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_comparison, "UNCHANGED_AT_ONCE", 2)
    sales = [await here.sale() for _ in range(6)]
    for sale_id in sales:
        await here.flush(sale_id)
    rounds = reads_of(here, monkeypatch)
    watch = here.service.redis_monitor
    await watch.check_redis()
    assert set(rounds[-1]) == set(sales)

    changed = sales[0]
    for _ in range(3):
        await here.hold(changed)
        await here.flush(changed)
        rounds.clear()
        await watch.check_redis()
        assert changed in rounds[0]
        assert len(rounds) == 1
        assert len(rounds[0]) < len(sales)

    rounds.clear()
    for _ in range(3):
        await watch.check_redis()
    assert sorted(sale_id for one in rounds for sale_id in one) == sorted(sales)


async def test_the_loss_of_one_sale_has_all_sales_compared_at_once(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_comparison, "UNCHANGED_AT_ONCE", 2)
    sales = [await here.sale() for _ in range(6)]
    for sale_id in sales:
        await here.flush(sale_id)
    watch = here.service.redis_monitor
    await watch.check_redis()
    for sale_id in sales:
        await here.service.connections.command("DEL", here.service.keys.of(sale_id).sale)
    await watch.check_redis()
    assert sorted(watch.gaps) == sorted(sales)
    for _ in range(4):
        await watch.check_redis()
        assert sorted(watch.gaps) == sorted(sales)


async def test_another_life_of_the_server_has_all_sales_compared_at_once(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_comparison, "UNCHANGED_AT_ONCE", 2)
    sales = [await here.sale() for _ in range(6)]
    for sale_id in sales:
        await here.flush(sale_id)
    watch = here.service.redis_monitor
    await watch.check_redis()
    rounds = reads_of(here, monkeypatch, life="another")
    await watch.check_redis()
    assert any(set(one) == set(sales) for one in rounds)


def reads_of(
    here: Bench, monkeypatch: pytest.MonkeyPatch, *, life: str | None = None
) -> list[list[str]]:
    """The sales of each later read of heads; `life` replaces the server's own."""
    reads = list[list[str]]()
    restorer = here.service.data_loss._restorer
    read_heads = restorer.read_heads

    async def heads(seqs: Mapping[str, Collection[int]], node: Any) -> Any:
        reads.append(list(seqs))
        own, found = await read_heads(seqs, node)
        return life or own, found

    monkeypatch.setattr(restorer, "read_heads", heads)
    return reads


async def test_holds_are_refused_on_an_unvouched_server(
    tmp_path: Path, own_server: EmbeddedServer
) -> None:
    async with bench(tmp_path / "sql", own_server.url) as here:
        sale_id = await here.sale()
        here.service.connections.guard()
        with pytest.raises(Unavailable):
            await here.hold(sale_id)
        await here.service.redis_monitor.check_redis()
        await here.hold(sale_id)

        await own_server.stop()
        await own_server.start()
        # The pool reconnects by itself; the sale is intact, but that is not verified yet.
        with pytest.raises(Unavailable):
            await here.hold(sale_id)
        assert here.service.connections.doubted.is_set()
        await here.service.redis_monitor.check_redis()
        await here.hold(sale_id)


async def test_the_monitor_vouches_soon_after_a_restart(
    tmp_path: Path, own_server: EmbeddedServer
) -> None:
    async with bench(tmp_path / "sql", own_server.url) as here:
        sale_id = await here.sale()
        here.service.connections.guard()
        watching = asyncio.create_task(here.service.redis_monitor.run())
        try:
            await here.eventually_hold(sale_id, refused=Unavailable)
            await own_server.stop()
            await own_server.start()
            await here.eventually_hold(sale_id, refused=Unavailable)
        finally:
            watching.cancel()


async def test_unmet_preflight_conditions_close_only_prepare(
    tmp_path: Path, own_server: EmbeddedServer
) -> None:
    async with bench(tmp_path / "sql", own_server.url) as here:
        sale_id = await here.sale()
        order = await here.hold(sale_id)
        await here.service.connections.command("CONFIG", "SET", "appendfsync", "no")
        await here.service.redis_monitor.check_redis()
        with pytest.raises(Unavailable, match="redis-fsync-policy") as refusal:
            await here.hold(sale_id)
        assert refusal.value.facts["missing"] == ["redis-fsync-policy"]
        assert closed_for("redis-fsync-policy") == 1
        assert refusal.value.facts["retryAfter"]
        claimed = await here.claim(order)
        await here.finish(order, claimed.fence)
        await here.service.connections.command("CONFIG", "SET", "appendfsync", "always")
        await here.service.redis_monitor.check_redis()
        assert closed_for("redis-fsync-policy") == 0
        await here.hold(sale_id)


async def test_an_unresponsive_server_closes_prepare_by_name(
    tmp_path: Path, own_server: EmbeddedServer
) -> None:
    async with bench(tmp_path / "sql", own_server.url) as here:
        # The gauge is global: the monitor of an earlier test may have ended while it was set.
        PREPARE_CLOSED.labels("redis").set(0)
        await here.service.redis_monitor.check_redis()
        assert closed_for("redis") == 0
        await own_server.stop()
        await here.service.redis_monitor.check_redis()
        assert closed_for("redis") == 1
        await own_server.start()
        # A check may still get a connection that the stop has closed.
        async with asyncio.timeout(30):
            while closed_for("redis") != 0:
                await here.service.redis_monitor.check_redis()


def closed_for(reason: str) -> float:
    return PREPARE_CLOSED.labels(reason)._value.get()
