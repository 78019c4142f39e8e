"""ReservationStore on real servers: each outcome of a script as a value or as its refusal."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import structlog

from reservation.adapters.redis import client as connection
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import UnexpectedReply
from reservation.adapters.redis.expiry import Ended
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_store import SaleStore
from reservation.domain.errors import (
    BuyerLimitExceeded,
    HoldLost,
    IdempotencyKeyReused,
    InsufficientAvailable,
    InvalidSale,
    PreconditionFailed,
    PreconditionRequired,
    ReservationError,
    ReservationExpired,
    SaleClosed,
    SaleRecovering,
    SkuNotFound,
    SoldOut,
    TotalTooLow,
    Unavailable,
)
from reservation.domain.payment import (
    Cause,
    Claimed,
    LeaseElsewhere,
    Outcome,
    PaymentOutcome,
    Present,
    Reason,
)
from reservation.domain.reservation import PAYMENT_ATTEMPTS_MAX, Reservation
from reservation.domain.sale import Item
from reservation.domain.states import SaleStatus, Status
from tests.support.lua_sale import EPOCH, NOW, LuaSale

BUYER = Reason(Cause.BUYER)
CONFIRMED = Outcome(name=PaymentOutcome.CONFIRMED)
DECLINED = Outcome(name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "X"))


class Bench:
    """The stores, and a sale that its scripts fill."""

    def __init__(self, connections: RedisClient) -> None:
        self.connections = connections
        self.sale = LuaSale(connections)
        self.store = ReservationStore(connections, Keys(), clock=NOW)
        self.sales = SaleStore(connections, Keys())

    async def held(self, buyer: str = "buyer", **changes: Any) -> Reservation:
        return await self.read(await self.sale.hold(buyer, **changes))

    async def read(self, basket: dict[str, Any]) -> Reservation:
        found = await self.store.read(basket["order"])
        assert found is not None
        return found

    async def claim(self, order: Reservation, payment_key: str = "pk") -> Claimed | Present:
        return await self.store.claim(order, epoch=EPOCH, payment_key=payment_key, lease_ms=60_000)

    async def claimed(self, order: Reservation, payment_key: str = "pk") -> Claimed:
        found = await self.claim(order, payment_key)
        assert isinstance(found, Claimed)
        return found


@pytest.fixture
async def bench(valkey_url: str) -> AsyncIterator[Bench]:
    connections = RedisClient(valkey_url, clock=NOW)
    await connections.measure_offset()
    made = Bench(connections)
    await made.sale.put()
    yield made
    await made.sale.check()
    await connections.aclose()


async def test_a_payment_goes_from_claim_to_sold(bench: Bench) -> None:
    order = await bench.held(lines={"a": 2, "b": 1})
    claimed = await bench.claimed(order)
    assert claimed.fence == 1
    assert claimed.lease_until_ms > NOW.now_ms()
    assert await bench.store.lease_end(order) == claimed.lease_until_ms
    assert await bench.store.undecided(bench.sale.id) == 1
    finished = await bench.store.finish(order, epoch=EPOCH, fence=1, outcome=CONFIRMED)
    assert (finished.status, finished.applied) == (Status.CONFIRMED, True)
    assert await bench.store.undecided(bench.sale.id) == 0
    assert await bench.store.lease_end(order) is None
    found = await bench.store.read(order.order_id)
    assert found is not None
    assert (found.status, found.attempts) == (Status.CONFIRMED, {"pk": "confirmed"})


async def test_a_repeated_claim_of_an_ended_attempt_gets_its_outcome(bench: Bench) -> None:
    order = await bench.held()
    claimed = await bench.claimed(order)
    assert await bench.claim(order) == Present(Status.CONFIRMING, "")
    await bench.store.finish(order, epoch=EPOCH, fence=claimed.fence, outcome=DECLINED)
    assert await bench.claim(order) == Present(Status.RELEASED, "declined:provider_declined:X")
    assert (await bench.claimed(order, "second card")).fence == 2


async def test_payment_attempts_are_counted_and_limited(bench: Bench) -> None:
    order = await bench.held()
    for number in range(PAYMENT_ATTEMPTS_MAX):
        claimed = await bench.claimed(order, f"card-{number}")
        await bench.store.finish(order, epoch=EPOCH, fence=claimed.fence, outcome=DECLINED)
    with pytest.raises(ReservationExpired, match="no payment attempts left"):
        await bench.claim(order, "one card more")


async def test_a_voided_payment_does_not_count_as_an_attempt(bench: Bench) -> None:
    order = await bench.held()
    forgotten = Outcome(name=PaymentOutcome.VOIDED, reason=Reason(Cause.INTENT_NOT_WRITTEN))
    for _ in range(PAYMENT_ATTEMPTS_MAX + 1):
        claimed = await bench.claimed(order)
        finished = await bench.store.finish(
            order, epoch=EPOCH, fence=claimed.fence, outcome=forgotten
        )
        assert finished.status is Status.HELD


async def test_a_lost_hold_is_refused_as_hold_lost(bench: Bench) -> None:
    late = await bench.held("late", lines={"b": 5})
    await bench.store.release(late, epoch=EPOCH, reason=BUYER)
    await bench.held("quick", lines={"b": 1})
    with pytest.raises(ReservationExpired):
        await bench.claim(late)
    greedy = await bench.held("greedy", lines={"a": 2})
    await bench.store.release(greedy, epoch=EPOCH, reason=BUYER)
    await bench.held("greedy", lines={"a": 2})
    with pytest.raises(BuyerLimitExceeded) as refused:
        await bench.claim(greedy)
    assert refused.value.facts == {"sku": "a", "limit": 3, "taken": 2}


async def test_a_claim_under_the_success_policy_can_be_sold_out(valkey_url: str) -> None:
    connections = RedisClient(valkey_url, clock=NOW)
    bench = Bench(connections)
    await bench.sale.put(hold_policy="success")
    first, second = [await bench.held(name, lines={"b": 3}) for name in ("one", "two")]
    await bench.claimed(first)
    with pytest.raises(SoldOut) as refused:
        await bench.claim(second)
    assert refused.value.facts == {"available": {"b": 2}, "nextDeadline": None}
    await bench.sale.check()
    await connections.aclose()


async def test_a_claim_expires_overdue_holds_before_it_is_refused(bench: Bench) -> None:
    late = await bench.held("late", lines={"b": 5})
    await bench.store.release(late, epoch=EPOCH, reason=BUYER)
    old = [await bench.sale.hold(f"old-{n}", lines={"b": 1}) for n in range(5)]
    await bench.sale.run_out(*old)
    await bench.claimed(late)
    assert await bench.sale.stock("b") == (5, 0, 5, 0)
    assert (await bench.read(old[0])).status is Status.EXPIRED


async def test_an_order_lost_by_redis_is_reported_as_lost(bench: Bench) -> None:
    order = await bench.held()
    lost = msgspec.structs.replace(order, order_id=f"{bench.sale.id}-{'Z' * 24}")
    assert await bench.store.read(lost.order_id) is None
    for change in (
        bench.claim(lost),
        bench.store.finish(lost, epoch=EPOCH, fence=1, outcome=CONFIRMED),
        bench.store.release(lost, epoch=EPOCH, reason=BUYER),
        bench.store.refund(lost, epoch=EPOCH, restock=True, reason=Reason(Cause.OPERATOR)),
        bench.store.take_over(lost, epoch=EPOCH, lease_ms=1),
    ):
        with pytest.raises(HoldLost):
            await change


async def test_another_epoch_is_refused_as_sale_recovering(bench: Bench) -> None:
    order = await bench.held()
    for change in (
        bench.store.claim(order, epoch="other", payment_key="pk", lease_ms=1),
        bench.store.release(order, epoch="other", reason=BUYER),
        bench.store.expire(bench.sale.id, [order.order_id], epoch="other"),
        bench.sales.switch(
            bench.sale.id, epoch="other", status=SaleStatus.PAUSED, operator="o", reason="r"
        ),
    ):
        with pytest.raises(SaleRecovering):
            await change
    assert await bench.read({"order": order.order_id}) == order


async def test_calls_that_are_always_too_late_change_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = await bench.held()
    monkeypatch.setattr(connection, "NOT_AFTER_MS", -60_000)
    with pytest.raises(Unavailable):
        await bench.store.release(order, epoch=EPOCH, reason=BUYER)
    with pytest.raises(Unavailable):
        await bench.claim(order)
    assert await bench.read({"order": order.order_id}) == order


async def test_an_expired_lease_passes_to_one_of_two_processes(bench: Bench) -> None:
    order = await bench.held()
    await bench.store.claim(order, epoch=EPOCH, payment_key="pk", lease_ms=-1)
    order = await bench.read({"order": order.order_id})
    assert await bench.store.leases_over(bench.sale.id, 10) == [order.order_id]
    found = await asyncio.gather(
        *(bench.store.take_over(order, epoch=EPOCH, lease_ms=60_000) for _ in range(2))
    )
    kinds = sorted(type(one).__name__ for one in found)
    assert kinds == ["Claimed", "LeaseElsewhere"]
    assert await bench.store.leases_over(bench.sale.id, 10) == []
    stale = await bench.store.finish(order, epoch=EPOCH, fence=1, outcome=CONFIRMED)
    assert (stale.status, stale.applied) == (Status.CONFIRMING, False)
    after = await bench.store.finish(order, epoch=EPOCH, fence=2, outcome=CONFIRMED)
    assert after.applied


async def test_only_its_owner_can_move_a_lease(bench: Bench) -> None:
    order = await bench.held()
    claimed = await bench.claimed(order)
    await bench.store.move_lease(order, epoch=EPOCH, fence=7, lease_ms=-1)
    assert await bench.store.lease_end(order) == claimed.lease_until_ms
    await bench.store.move_lease(order, epoch=EPOCH, fence=claimed.fence, lease_ms=-1)
    assert await bench.store.leases_over(bench.sale.id, 10) == [order.order_id]
    assert list(await bench.store.first_leases(bench.sale.id, 10)) == [order.order_id]
    still = await bench.read({"order": order.order_id})
    assert isinstance(await bench.store.take_over(still, epoch=EPOCH, lease_ms=1), Claimed)


async def test_a_finished_payment_cannot_be_taken_over(bench: Bench) -> None:
    order = await bench.held()
    await bench.claimed(order)
    claimed = await bench.read({"order": order.order_id})
    await bench.store.finish(order, epoch=EPOCH, fence=1, outcome=CONFIRMED)
    found = await bench.store.take_over(claimed, epoch=EPOCH, lease_ms=1)
    assert found == LeaseElsewhere()


async def test_a_lapsed_virtual_account_is_found(bench: Bench) -> None:
    over, open_ = await bench.held("over"), await bench.held("open")
    for order, due_ms in ((over, NOW.now_ms() - 1), (open_, NOW.now_ms() + 60_000)):
        claimed = await bench.claimed(order, f"pk-{order.buyer_id}")
        outcome = Outcome(name=PaymentOutcome.AWAITING_DEPOSIT, due_ms=due_ms)
        await bench.store.finish(order, epoch=EPOCH, fence=claimed.fence, outcome=outcome)
    assert await bench.store.deposits_over(bench.sale.id, 10) == [over.order_id]
    waiting = await bench.read({"order": over.order_id})
    assert waiting.status is Status.AWAITING_DEPOSIT
    assert waiting.expires_at_ms < NOW.now_ms(), "the account's due date, not the hold's deadline"


async def test_overdue_holds_are_expired_oldest_first(bench: Bench) -> None:
    baskets = [await bench.sale.hold(f"b{n}") for n in range(3)]
    await bench.sale.run_out(*baskets[:2])
    deadlines = await bench.store.first_deadlines(bench.sale.id, 10)
    assert list(deadlines) == sorted(deadlines, key=lambda order_id: deadlines[order_id])
    due = await bench.store.due(bench.sale.id, 10)
    assert set(due) == {basket["order"] for basket in baskets[:2]}
    assert await bench.store.due(bench.sale.id, 1) == due[:1]
    everything = [*due, baskets[2]["order"], f"{bench.sale.id}-{'Z' * 24}"]
    assert await bench.store.expire(bench.sale.id, everything, epoch=EPOCH) == 2
    assert await bench.store.expire(bench.sale.id, everything, epoch=EPOCH) == 0
    assert await bench.store.expire(bench.sale.id, [], epoch=EPOCH) == 0


@pytest.mark.parametrize("damage", ["items", "kind", "status"])
async def test_a_damaged_hold_does_not_block_the_expiry_of_others(
    bench: Bench, damage: str
) -> None:
    """If nothing else is due any more, its corruption is raised."""
    baskets = [await bench.sale.hold(f"b{n}") for n in range(3)]
    await bench.sale.run_out(*baskets)
    due = await bench.store.due(bench.sale.id, 10)
    key = bench.sale.keys.order(due[0])
    for command in {
        "items": [("HSET", key, "items", "[[")],
        "kind": [("DEL", key), ("SET", key, "not what it should be")],
        "status": [("HSET", key, "status", "CONFIRMED")],
    }[damage]:
        await bench.connections.command(*command)
    with structlog.testing.capture_logs() as lines:
        assert await bench.store.expire(bench.sale.id, due, epoch=EPOCH) == 2
    assert [(line["event"], line["order_id"]) for line in lines] == [("holds_damaged", due[0])]
    assert await bench.store.due(bench.sale.id, 10) == due[:1]
    with pytest.raises((UnexpectedReply, msgspec.DecodeError)):
        await bench.store.expire(bench.sale.id, due, epoch=EPOCH)


async def test_a_late_claim_succeeds_after_other_holds_expired(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own call expired none: the reaper was faster, or the reply was lost."""
    order = await bench.held(lines={"b": 5})
    await bench.store.release(order, epoch=EPOCH, reason=BUYER)
    other = await bench.sale.hold("other", lines={"b": 5})
    await bench.sale.run_out(other)
    end = bench.store.expiry.end

    async def too_late(*args: Any, **how: Any) -> Ended:
        assert (await end(*args, **how)).expired == 1
        return await end(*args, **how)

    monkeypatch.setattr(bench.store.expiry, "end", too_late)
    claimed = await bench.store.claim(order, epoch=EPOCH, payment_key="k", lease_ms=60_000)
    assert isinstance(claimed, Claimed)


