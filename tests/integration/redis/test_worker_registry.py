"""The list of workers on a real server: damaged entries, and a key of another type."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.errors import UnexpectedReply
from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.adapters.redis.worker_registry import WorkerEntry, WorkerRegistry
from reservation.workers.runner import Worker
from tests.support.in_process import Bench, bench


@pytest.fixture
async def shop(tmp_path: Path, own_server: EmbeddedServer) -> AsyncIterator[Bench]:
    async with bench(tmp_path, own_server.url) as made:
        yield made


def registry_of(shop: Bench, name: str) -> WorkerRegistry:
    connections, keys = shop.service.connections, shop.service.keys
    return WorkerRegistry(connections, keys, Heartbeat(connections, keys, name=name, role="worker"))


async def test_each_worker_reads_its_own_entry_and_those_of_the_others(shop: Bench) -> None:
    first, second = registry_of(shop, "one"), registry_of(shop, "two")
    await first.beat(1, ["expire"])
    both = {"one": WorkerEntry(beat=1, unable=("expire",)), "two": WorkerEntry(beat=2)}
    assert await second.beat(2, []) == both
    assert await first.read() == both
    await second.leave()
    assert set(await first.read()) == {"one"}
    found = await shop.service.connections.command("HMGET", "rsv:proc:one", "role", "unable")
    assert found == ["worker", "expire"]


@pytest.mark.parametrize("text", ["", "{}", "[]", "text", b"\xff", '{"beat":"now"}'])
async def test_an_unreadable_entry_hides_no_other(shop: Bench, text: str | bytes) -> None:
    await shop.service.connections.command("HSET", "rsv:workers", "damaged", text)
    assert await registry_of(shop, "one").beat(1, []) == {"one": WorkerEntry(beat=1)}


async def test_an_entry_of_a_later_release_is_read(shop: Bench) -> None:
    text = msgspec.json.encode({"beat": 5, "unable": ["dance"], "level": 3}).decode()
    await shop.service.connections.command("HSET", "rsv:workers", "later", text)
    entries = await registry_of(shop, "one").read()
    assert entries == {"later": WorkerEntry(beat=5, unable=("dance",))}


async def test_a_worker_without_a_list_serves_all_sales(shop: Bench) -> None:
    sale_id = await shop.sale()
    await shop.service.connections.command("SET", "rsv:workers", "text")
    worker = Worker(shop.service)
    with pytest.raises(UnexpectedReply):
        await worker._registry.beat(1, [])
    await worker._list_sales()
    assert sale_id in worker._rounds


async def test_two_workers_take_new_sales_by_their_shares(shop: Bench) -> None:
    """And leave those that are no longer listed."""
    workers = [Worker(shop.service, name) for name in ("one", "two")]
    for worker in (*workers, *workers):
        worker._rounds._looked_at = float("inf")
        await worker._keep_share()
    sale_ids = [await shop.sale() for _ in range(20)]
    for worker in workers:
        await worker._list_sales()
    served = [sale_id for worker in workers for sale_id in worker._rounds]
    assert sorted(served) == sorted(sale_ids)
    assert all(len(worker._rounds) for worker in workers)
    await shop.service.connections.command("SREM", "rsv:sales", *sale_ids[:19])
    for worker in workers:
        await worker._list_sales()
    assert [sale_id for worker in workers for sale_id in worker._rounds] == sale_ids[19:]
