"""Transfers in the outbox of a partition: the flusher writes them, and Redis and SQL agree."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.adapters.sql.sales import SkuFold
from reservation.application.audit.counters import CounterAudit
from reservation.verification.model.sale_state import SaleState
from tests.support.in_process import Bench, bench
from tests.support.lua_partition import LuaPartition


@pytest.fixture
async def shop(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


async def partition_in(shop: Bench) -> LuaPartition:
    """Return an open partition that is in SQL."""
    service = shop.service
    made = LuaPartition(service.connections)
    made.epoch, _ = await service.sql.sales.register(made.id, "{}", 1)
    assert await made.put() == ["done", "1"]
    return made


async def with_transfers(partition: LuaPartition) -> None:
    """Let it lend, borrow and hold in one step, and sell a borrowed unit."""
    await partition.lend(1, units=4)
    await partition.borrow(2, up_to=3)
    waiting = partition.basket("ann", lines={"a": 2})
    assert (await partition.borrow(2, number=3, up_to=4, waiting=waiting))[0] == "held"
    claimed = await partition.claim(waiting)
    assert await partition.finish(waiting, claimed[1], "confirmed") == ["done", "CONFIRMED"]
    await partition.lend(2, "b", units=9)


async def test_the_flusher_writes_transfers_and_the_audit_agrees(shop: Bench) -> None:
    service, partition = shop.service, await partition_in(shop)
    audit = CounterAudit(service.sale_store, service.sql, service.outbox, clock=service.clock)
    await with_transfers(partition)
    behind = await audit.compare(partition.id)
    assert (behind.ok, behind.problems) == (True, ())
    assert behind.lag > 0
    await shop.flush(partition.id)
    assert shop.alarms == []
    report = await audit.compare(partition.id)
    assert (report.ok, report.lag) == (True, 0)
    fold = await service.sql.sales.counters(partition.id)
    assert fold is not None
    assert fold.skus == {
        "a": SkuFold(total=10, available=8, held=0, confirming=0, sold=2),
        "b": SkuFold(total=0, available=0, held=0, confirming=0, sold=0),
    }
    row = await service.sql.sales.get(partition.id)
    assert row is not None
    version = await partition.connections.command("HGET", partition.keys.sale, "version")
    assert row.version == int(version) == 5


async def test_the_model_follows_the_events_of_transfers(shop: Bench) -> None:
    partition = await partition_in(shop)
    await with_transfers(partition)
    await shop.flush(partition.id)
    state = SaleState()
    for event in await shop.service.sql.events.list_after(partition.id, 0, 100):
        state.follow(event.seq, event.event, event.order_id, event.at_ms, event.data, event.chain)
        state.apply(event.event, event.order_id, event.at_ms, event.data)
    assert state.items["a"].row == await partition.stock("a")
    assert state.items["b"].row == await partition.stock("b")
    assert state.transfers == {
        ("lent", 1, "a"): (1, 4),
        ("lent", 2, "b"): (1, 5),
        ("received", 2, "a"): (3, 4),
    }