async def test_a_late_claim_is_refused_if_only_a_damaged_hold_is_overdue(bench: Bench) -> None:
    order = await bench.held(lines={"b": 5})
    await bench.store.release(order, epoch=EPOCH, reason=BUYER)
    other = await bench.sale.hold("other", lines={"b": 5})
    await bench.sale.run_out(other)
    key = bench.sale.keys.order(other["order"])
    await bench.connections.command("HSET", key, "status", "CONFIRMED")
    with pytest.raises(ReservationExpired):
        await bench.store.claim(order, epoch=EPOCH, payment_key="k", lease_ms=60_000)


async def test_a_release_and_a_refund_return_the_current_state(bench: Bench) -> None:
    order = await bench.held()
    assert await bench.store.release(order, epoch=EPOCH, reason=BUYER) is Status.RELEASED
    assert await bench.store.release(order, epoch=EPOCH, reason=BUYER) is Status.RELEASED
    asked = Reason(Cause.OPERATOR, note='a "quoted" reason')
    refund = {"epoch": EPOCH, "restock": True, "reason": asked}
    assert await bench.store.refund(order, **refund) is Status.RELEASED
    sold = await bench.read(await bench.sale.sold("other"))
    assert await bench.store.release(sold, epoch=EPOCH, reason=BUYER) is Status.CONFIRMED
    assert await bench.store.refund(sold, **refund) is Status.REFUNDED
    assert await bench.store.refund(sold, **refund) is Status.REFUNDED


