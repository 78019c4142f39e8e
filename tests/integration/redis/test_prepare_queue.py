"""Group commit: order, growth and lost replies, behind a proxy that drops messages."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import structlog.testing

from reservation.adapters.redis import client as connection
from reservation.adapters.redis import overdue
from reservation.adapters.redis import prepare_queue as batch
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import StoreUnavailable, UnexpectedReply
from reservation.adapters.redis.expiry import Ended, Expiry
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.prepare_queue import (
    WAITING_SECONDS_MAX,
    PrepareQueue,
    Replayed,
)
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.domain.clock import SystemClock
from reservation.domain.errors import (
    IdempotencyKeyReused,
    OutcomeUnknown,
    SaleRecovering,
    SoldOut,
    Unavailable,
)
from reservation.domain.ids import OrderIds
from reservation.domain.rate_limit import BuyerLimits
from reservation.domain.reservation import Basket, Reservation
from tests.support.lua_sale import EPOCH, NOW, LuaSale, plain_wish
from tests.support.proxy import LossyProxy, lossy_proxy

IDS = OrderIds(b"k" * 32)


class End(Protocol):
    """`Expiry.end`."""

    async def __call__(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> Ended: ...


class Ending:
    """The store's expiry, with another `end`."""

    def __init__(self, expiry: Expiry, end: End) -> None:
        self.overdue, self.end = expiry.overdue, end


class Bench:
    """A queue for a sale, behind the proxy; the tests reach the sale itself directly."""

    def __init__(self, sale: LuaSale, proxy: LossyProxy, connections: RedisClient) -> None:
        self.sale, self.proxy, self.connections = sale, proxy, connections
        self.store = ReservationStore(connections, Keys(), clock=NOW)
        self.queue = PrepareQueue(
            connections, Keys(), expiry=self.store.expiry, clock=NOW, limits=BuyerLimits()
        )

    def ending(self, end: End) -> None:
        """Replace the queue by one that ends overdue holds in this way."""
        expiry = Ending(self.store.expiry, end)
        self.queue = PrepareQueue(
            self.connections, Keys(), expiry=expiry, clock=NOW, limits=BuyerLimits()
        )

    def basket(self, buyer: str, sku: str = "a", quantity: int = 1) -> Basket:
        order_id = IDS.order_id(sale_id=self.sale.id, buyer_id=buyer, idempotency_key="k")
        return Basket(
            sale_id=self.sale.id,
            order_id=order_id,
            buyer_id=buyer,
            wish=plain_wish((sku, quantity)),
        )

    async def prepare(self, buyer: str, sku: str = "a", quantity: int = 1) -> object:
        """The decision, or the refusal as a value."""
        wish = self.queue.prepare(self.basket(buyer, sku, quantity), epoch=EPOCH)
        [found] = await asyncio.gather(wish, return_exceptions=True)
        return found


class AdjustableClock(SystemClock):
    """A clock that advances only by hand."""

    seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


