"""The key of each master of a cluster, by hand-made slot maps."""

import pytest

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.cluster import ClusterClient
from reservation.adapters.redis.cluster_slots import SLOTS, Shard, Slots, slot_of
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.vouches import Vouches
from reservation.domain.clock import SystemClock

HALF = SLOTS // 2


def cluster_of(**ranges: tuple[tuple[int, int], ...]) -> ClusterClient:
    """A client with these masters, by their ranges of slots."""
    client = ClusterClient("redis+cluster://127.0.0.1:1", clock=SystemClock())
    learn(client, **ranges)
    return client


def learn(client: ClusterClient, **ranges: tuple[tuple[int, int], ...]) -> None:
    shards = tuple(
        Shard(name, ("127.0.0.1", port), slots)
        for port, (name, slots) in enumerate(ranges.items(), start=2)
    )
    client._learn(Slots(shards=shards, epoch=1, is_ok=True))


def master(client: ClusterClient, name: str) -> RedisClient:
    return next(node for node in client.nodes if node.identity == name)


async def test_a_master_has_a_key_in_its_own_slots() -> None:
    client = cluster_of(low=((0, HALF - 1),), high=((HALF, SLOTS - 1),))
    for name, slots in (("low", range(HALF)), ("high", range(HALF, SLOTS))):
        key = client.key_at(master(client, name), "rsv:acks")
        assert key is not None
        assert slot_of(key) in slots
    await client.aclose()


async def test_a_master_of_one_slot_has_a_key() -> None:
    client = cluster_of(one=((7, 7),), rest=((0, 6), (8, SLOTS - 1)))
    key = client.key_at(master(client, "one"), "rsv:acks")
    assert key is not None
    assert slot_of(key) == 7
    await client.aclose()


async def test_a_master_without_slots_has_no_key() -> None:
    client = cluster_of(empty=(), all=((0, SLOTS - 1),))
    assert client.key_at(master(client, "empty"), "rsv:acks") is None
    await client.aclose()


async def test_a_key_follows_the_slots_of_its_master() -> None:
    client = cluster_of(low=((0, HALF - 1),), high=((HALF, SLOTS - 1),))
    low = master(client, "low")
    before = client.key_at(low, "rsv:acks")
    learn(client, low=((HALF, SLOTS - 1),), high=((0, HALF - 1),))
    after = client.key_at(low, "rsv:acks")
    assert before is not None
    assert after is not None
    assert slot_of(before) < HALF <= slot_of(after)
    learn(client, low=(), high=((0, SLOTS - 1),))
    assert client.key_at(low, "rsv:acks") is None
    await client.aclose()


async def test_the_records_of_all_masters_with_slots_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = cluster_of(empty=(), all=((0, SLOTS - 1),))
    sent: list[tuple[str | int | bytes, ...]] = []

    async def record(*parts: str | int | bytes) -> None:
        sent.append(parts)

    monkeypatch.setattr(client, "command", record)
    await Vouches(client, Keys()).forget()
    assert sent == [("DEL", client.key_at(master(client, "all"), Keys().vouched))]
    await client.aclose()