async def test_reservations_of_a_buyer_are_listed_newest_first(bench: Bench) -> None:
    baskets = [await bench.sale.hold() for _ in range(3)]
    await bench.sale.hold("somebody else")
    for number, basket in enumerate(baskets):
        key = bench.sale.keys.buyer_orders("buyer")
        await bench.connections.command("ZADD", key, number, basket["order"])
    found = await bench.store.orders_of_buyer(bench.sale.id, "buyer", 2)
    assert [order.order_id for order in found] == [baskets[2]["order"], baskets[1]["order"]]
    assert await bench.store.orders_of_buyer(bench.sale.id, "nobody", 10) == []
    assert await bench.store.read_many([]) == []


async def test_flushed_scripts_are_loaded_again(bench: Bench) -> None:
    order = await bench.held()
    await bench.connections.command("SCRIPT", "FLUSH")
    assert await bench.store.release(order, epoch=EPOCH, reason=BUYER) is Status.RELEASED


async def test_a_sale_and_its_counters_are_read_unchanged(bench: Bench) -> None:
    await bench.held(lines={"a": 2})
    await bench.sale.sold("payer", lines={"b": 1})
    sale = await bench.sales.read(bench.sale.id)
    assert sale is not None
    rows = {item.sku: (item.total, item.available, item.held, item.sold) for item in sale.items}
    assert rows == {"a": (10, 8, 2, 0), "b": (5, 4, 0, 1)}
    counters = await bench.sales.counters(bench.sale.id)
    assert counters is not None
    assert counters.stocks == rows
    assert (counters.seq, counters.epoch) == (sale.seq, EPOCH)
    assert counters.last_outbox_id == f"{sale.seq}-0"
    assert (counters.deadlines, counters.confirming, counters.deposits) == (1, 0, 0)


