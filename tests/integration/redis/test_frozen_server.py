"""A frozen server: a call that waited for it has no effect once its deadline has passed.

A stopped process refuses nothing: the requests lie in its socket and run when
it resumes, long after the caller got an answer. `not_after` keeps them from taking effect.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress

import pytest

from reservation.adapters.redis import client as connection
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.prepare_queue import PrepareQueue, Replayed
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.domain.errors import ReservationError, Unavailable
from reservation.domain.ids import OrderIds
from reservation.domain.payment import Claimed, Present
from reservation.domain.rate_limit import BuyerLimits
from reservation.domain.reservation import Basket, Reservation
from reservation.domain.states import Status
from tests.support.lua_sale import EPOCH, NOW, LuaSale, plain_wish
from tests.support.valkey import MakeServer

IDS = OrderIds(b"k" * 32)
#: A quarter of the real ones, so that a stop of a second is longer than both.
NOT_AFTER_MS, SOCKET_TIMEOUT_SECONDS, STOP_SECONDS = 500, 0.7, 1.0
#: A busy machine may itself be later than `not_after`; then the buyer retries.
TRIES_MAX = 20


class Bench:
    """A queue and a store in front of their own server."""

    def __init__(self, server: EmbeddedServer, connections: RedisClient) -> None:
        self.server, self.connections = server, connections
        self.sale = LuaSale(connections)
        self.store = ReservationStore(connections, Keys(), clock=NOW)
        self.queue = PrepareQueue(
            connections, Keys(), expiry=self.store.expiry, clock=NOW, limits=BuyerLimits()
        )

    async def prepare(self, buyer: str) -> Reservation | Replayed | ReservationError:
        """The decision, or the refusal as a value."""
        order_id = IDS.order_id(sale_id=self.sale.id, buyer_id=buyer, idempotency_key="k")
        basket = Basket(
            sale_id=self.sale.id, order_id=order_id, buyer_id=buyer, wish=plain_wish(("a", 1))
        )
        try:
            return await self.queue.prepare(basket, epoch=EPOCH)
        except ReservationError as refusal:
            return refusal

    async def hold(self, buyer: str) -> Reservation:
        """The final hold of a buyer that retries after each "not now"."""
        for _ in range(TRIES_MAX):
            found = await self.prepare(buyer)
            if isinstance(found, Reservation):
                return found
            assert isinstance(found, Unavailable)
        raise AssertionError("the machine is too busy to test anything")

    async def claim(self, held: Reservation) -> Claimed | Present:
        """The claim of a success page that is loaded again after each "not now"."""
        for _ in range(TRIES_MAX):
            with suppress(Unavailable):
                return await self.store.claim(held, epoch=EPOCH, payment_key="pk", lease_ms=60_000)
        raise AssertionError("the machine is too busy to test anything")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        pid = self.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
async def bench(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(connection, "NOT_AFTER_MS", NOT_AFTER_MS)
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", SOCKET_TIMEOUT_SECONDS)
    server = make_server("frozen")
    await server.start()
    connections = RedisClient(server.url, clock=NOW)
    await connections.measure_offset()
    made = Bench(server, connections)
    await made.sale.put()
    yield made
    await made.queue.aclose()
    await made.sale.check()
    await connections.aclose()


async def test_a_short_stop_of_the_server_is_waited_out(bench: Bench) -> None:
    with bench.frozen():
        wish = asyncio.create_task(bench.prepare("one"))
        await asyncio.sleep(0.05)
    assert isinstance(await wish, Reservation)


async def test_a_prepare_executed_too_late_holds_nothing(bench: Bench) -> None:
    """Five buyers call a server that is frozen for longer than any of them waits."""
    with bench.frozen():
        wishes = [asyncio.create_task(bench.prepare(f"b{n}")) for n in range(5)]
        # Past `not_after` and past the socket's own limit: the calls lie in the server's socket.
        await asyncio.sleep(STOP_SECONDS)
        assert not any(wish.done() for wish in wishes), "an outcome was reported while uncertain"
    found = await asyncio.gather(*wishes)
    assert [type(one) for one in found] == [Unavailable] * 5
    assert await bench.sale.stock("a") == (10, 10, 0, 0)
    await bench.hold("b0")
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


async def test_a_reply_in_flight_is_received_after_the_stop(bench: Bench) -> None:
    """The server ran the script, and was stopped before the client read the reply."""
    await bench.hold("one")
    with bench.frozen():
        again = asyncio.create_task(bench.prepare("one"))
        await asyncio.sleep(STOP_SECONDS)
    # The call that took it is unknown by now: the hold is shown as it is, never as new.
    assert isinstance(await again, Replayed)
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


async def test_a_claim_during_a_stop_is_made_once(bench: Bench) -> None:
    held = await bench.hold("one")
    with bench.frozen():
        claim = asyncio.create_task(bench.claim(held))
        await asyncio.sleep(STOP_SECONDS)
    claimed = await claim
    assert isinstance(claimed, Claimed)
    assert claimed.fence == 1
    existing = await bench.store.read(held.order_id)
    assert existing is not None
    assert (existing.status, existing.fence) == (Status.CONFIRMING, 1)