class Gate:
    """Blocks the calls of a queue, counts their baskets and lets them through on demand."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        #: The number of baskets of each call.
        self.sizes: list[int] = []
        self.open = asyncio.Event()
        self._call = bench.connections.call
        monkeypatch.setattr(bench.connections, "call", self)

    async def __call__(self, script: Any, keys: Any, args: Any, **how: Any) -> Any:
        if script.name == "prepare":
            self.sizes.append(int(args[12]))
            await self.open.wait()
        return await self._call(script, keys, args, **how)


async def until(seen: Callable[[], bool]) -> None:
    """Wait for the effect of other tasks."""
    async with asyncio.timeout(30):
        while not seen():  # noqa: ASYNC110 - no event to wait for
            await asyncio.sleep(0.001)


@pytest.fixture
async def bench(
    valkey_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    # The wait on a busy machine must not count as an overload.
    monkeypatch.setattr(batch, "WAITING_SECONDS_MAX", 30.0)
    direct = RedisClient(valkey_url, clock=NOW)
    sale = LuaSale(direct)
    await sale.put()
    async with lossy_proxy(valkey_url, tmp_path / "proxy.sock") as proxy:
        connections = RedisClient(proxy.url, clock=NOW)
        await connections.measure_offset()
        yield Bench(sale, proxy, connections)
        await connections.aclose()
    await sale.check()
    await direct.aclose()


async def test_five_hundred_buyers_get_exactly_ten_units(bench: Bench) -> None:
    found = await asyncio.gather(*(bench.prepare(f"b{n}") for n in range(500)))
    assert Counter(type(one).__name__ for one in found) == {"Reservation": 10, "SoldOut": 490}
    assert all(isinstance(one, Reservation) for one in found[:10]), "in order of arrival"


async def test_twenty_concurrent_uses_of_a_key_make_one_order(bench: Bench) -> None:
    found = await asyncio.gather(*(bench.prepare("one") for _ in range(20)))
    assert Counter(type(one) for one in found) == {Reservation: 1, Replayed: 19}
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


async def test_a_call_executed_too_late_is_logged_and_holds_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.connections, "not_after_ms", lambda _: 1)
    with structlog.testing.capture_logs() as lines:
        found = await bench.prepare("b1")
    assert isinstance(found, Unavailable)
    assert await bench.sale.stock("a") == (10, 10, 0, 0)
    assert [line["event"] for line in lines] == ["prepare_too_late"]


async def test_a_later_use_of_a_key_replays_or_refuses_another_body(
    bench: Bench,
) -> None:
    assert isinstance(await bench.prepare("one"), Reservation)
    assert isinstance(await bench.prepare("one"), Replayed)
    assert isinstance(await bench.prepare("one", quantity=2), IdempotencyKeyReused)
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


async def test_a_lone_basket_is_sent_at_once_and_later_ones_in_the_next_call(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(bench, monkeypatch)
    first = asyncio.create_task(bench.prepare("first"))
    await until(lambda: gate.sizes == [1])
    later = [asyncio.create_task(bench.prepare(f"later-{n}")) for n in range(12)]
    await asyncio.sleep(0)
    assert gate.sizes == [1], "one call at a time"
    gate.open.set()
    found = await asyncio.gather(first, *later)
    assert gate.sizes == [1, 12]
    assert [type(one).__name__ for one in found] == ["Reservation"] * 10 + ["SoldOut"] * 3


async def test_a_call_carries_at_most_its_bound(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(bench, monkeypatch)
    gate.open.set()
    monkeypatch.setattr(batch, "BASKETS_MAX", 5)
    found = await asyncio.gather(*(bench.prepare(f"b{n}") for n in range(12)))
    assert gate.sizes == [5, 5, 2]
    assert [type(one).__name__ for one in found] == ["Reservation"] * 10 + ["SoldOut"] * 2


async def test_a_basket_waiting_for_expired_holds_precedes_later_ones(
    bench: Bench,
) -> None:
    """While the overdue holds expire, a newer request needs the same units."""
    old = await bench.sale.hold("old", lines={"b": 5})
    await bench.sale.run_out(old)
    newer: list[asyncio.Task[object]] = []

    async def end(sale_id: str, order_ids: Sequence[str], *, epoch: str) -> Ended:
        newer.append(asyncio.create_task(bench.prepare("newer", "b", 5)))
        await asyncio.sleep(0)
        return await bench.store.expiry.end(sale_id, order_ids, epoch=epoch)

    bench.ending(end)
    assert isinstance(await bench.prepare("first", "b", 5), Reservation)
    [found] = await asyncio.gather(*newer)
    assert isinstance(found, SoldOut)


@pytest.mark.parametrize("failure", [None, StoreUnavailable("away"), SoldOut()])
async def test_unreleasable_holds_do_not_block_the_queue(
    bench: Bench, failure: Exception | None
) -> None:
    old = await bench.sale.hold("old", lines={"b": 5})
    await bench.sale.run_out(old)
    asked = 0

    async def end(sale_id: str, order_ids: Sequence[str], *, epoch: str) -> Ended:
        nonlocal asked
        asked += 1
        if failure:
            raise failure
        return Ended()

    bench.ending(end)
    found = await asyncio.gather(bench.prepare("first", "b"), bench.prepare("second", "a"))
    assert [type(one) for one in found] == [Unavailable, Reservation]
    assert asked == overdue.ROUNDS_MAX
    assert isinstance(await bench.prepare("third", "a"), Reservation)


async def test_an_error_during_expiry_leaves_no_basket_waiting(bench: Bench) -> None:
    old = await bench.sale.hold("old", lines={"b": 5})
    await bench.sale.run_out(old)

    async def end(sale_id: str, order_ids: Sequence[str], *, epoch: str) -> Ended:
        raise UnexpectedReply("a script's own check")

    bench.ending(end)
    async with asyncio.timeout(30):
        found = await asyncio.gather(bench.prepare("first", "b"), bench.prepare("second", "a"))
    assert [type(one) for one in found] == [Unavailable, Reservation]


@pytest.mark.parametrize("damage", ["status", "items", "gone"])
async def test_a_damaged_overdue_hold_is_skipped(bench: Bench, damage: str) -> None:
    """Its units are lost until a repair, and every other basket is decided without it."""
    old = await bench.sale.hold("old", lines={"b": 5})
    await bench.sale.run_out(old)
    key = bench.sale.keys.order(old["order"])
    command = {
        "status": ("HSET", key, "status", "CONFIRMED"),
        "items": ("HSET", key, "items", "[["),
        "gone": ("DEL", key),
    }[damage]
    await bench.sale.connections.command(*command)
    rounds = Rounds(bench)
    async with asyncio.timeout(20):
        found = await asyncio.gather(
            bench.prepare("first", "b"), bench.prepare("second", "b"), bench.prepare("third", "a")
        )
        assert [type(one) for one in found] == [SoldOut, SoldOut, Reservation]
        assert rounds.named == [old["order"]]
        assert isinstance(await bench.prepare("fourth", "b"), SoldOut)
    assert rounds.named == [old["order"]], "it is not tried again for each basket"


async def test_a_damaged_hold_is_retried_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator has repaired it meanwhile."""
    old = await bench.sale.hold("old", lines={"b": 5})
    await bench.sale.run_out(old)
    key = bench.sale.keys.order(old["order"])
    await bench.sale.connections.command("HSET", key, "status", "CONFIRMED")
    assert isinstance(await bench.prepare("first", "b"), SoldOut)
    await bench.sale.connections.command("HSET", key, "status", "HELD")
    assert isinstance(await bench.prepare("second", "b"), SoldOut)
    monkeypatch.setattr(bench.queue._overdue, "_monotonic", lambda: float("inf"))
    assert isinstance(await bench.prepare("third", "b"), Reservation)