async def test_an_unknown_sale_is_read_as_none(bench: Bench) -> None:
    assert await bench.sales.read("no-such-sale") is None
    assert await bench.sales.counters("no-such-sale") is None


async def test_a_new_sale_is_announced_once(bench: Bench) -> None:
    for _ in range(2):
        await bench.sales.announce(bench.sale.id)
    assert (await bench.sales.ids()).count(bench.sale.id) == 1


def item(sku: str, **changes: Any) -> Item:
    members = {"sku": sku, "name": sku, "price": 1000, "total": 10, "limit_per_buyer": 3}
    return Item(**(members | changes))


async def put(bench: Bench, *, version: int = 1, digest: str = "x", **changes: Any) -> int:
    settings = {"name": "Sale", "currency": "KRW", "hold_policy": "prepare"}
    return await bench.sales.put(
        bench.sale.id,
        epoch=EPOCH,
        version=version,
        digest=digest,
        settings=settings | changes.pop("settings", {}),
        items=changes.pop("items", [item("a"), item("b")]),
        leaving=changes.pop("leaving", []),
        data="{}",
    )


async def test_each_refusal_of_a_put_has_its_own_error(bench: Bench) -> None:
    await bench.held(lines={"b": 2})
    refusals: list[tuple[type[ReservationError], dict[str, Any], dict[str, Any]]] = [
        (PreconditionRequired, {}, {"version": 0}),
        (PreconditionFailed, {}, {"version": 7}),
        (InvalidSale, {}, {"settings": {"currency": "USD"}}),
        (InvalidSale, {}, {"settings": {"hold_policy": "success"}}),
        (TotalTooLow, {"sku": "b", "heldAndSold": 2}, {"items": [item("a"), item("b", total=1)]}),
        (InvalidSale, {"sku": "b"}, {"items": [item("a")], "leaving": ["b"]}),
    ]
    for error, facts, change in refusals:
        with pytest.raises(error) as refused:
            await put(bench, **change)
        assert refused.value.facts == facts
    assert await put(bench) == 2
    assert await put(bench) == 2
    with pytest.raises(PreconditionFailed):
        await put(bench, digest="another change")


