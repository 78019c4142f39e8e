"""Group commit: order, growth and lost replies, behind a proxy that loses things."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.domain.errors import Unavailable
from reservation.domain.ids import OrderIds
from reservation.domain.reservation import Basket, Reservation, merge_lines
from reservation.redis import batch
from reservation.redis.batch import PrepareQueue, Replayed
from reservation.redis.connection import Connections
from reservation.redis.keys import Keys
from reservation.redis.store import Store
from tests.fixtures.lua_sale import EPOCH, NOW, LuaSale
from tests.fixtures.proxy import LossyProxy, lossy_proxy

IDS = OrderIds(b"k" * 32)


class Bench:
    """A queue before a sale, behind the proxy; the sale itself is reached directly."""

    def __init__(self, sale: LuaSale, proxy: LossyProxy, connections: Connections) -> None:
        self.sale, self.proxy, self.connections = sale, proxy, connections
        self.store = Store(connections, Keys(), clock=NOW)
        self.queue = PrepareQueue(
            connections, Keys(), expire=self.store.expire, clock=NOW, rate=None
        )

    def basket(self, buyer: str, sku: str = "a", quantity: int = 1) -> Basket:
        return Basket(
            sale_id=self.sale.id,
            order_id=IDS.order_id(sale_id=self.sale.id, buyer_id=buyer, idempotency_key="k"),
            buyer_id=buyer,
            lines=merge_lines([(sku, quantity)]),
            amount={"a": 1000, "b": 500}[sku] * quantity,
            currency="KRW",
            order_name="n",
            name_given=False,
            admitted=False,
        )

    async def prepare(self, buyer: str, sku: str = "a", quantity: int = 1) -> object:
        """The decision, or the refusal as a value."""
        wish = self.queue.prepare(self.basket(buyer, sku, quantity), epoch=EPOCH)
        [found] = await asyncio.gather(wish, return_exceptions=True)
        return found


@pytest.fixture
async def bench(valkey_url: str, tmp_path: Path) -> AsyncIterator[Bench]:
    direct = Connections(valkey_url, clock=NOW)
    sale = LuaSale(direct)
    await sale.put()
    async with lossy_proxy(valkey_url, tmp_path / "proxy.sock") as proxy:
        connections = Connections(proxy.url, clock=NOW)
        await connections.measure_offset()
        yield Bench(sale, proxy, connections)
        await connections.aclose()
    await sale.check()
    await direct.aclose()


async def test_five_hundred_who_want_ten_pieces_get_ten(bench: Bench) -> None:
    found = await asyncio.gather(*(bench.prepare(f"b{n}") for n in range(500)))
    assert Counter(type(one).__name__ for one in found) == {"Reservation": 10, "SoldOut": 490}
    assert all(isinstance(one, Reservation) for one in found[:10]), "in order of arrival"


async def test_the_same_key_twenty_times_at_once_is_one_order(bench: Bench) -> None:
    found = await asyncio.gather(*(bench.prepare("one") for _ in range(20)))
    assert Counter(type(one) for one in found) == {Reservation: 1, Replayed: 19}
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


async def test_holds_that_ran_out_are_given_back_before_anyone_newer_is_served(
    bench: Bench,
) -> None:
    old = [await bench.sale.hold(f"old-{n}", lines={"b": 1}) for n in range(5)]
    await bench.sale.run_out(*old)
    found = await asyncio.gather(*(bench.prepare(f"new-{n}", "b", 2) for n in range(4)))
    assert [type(one).__name__ for one in found] == ["Reservation"] * 2 + ["SoldOut"] * 2


async def test_a_lost_reply_is_looked_up_and_told_as_it_is(bench: Bench) -> None:
    """The hold was taken: the buyer gets it, once, although the answer never came."""
    bench.proxy.lose_reply = b"lost-buyer"
    found = await bench.prepare("lost-buyer")
    assert isinstance(found, Reservation)
    assert bench.proxy.lost == 1
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


async def test_a_lost_request_is_told_as_certainly_not_taken(bench: Bench) -> None:
    """Nothing was taken, and that is said only once the server's clock is past `not_after`."""
    bench.proxy.lose_request = b"lost-buyer"
    asked_at = NOW.now_ms()
    found = await bench.prepare("lost-buyer")
    assert isinstance(found, Unavailable)
    assert NOW.now_ms() - asked_at > 1_900
    assert await bench.sale.stock("a") == (10, 10, 0, 0)
    bench.proxy.lose_request = b""
    assert isinstance(await bench.prepare("lost-buyer"), Reservation)


async def test_a_server_that_is_not_there_is_certain_at_once(bench: Bench, tmp_path: Path) -> None:
    away = Connections(f"unix://{tmp_path / 'nobody.sock'}", clock=NOW)
    queue = PrepareQueue(away, Keys(), expire=bench.store.expire, clock=NOW, rate=None)
    with pytest.raises(Unavailable):
        await queue.prepare(bench.basket("one"), epoch=EPOCH)


async def test_beyond_the_queue_s_bound_the_answer_is_not_now(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "WAITING_MAX", 3)
    found = await asyncio.gather(*(bench.prepare(f"b{n}") for n in range(6)))
    names = [type(one).__name__ for one in found]
    assert names == ["Reservation"] * 3 + ["Unavailable"] * 3


async def test_a_caller_that_leaves_does_not_disturb_the_others(bench: Bench) -> None:
    tasks = [asyncio.create_task(bench.prepare(f"b{n}")) for n in range(5)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    held = [one for one in found if isinstance(one, Reservation)]
    assert len(held) == 4


async def test_a_claim_whose_reply_is_lost_is_asked_again_and_happens_once(bench: Bench) -> None:
    held = await bench.prepare("buyer")
    assert isinstance(held, Reservation)
    bench.proxy.lose_reply = b"payment-key"

    async def heal() -> None:
        while not bench.proxy.lost:  # noqa: ASYNC110 - the proxy counts, it does not tell
            await asyncio.sleep(0.01)
        bench.proxy.lose_reply = b""

    claimed, _ = await asyncio.gather(
        bench.store.claim(held, epoch=EPOCH, payment_key="payment-key", lease_ms=60_000), heal()
    )
    assert getattr(claimed, "fence", None) == 1
    assert bench.proxy.lost >= 1