async def test_damaged_holds_do_not_hide_a_sound_one(bench: Bench) -> None:
    """More of them than a script names at once are due before it."""
    whole = await leave_overdue(bench.sale, 201)
    Rounds(bench)
    damaged = await bench.store.due(bench.sale.id, 201)
    await run_out_last(bench.sale, whole)
    await bench.sale.connections.pipeline(
        [("HSET", bench.sale.keys.order(one), "status", "CONFIRMED") for one in damaged]
    )
    assert isinstance(await bench.prepare("late", "b"), Reservation)


class Rounds:
    """Expires overdue holds, and keeps the calls."""

    def __init__(self, bench: Bench) -> None:
        self.count = 0
        #: The orders of all calls.
        self.named: list[str] = []
        # The proxy passes on no message of more than 64 KB.
        direct = bench.sale.connections
        self._expiry = ReservationStore(direct, Keys(), clock=NOW).expiry
        self.overdue = self._expiry.overdue
        bench.queue = PrepareQueue(direct, Keys(), expiry=self, clock=NOW, limits=BuyerLimits())

    async def end(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> Ended:
        self.count += 1
        self.named += order_ids
        return await self._expiry.end(sale_id, order_ids, epoch=epoch)


async def leave_overdue(sale: LuaSale, count: int) -> dict[str, Any]:
    """No worker runs, and this many holds of `a` are due; the returned one, of all `b`, is not."""
    await sale.put(
        version=1, digest="d2", items=[("a", "A", 1000, 2 * count, 3), ("b", "B", 500, 5, 5)]
    )
    old = [sale.basket(f"old-{number}") for number in range(count)]
    for start in range(0, count, 100):
        await sale.prepare(*old[start : start + 100])
    past = str(NOW.now_ms() - 10_000)
    edits = [("ZADD", sale.keys.deadlines, past, one["order"]) for one in old]
    edits += [("HSET", sale.keys.order(one["order"]), "expires_at", past) for one in old]
    await sale.connections.pipeline(edits)
    return await sale.hold("has-b", lines={"b": 5})


async def test_a_basket_waiting_for_other_items_delays_others_by_one_round(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await leave_overdue(bench.sale, 200 * (overdue.ROUNDS_MAX + 2))
    Rounds(bench)
    asks = Counter[str]()
    call = bench.sale.connections.call

    async def note(script: Any, keys: Any, args: Any, **how: Any) -> Any:
        if script.name == "prepare":
            asks.update(keys)
        return await call(script, keys, args, **how)

    monkeypatch.setattr(bench.sale.connections, "call", note)
    #: Per answer: its kind, and the number of calls at that time.
    served: list[tuple[str, int]] = []
    overload_refusal: list[tuple[str, int]] = []

    def ask(buyer: str, sku: str, outcomes: list[tuple[str, int]]) -> None:
        basket = bench.basket(buyer, sku)
        order = bench.sale.keys.order(basket.order_id)
        bench.queue.submit(
            basket,
            epoch=EPOCH,
            done=lambda found: outcomes.append((type(found).__name__, asks[order])),
        )

    for wave in range(10):
        # Each begins with buyers that must wait.
        for number in range(3):
            ask(f"waits-{wave}-{number}", "b", overload_refusal)
        for number in range(30):
            ask(f"other-{wave}-{number}", "a", served)
        await until(lambda: len(served) % 30 == 0 and len(served) > 30 * wave)  # noqa: B023 - awaited here
    await until(lambda: len(overload_refusal) == 30)
    assert {kind for kind, _ in served} == {"HoldCreated"}
    assert max(count for _, count in served) <= 2, "once more behind one round"
    assert {kind for kind, _ in overload_refusal} == {"SoldOut"}
    # One call before the rounds of its own, behind another basket, and one after them.
    assert max(count for _, count in overload_refusal) <= overdue.ROUNDS_MAX + 2


async def test_a_basket_that_joins_each_round_late_is_decided_within_its_rounds(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer basket begins each round, and this one joins it after its search."""
    await leave_overdue(bench.sale, 10)
    outcomes: list[str] = []
    late = bench.basket("late", "b")
    calls = Counter[str]()
    is_open = asyncio.Event()
    call = bench.sale.connections.call

    async def hold_back(script: Any, keys: Any, args: Any, **how: Any) -> Any:
        if script.name == "prepare":
            calls.update(keys)
            await is_open.wait()
        return await call(script, keys, args, **how)

    monkeypatch.setattr(bench.sale.connections, "call", hold_back)

    def submit(basket: Basket) -> str:
        bench.queue.submit(
            basket,
            epoch=EPOCH,
            done=lambda found: outcomes.append(type(found).__name__) if basket is late else None,
        )
        return bench.sale.keys.order(basket.order_id)

    rounds = Rounds(bench)

    async def end(sale_id: str, order_ids: Sequence[str], *, epoch: str) -> Ended:
        """Free no unit of `b`, and return while the call of a newer basket is in progress."""
        rounds.count += 1
        if outcomes:
            return await Rounds.end(rounds, sale_id, order_ids, epoch=epoch)
        if rounds.count == 1:
            submit(late)
            return Ended(expired=1)
        queue = bench.queue._queues[sale_id, epoch]
        await until(lambda: queue.task is None)
        is_open.clear()
        newer = submit(bench.basket(f"newer-{rounds.count}", "b"))
        await until(lambda: calls[newer] > 0)
        is_open.set()
        return Ended(expired=1)

    monkeypatch.setattr(rounds, "end", end)
    is_open.set()
    submit(bench.basket("first", "b"))
    await until(lambda: bool(outcomes))
    assert outcomes == ["SoldOut"]
    assert calls[bench.sale.keys.order(late.order_id)] <= overdue.ROUNDS_MAX + 2
    await bench.queue.aclose()


async def test_a_basket_is_refused_after_its_maximum_of_rounds(bench: Bench) -> None:
    await leave_overdue(bench.sale, 200 * (overdue.ROUNDS_MAX + 2))
    rounds = Rounds(bench)
    assert isinstance(await bench.prepare("late", "b"), SoldOut)
    assert rounds.count == overdue.ROUNDS_MAX
    assert await bench.sale.connections.command("ZCARD", bench.sale.keys.deadlines) == 401


async def run_out_last(sale: LuaSale, basket: dict[str, Any]) -> None:
    """Let this hold's deadline pass, after those of `leave_overdue`."""
    past = str(NOW.now_ms() - 1_000)
    await sale.connections.command("ZADD", sale.keys.deadlines, past, basket["order"])
    await sale.connections.command("HSET", sale.keys.order(basket["order"]), "expires_at", past)


async def test_no_basket_is_refused_while_an_overdue_hold_has_its_item(bench: Bench) -> None:
    """More overdue holds of another item than the rounds end come before it."""
    last = await leave_overdue(bench.sale, 200 * (overdue.ROUNDS_MAX + 2))
    await run_out_last(bench.sale, last)
    rounds = Rounds(bench)
    assert isinstance(await bench.prepare("late", "b"), Reservation)
    assert rounds.count <= overdue.ROUNDS_MAX
    assert (await bench.sale.order(last))["status"] == "EXPIRED"


async def test_own_overdue_holds_delay_a_limit_refusal(
    bench: Bench,
) -> None:
    """They are more than the rounds end."""
    count = 200 * (overdue.ROUNDS_MAX + 1)
    await bench.sale.put(
        version=1, digest="d2", items=[("a", "A", 1000, count, count), ("b", "B", 500, 5, 5)]
    )
    own = [bench.sale.basket("ann") for _ in range(count)]
    for start in range(0, count, 100):
        await bench.sale.prepare(*own[start : start + 100])
    past = str(NOW.now_ms() - 10_000)
    await bench.sale.connections.pipeline(
        [("ZADD", bench.sale.keys.deadlines, past, one["order"]) for one in own]
    )
    Rounds(bench)
    assert isinstance(await bench.prepare("ann", "a", count), Reservation)


async def test_sales_do_not_wait_for_each_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call at a time for each sale: a queue that is stuck does not block the others."""
    gate = Gate(bench, monkeypatch)
    stuck = asyncio.create_task(bench.prepare("first"))
    await until(lambda: gate.sizes == [1])
    elsewhere = bench.queue.prepare(bench.basket("second"), epoch="another epoch")
    other = asyncio.create_task(elsewhere)
    await until(lambda: gate.sizes == [1, 1])
    gate.open.set()
    assert isinstance(await stuck, Reservation)
    with pytest.raises(SaleRecovering):
        await other


async def test_a_damaged_buyer_gets_outcome_unknown_and_others_are_served(
    bench: Bench,
) -> None:
    command = bench.sale.connections.command
    key = bench.sale.keys.buyer("broken")
    for damage in (("SET", key, "not a hash"), ("HSET", key, "a", "no count")):
        await command("DEL", key)
        await command(*damage)
        with structlog.testing.capture_logs() as lines:
            found = await asyncio.gather(
                *(bench.prepare(f"{name} {damage[0]}") for name in ("good", "behind")),
                bench.prepare("broken"),
                bench.prepare(f"last {damage[0]}"),
            )
        names = [type(one).__name__ for one in found]
        assert names == ["Reservation", "Reservation", "OutcomeUnknown", "Reservation"]
        assert [line["alarm"] for line in lines if "alarm" in line] == ["broken_invariant"]
    await command("DEL", key)
    assert isinstance(await bench.prepare("broken"), Reservation)
    assert await bench.sale.stock("a") == (10, 3, 7, 0)


async def test_overdue_holds_are_released_before_newer_baskets(
    bench: Bench,
) -> None:
    old = [await bench.sale.hold(f"old-{n}", lines={"b": 1}) for n in range(5)]
    await bench.sale.run_out(*old)
    found = await asyncio.gather(*(bench.prepare(f"new-{n}", "b", 2) for n in range(4)))
    assert [type(one).__name__ for one in found] == ["Reservation"] * 2 + ["SoldOut"] * 2


async def test_a_lost_reply_is_looked_up_and_reported(bench: Bench) -> None:
    """The hold was taken: the buyer gets it, once, although the reply was lost."""
    bench.proxy.lose_reply = b"lost-buyer"
    found = await bench.prepare("lost-buyer")
    assert isinstance(found, Replayed)
    assert bench.proxy.lost == 1
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


async def test_a_lost_reply_of_a_repeat_is_never_reported_as_a_new_order(bench: Bench) -> None:
    """The order is as old as its first answer, and may have changed since."""
    assert isinstance(await bench.prepare("lost-buyer"), Reservation)
    bench.proxy.lose_reply = b"lost-buyer"
    assert isinstance(await bench.prepare("lost-buyer"), Replayed)
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


async def test_a_lost_request_is_reported_as_certainly_not_held(bench: Bench) -> None:
    """No hold was taken; the answer waits until the server's clock is past `not_after`."""
    bench.proxy.lose_request = b"lost-buyer"
    asked_at = NOW.now_ms()
    found = await bench.prepare("lost-buyer")
    assert isinstance(found, Unavailable)
    assert NOW.now_ms() - asked_at > 1_900
    assert await bench.sale.stock("a") == (10, 10, 0, 0)
    bench.proxy.lose_request = b""
    assert isinstance(await bench.prepare("lost-buyer"), Reservation)


async def test_a_failed_look_up_is_resolved_later_by_the_key(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither "taken" nor "not taken" is certain; a retry under the key gets the true outcome."""
    monkeypatch.setattr(batch, "LOOK_UP_SECONDS", 0.5)
    bench.proxy.lose_reply, bench.proxy.lose_request = b"lost-buyer", b"TIME"
    assert isinstance(await bench.prepare("lost-buyer"), OutcomeUnknown)
    assert bench.proxy.lost >= 2
    bench.proxy.lose_reply = bench.proxy.lose_request = b""
    assert isinstance(await bench.prepare("lost-buyer"), Replayed)
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lost calls become certain after half a second, for tests that do not measure it."""
    monkeypatch.setattr(connection, "NOT_AFTER_MS", 500)


@pytest.mark.usefixtures("brief")
async def test_a_lost_reply_with_another_body_is_reported_as_key_reused(bench: Bench) -> None:
    assert isinstance(await bench.prepare("lost-buyer"), Reservation)
    bench.proxy.lose_reply = b"lost-buyer"
    found = await bench.prepare("lost-buyer", quantity=2)
    assert isinstance(found, IdempotencyKeyReused)
    assert await bench.sale.stock("a") == (10, 9, 1, 0)


@pytest.mark.usefixtures("brief")
async def test_other_prepares_are_served_during_the_look_up_of_a_lost_reply(bench: Bench) -> None:
    bench.proxy.lose_request = b"lost-buyer"
    lost = asyncio.create_task(bench.prepare("lost-buyer"))
    await until(lambda: bench.proxy.lost == 1)
    assert isinstance(await bench.prepare("other"), Reservation)
    assert not lost.done()
    assert isinstance(await lost, Unavailable)


async def test_an_unvouched_server_is_not_used_for_sales(bench: Bench) -> None:
    bench.connections.guard()
    bench.connections.vouch_for("another life of the server")
    assert isinstance(await bench.prepare("one"), Unavailable)
    assert bench.connections.doubted.is_set()
    assert await bench.sale.stock("a") == (10, 10, 0, 0)


async def test_an_absent_server_is_reported_as_certain_at_once(
    bench: Bench, tmp_path: Path
) -> None:
    away = RedisClient(f"unix://{tmp_path / 'nobody.sock'}", clock=NOW)
    queue = PrepareQueue(away, Keys(), expiry=bench.store.expiry, clock=NOW, limits=BuyerLimits())
    with pytest.raises(Unavailable):
        await queue.prepare(bench.basket("one"), epoch=EPOCH)


async def test_prepares_beyond_the_queue_bound_are_refused_as_unavailable(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "WAITING_MAX", 3)
    found = await asyncio.gather(*(bench.prepare(f"b{n}") for n in range(6)))
    names = [type(one).__name__ for one in found]
    assert names == ["Reservation"] * 3 + ["Unavailable"] * 3


async def test_prepares_are_shed_while_the_queues_head_has_waited_too_long(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(bench, monkeypatch)
    under_way = asyncio.create_task(bench.prepare("first"))
    await until(lambda: gate.sizes == [1])
    in_line = asyncio.create_task(bench.prepare("second"))
    monkeypatch.setattr(batch, "WAITING_SECONDS_MAX", -1.0)
    await until(lambda: bench.queue.is_full(bench.sale.id, EPOCH))
    assert not bench.queue.is_full("another", EPOCH), "another sale's line is short"
    assert isinstance(await bench.prepare("newcomer"), Unavailable)
    gate.open.set()
    found = await asyncio.gather(under_way, in_line)
    assert [type(one) for one in found] == [Reservation, Reservation]
    assert not bench.queue.is_full(bench.sale.id, EPOCH)


async def test_prepares_with_too_long_a_wait_are_shed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has not waited yet: the last one's wait is estimated from earlier calls."""
    monkeypatch.setattr(batch, "BASKETS_MAX", 2)
    monkeypatch.setattr(batch, "WAITING_SECONDS_MAX", WAITING_SECONDS_MAX)
    clock = AdjustableClock()
    bench.queue = PrepareQueue(
        bench.connections, Keys(), expiry=bench.store.expiry, clock=clock, limits=BuyerLimits()
    )
    gate = Gate(bench, monkeypatch)
    slow = [asyncio.create_task(bench.prepare(f"slow-{number}")) for number in range(3)]
    await until(lambda: gate.sizes == [2])
    clock.seconds += WAITING_SECONDS_MAX * 0.9
    gate.open.set()
    await asyncio.gather(*slow)
    found = await asyncio.gather(*(bench.prepare(f"b{number}", "b") for number in range(7)))
    names = [type(one).__name__ for one in found]
    assert names == ["Reservation"] * 4 + ["Unavailable"] * 3


@pytest.mark.parametrize(
    ("quantity", "calls_at_each_answer"),
    [
        # None of the first four is answered before the second four have left.
        (1, [("HoldCreated", 3)] * 8),
        # A call that holds nothing is quick: the retries of its buyers fill the next call.
        (99, [("BuyerLimitExceeded", 2)] * 4 + [("BuyerLimitExceeded", 3)] * 4),
    ],
)
async def test_the_next_call_is_sent_before_remaining_results_are_handed_out(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    quantity: int,
    calls_at_each_answer: list[tuple[str, int]],
) -> None:
    monkeypatch.setattr(batch, "ANSWERS_AT_ONCE", 2)
    monkeypatch.setattr(batch, "CALL_TO_ANSWERS_MAX", 1e9)
    monkeypatch.setattr(batch, "BASKETS_MAX", 4)
    seen: list[tuple[str, int]] = []
    gate = Gate(bench, monkeypatch)
    gate.open.set()

    def decided(outcome: object) -> None:
        seen.append((type(outcome).__name__, len(gate.sizes)))

    await bench.prepare("first")
    for number in range(8):
        basket = bench.basket(f"b{number}", quantity=quantity)
        bench.queue.submit(basket, epoch=EPOCH, done=decided)
    await until(lambda: len(seen) == 8)
    assert gate.sizes == [1, 4, 4]
    assert seen == calls_at_each_answer


async def test_a_cancelled_caller_does_not_affect_the_others(bench: Bench) -> None:
    tasks = [asyncio.create_task(bench.prepare(f"b{n}")) for n in range(5)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    held = [one for one in found if isinstance(one, Reservation)]
    assert len(held) == 4


async def test_a_claim_with_a_lost_reply_is_repeated_and_made_once(bench: Bench) -> None:
    held = await bench.prepare("buyer")
    assert isinstance(held, Reservation)
    bench.proxy.lose_reply = b"payment-key"

    async def heal() -> None:
        while not bench.proxy.lost:  # noqa: ASYNC110 - the proxy counts, it sends no event
            await asyncio.sleep(0.01)
        bench.proxy.lose_reply = b""

    claimed, _ = await asyncio.gather(
        bench.store.claim(held, epoch=EPOCH, payment_key="payment-key", lease_ms=60_000), heal()
    )
    assert getattr(claimed, "fence", None) == 1
    assert bench.proxy.lost >= 1


@pytest.mark.parametrize(
    "reply",
    [
        [["no word"]],
        [["held", "1", "1", [], "no items"], 2],
        [["held", "1", "1", [], '[["a",1,1000]]']],
        [["held", "1", "1", [], '[["a",1,1000]]'], ["no word"]],
        [["held", "1", "1", [], '[["a",1,1000]]'], -1],
    ],
    ids=[
        "an unknown word",
        "items that cannot be read",
        "fewer replies than baskets",
        "an unknown word for one basket",
        "sold out as nobody was",
    ],
)
async def test_an_unreadable_reply_fails_each_waiting_caller(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, reply: Any
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        return reply

    monkeypatch.setattr(bench.connections, "call", broken)
    async with asyncio.timeout(30):
        found = await bench.prepare("one")
    assert isinstance(found, OutcomeUnknown)
    # The queue's task has raised its bug to the loop; no other effect may remain.
    monkeypatch.undo()
    assert isinstance(await bench.prepare("two"), Reservation)


async def test_baskets_behind_an_unreadable_reply_are_answered(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        items = '[["a",1,1000]]'
        return [["held", "1", "1", [], items, items], ["no word"], 7]

    monkeypatch.setattr(bench.connections, "call", broken)
    async with asyncio.timeout(30):
        first, second = await asyncio.gather(bench.prepare("one"), bench.prepare("two"))
    assert isinstance(first, OutcomeUnknown)
    assert isinstance(second, Reservation)
    assert second.seq == 7