async def test_each_refusal_of_a_restock_has_its_own_error(bench: Bench) -> None:
    await bench.held(lines={"a": 3})

    async def restock(delta: int, sku: str = "a", operation: str = "o", digest: str = "d") -> None:
        await bench.sales.restock(
            bench.sale.id,
            epoch=EPOCH,
            operation=operation,
            digest=digest,
            sku=sku,
            delta=delta,
            members={"operator": "op", "reason": "r"},
        )

    for _ in range(2):
        await restock(5)
    assert await bench.sale.stock("a") == (15, 12, 3, 0)
    with pytest.raises(IdempotencyKeyReused):
        await restock(5, digest="another")
    with pytest.raises(SkuNotFound):
        await restock(1, sku="z", operation="p")
    with pytest.raises(InsufficientAvailable) as refused:
        await restock(-13, operation="q")
    assert refused.value.facts == {"available": {"a": 12}}
    with pytest.raises(InvalidSale):
        await restock(1_000_000_000, operation="r")


async def test_a_closed_sale_cannot_be_reopened(bench: Bench) -> None:
    switch = {"epoch": EPOCH, "operator": "op", "reason": "over"}
    for status in (SaleStatus.PAUSED, SaleStatus.OPEN, SaleStatus.CLOSED, SaleStatus.CLOSED):
        await bench.sales.switch(bench.sale.id, status=status, **switch)
    with pytest.raises(SaleClosed):
        await bench.sales.switch(bench.sale.id, status=SaleStatus.OPEN, **switch)
