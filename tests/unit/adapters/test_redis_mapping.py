"""Mapping of Redis hashes to domain values: no script, no stream, so a fake server is enough."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import fakeredis
import pytest
from fakeredis import FakeAsyncRedis

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_store import SaleStore
from reservation.domain.clock import SystemClock
from reservation.domain.errors import SaleRecovering
from reservation.domain.states import HoldPolicy, SaleStatus, Status

ORDER_ID = "s-" + "A" * 24


@pytest.fixture
async def fake() -> AsyncIterator[FakeAsyncRedis]:
    """An empty server inside this process."""
    server = FakeAsyncRedis(server=fakeredis.FakeServer(), decode_responses=True, protocol=2)
    yield server
    await server.aclose()


@pytest.fixture
def connections(fake: FakeAsyncRedis, monkeypatch: pytest.MonkeyPatch) -> RedisClient:
    """The service's client, connected to that server."""

    async def pipeline(commands: Sequence[Sequence[str | int | bytes]]) -> list[Any]:
        connection = await fake.connection_pool.get_connection()
        try:
            await connection.send_packed_command(connection.pack_commands(commands))
            return [await connection.read_response() for _ in commands]
        finally:
            await fake.connection_pool.release(connection)

    opened = RedisClient("redis://localhost", clock=SystemClock())
    monkeypatch.setattr(opened, "pipeline", pipeline)
    return opened


ORDER: dict[str, Any] = {
    "status": "HELD",
    "buyer": "b",
    "items": '[["a",2,1000]]',
    "amount": "2000",
    "name": "Two",
    "digest": "d",
    "hold": "4",
    "expires_at": "5000",
    "seq": "7",
}
#: The additional fields after a claim.
CLAIM: dict[str, Any] = {
    "status": "CONFIRMING",
    "claimed_at": "2000",
    "updated_at": "2001",
    "fence": "3",
    "attempts": "1",
}


async def test_an_order_is_read_with_its_lines_and_attempts(
    fake: FakeAsyncRedis, connections: RedisClient
) -> None:
    """Every field of the hash maps to a member; `attempt:KEY` fields become the attempts."""
    key = Keys().of("s").order(ORDER_ID)
    await fake.hset(Keys().of("s").sale, "currency", "USD")
    await fake.hset(key, mapping={**ORDER, "attempt:pk": "declined:X", "payment_key": "pk"})
    order = await ReservationStore(connections, Keys(), clock=SystemClock()).read(ORDER_ID)
    assert order is not None
    assert order.currency == "USD"
    assert (order.sale_id, order.status, order.amount, order.seq) == ("s", Status.HELD, 2000, 7)
    assert [(line.sku, line.quantity, line.price) for line in order.lines] == [("a", 2, 1000)]
    assert order.attempts == {"pk": "declined:X"}
    assert order.shown_status(4999) is Status.HELD
    assert order.shown_status(5000) is Status.EXPIRED


async def test_a_missing_order_is_read_as_none(connections: RedisClient) -> None:
    """Neither an id without a hash nor a malformed id."""
    store = ReservationStore(connections, Keys(), clock=SystemClock())
    assert await store.read_many([ORDER_ID, "nonsense"]) == [None, None]


async def test_an_unclaimed_order_has_no_fence_and_keeps_its_change_time(
    fake: FakeAsyncRedis, connections: RedisClient
) -> None:
    """The hash of an open hold omits fields that are equal in all open holds."""
    await fake.hset(Keys().of("s").sale, "currency", "KRW")
    key = Keys().of("s").order(ORDER_ID)
    await fake.hset(key, mapping={**ORDER})
    store = ReservationStore(connections, Keys(), clock=SystemClock())
    order = await store.read(ORDER_ID)
    assert order is not None
    assert (order.fence, order.created_at_ms, order.updated_at_ms) == (0, 1000, 1000)
    await fake.hset(key, mapping={**CLAIM})
    order = await store.read(ORDER_ID)
    assert order is not None
    assert (order.fence, order.created_at_ms, order.updated_at_ms) == (3, 1000, 2001)


async def test_a_claimed_order_without_its_fence_cannot_be_read(
    fake: FakeAsyncRedis, connections: RedisClient
) -> None:
    """Fence 0 could finish another process's payment."""
    await fake.hset(Keys().of("s").sale, "currency", "KRW")
    key = Keys().of("s").order(ORDER_ID)
    claimed: Any = {**ORDER, **CLAIM}
    del claimed["fence"]
    await fake.hset(key, mapping=claimed)
    with pytest.raises(KeyError, match="fence"):
        await ReservationStore(connections, Keys(), clock=SystemClock()).read(ORDER_ID)


async def test_an_order_without_its_sale_raises_sale_recovering(
    fake: FakeAsyncRedis, connections: RedisClient
) -> None:
    """Its currency is lost, and none is guessed."""
    await fake.hset(Keys().of("s").order(ORDER_ID), mapping={**ORDER})
    with pytest.raises(SaleRecovering):
        await ReservationStore(connections, Keys(), clock=SystemClock()).read(ORDER_ID)


async def test_a_virtual_account_stays_open_until_its_due_date(
    fake: FakeAsyncRedis, connections: RedisClient
) -> None:
    """AWAITING_DEPOSIT shows the account's due date, not the hold's old deadline."""
    await fake.hset(Keys().of("s").sale, "currency", "KRW")
    waiting: Any = {**ORDER, **CLAIM, "status": "AWAITING_DEPOSIT", "due_at": "9000"}
    await fake.hset(Keys().of("s").order(ORDER_ID), mapping=waiting)
    order = await ReservationStore(connections, Keys(), clock=SystemClock()).read(ORDER_ID)
    assert order is not None
    assert order.expires_at_ms == 9000


async def test_a_sale_lists_items_in_their_stored_order(
    fake: FakeAsyncRedis, connections: RedisClient
) -> None:
    """The items keep the operator's order."""
    keys = Keys().of("s")
    await fake.hset(
        keys.sale,
        mapping={
            "name": "S",
            "currency": "KRW",
            "opens_at": "1",
            "closes_at": "9",
            "hold_seconds": "60",
            "hold_policy": "prepare",
            "virtual_accounts": "0",
            "require_admission": "1",
            "status": "open",
            "version": "3",
            "epoch": "e",
            "seq": "12",
            "skus": '["z","a"]',
        },
    )
    for sku, available in (("z", "0"), ("a", "0")):
        await fake.hset(
            keys.stock(sku),
            mapping={
                "total": "5",
                "available": available,
                "held": "2",
                "sold": "3",
                "price": "10",
                "limit": "1",
                "name": sku.upper(),
            },
        )
    sale = await SaleStore(connections, Keys()).read("s")
    assert sale is not None
    assert [item.sku for item in sale.items] == ["z", "a"]
    assert (sale.version, sale.hold_policy, sale.require_admission) == (3, HoldPolicy.PREPARE, True)
    shown = [sale.status(now_ms) for now_ms in (0, 1, 9)]
    assert shown == [SaleStatus.SCHEDULED, SaleStatus.SOLD_OUT, SaleStatus.CLOSED]


async def test_a_heartbeat_expires_with_its_process(
    fake: FakeAsyncRedis, connections: RedisClient
) -> None:
    """The heartbeat names its process and lives for three intervals."""
    await Heartbeat(connections, Keys(), name="host-1", role="api").beat()
    assert (await fake.hgetall("rsv:proc:host-1"))["role"] == "api"
    assert 0 < await fake.ttl("rsv:proc:host-1") <= 30
