"""Orders that ended without a claim become tombstones; their reads do not change."""

import asyncio
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import pytest

from reservation import bootstrap
from reservation.adapters.redis import reservation_store
from reservation.adapters.redis.errors import StoreUnavailable, UnexpectedReply
from reservation.adapters.redis.keys import buyer_field, order_field
from reservation.adapters.redis.tombstones import tombstone_text
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.payment_intents import Intent
from reservation.application.reservations import order_store
from reservation.application.reservations.prepare import Prepared, wish_of
from reservation.application.retention.tombstones import KEEP_MS_MIN, keep_ms_of
from reservation.domain.errors import (
    IdempotencyKeyReused,
    OutcomeUnknown,
    ReservationExpired,
    SaleRecovering,
    TooManyOrders,
    Unavailable,
)
from reservation.domain.payment import (
    Cause,
    LeaseElsewhere,
    Outcome,
    PaymentOutcome,
    Reason,
)
from reservation.domain.rate_limit import BuyerLimits, Limiter, Rate
from reservation.domain.reservation import Reservation
from reservation.domain.states import SaleStatus, Status
from tests.support.in_process import Bench, bench

LEFT = Reason(Cause.BUYER)
OPERATOR = Reason(Cause.OPERATOR, operator="op", note="why")
TOO_LATE = Outcome(name=PaymentOutcome.REFUNDED, reason=Reason(Cause.PAID_AFTER_END))
#: An hour before the deadline, so that no test waits.
AT_ONCE_MS = -3_600_000


@pytest.fixture
async def here(
    tmp_path: Path, valkey_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Bench]:
    """A service on each database, whose ended orders are due at once."""
    monkeypatch.setattr(bootstrap, "keep_ms_of", lambda _: AT_ONCE_MS)
    url = "" if database_url.startswith("sqlite") else database_url
    async with bench(tmp_path, valkey_url, RESERVATION_DATABASE_URL=url) as made:
        yield made


async def epoch_of(here: Bench, sale_id: str) -> str:
    return (await here.service.catalog.fresh(sale_id)).epoch


async def release(here: Bench, order: Reservation) -> Status:
    return await here.service.store.release(
        order, epoch=await epoch_of(here, order.sale_id), reason=LEFT
    )


async def read(here: Bench, order: Reservation) -> Reservation:
    found = await here.service.store.read(order.order_id)
    assert found is not None
    return found


def newest_first(*orders: Reservation) -> list[Reservation]:
    """The orders as a list shows them: two of one millisecond by their ids."""
    return sorted(orders, key=lambda one: (one.created_at_ms, one.order_id), reverse=True)


async def leave(here: Bench, sale_id: str, buyer: str = "ann", key: str = "") -> Reservation:
    """An order that its buyer released."""
    order = await here.hold(sale_id, buyer, key)
    assert await release(here, order) is Status.RELEASED
    return await read(here, order)


async def add(here: Bench, sale_id: str) -> int:
    """Flush the sale, and run rounds until no order is due."""
    await here.flush(sale_id)
    seq, _ = await here.service.sql.events.cursor(sale_id)
    made = 0
    while did := await here.service.tombstones.run_once([sale_id], lambda _: seq):
        made += did
    return made


async def has_hash(here: Bench, order: Reservation) -> bool:
    key = here.service.keys.of(order.sale_id).order(order.order_id)
    return bool(await here.service.connections.command("EXISTS", key))


async def bucket(here: Bench, order: Reservation) -> dict[str, str]:
    key = here.service.keys.of(order.sale_id).ended(order.buyer_id)
    flat = await here.service.connections.command("HGETALL", key)
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def expect_tombstone(here: Bench, order: Reservation, count: int = 1) -> None:
    assert not await has_hash(here, order)
    assert await bucket(here, order) == {
        order_field(order.order_id): tombstone_text(order.status, order.seq, order.digest),
        buyer_field(order.buyer_id): str(count),
    }


async def prepare(
    here: Bench, sale_id: str, key: str, *, buyer: str = "ann", units: int = 1
) -> Prepared:
    known = await here.service.catalog.get(sale_id)
    wish = wish_of(known.sale, [("a", units)], 1000 * units)
    return await here.service.preparation.prepare(known, buyer, key, wish)


async def claim(here: Bench, order: Reservation, payment_key: str = "pk") -> Any:
    return await here.service.store.claim(
        order,
        epoch=await epoch_of(here, order.sale_id),
        payment_key=payment_key,
        lease_ms=60_000,
    )


async def intend(here: Bench, order: Reservation, epoch: str) -> None:
    """An intent in SQL, whose claim Redis lost."""
    await here.service.sql.intents.add(
        Intent(
            order_id=order.order_id,
            sale_id=order.sale_id,
            fence=1,
            payment_key="pk",
            amount=order.amount,
            currency="KRW",
            idempotency_key="i",
            now_ms=here.service.clock.now_ms(),
            epoch=epoch,
        )
    )


async def test_an_ended_order_becomes_a_tombstone_that_reads_the_same(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id, key="first")
    listed = await here.service.queries.all_of_buyer(sale_id, "ann")
    assert await add(here, sale_id) == 1
    await expect_tombstone(here, order)
    list_of_buyer = here.service.keys.of(sale_id).buyer_orders("ann")
    assert await here.service.connections.command("EXISTS", list_of_buyer) == 0
    assert await read(here, order) == order
    assert await here.service.queries.find(order.order_id) == order
    assert await here.service.queries.all_of_buyer(sale_id, "ann") == listed == [order]
    assert await here.service.store.digest(order.order_id, "ann") == order.digest
    assert await here.audited(sale_id) == ()
    assert await add(here, sale_id) == 0


async def test_an_expired_order_becomes_a_tombstone(here: Bench) -> None:
    sale_id = await here.sale(hold_seconds=1)
    order = await here.hold(sale_id)
    epoch = await epoch_of(here, sale_id)
    async with asyncio.timeout(20):
        while True:
            if await here.service.store.expire(sale_id, [order.order_id], epoch=epoch):
                break
            await asyncio.sleep(0.1)
    expired = await read(here, order)
    assert await add(here, sale_id) == 1
    await expect_tombstone(here, expired)
    assert await read(here, order) == expired


async def test_a_list_has_orders_and_tombstones_newest_first(here: Bench) -> None:
    sale_id = await here.sale()
    for _ in range(3):
        await leave(here, sale_id)
    before = await here.service.queries.all_of_buyer(sale_id, "ann")
    assert await add(here, sale_id) == 3
    held = await here.hold(sale_id)
    after = await here.service.queries.all_of_buyer(sale_id, "ann")
    assert after == newest_first(held, *before)
    assert await here.service.store.orders_of_buyer(sale_id, "ann", 2) == after[:2]


async def test_a_list_has_an_order_that_is_replaced_or_restored_meanwhile(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    kept, order = await leave(here, sale_id), await leave(here, sale_id)
    await here.flush(sale_id)
    real, steps = reservation_store.ReservationStore.orders_of_buyer, ["add", "claim"]

    async def meanwhile(self: Any, *args: Any) -> list[Reservation]:
        if steps and steps.pop(0) == "add":
            assert await add(here, sale_id) == 2
        else:
            await claim(here, order)
        return await real(self, *args)

    monkeypatch.setattr(reservation_store.ReservationStore, "orders_of_buyer", meanwhile)
    orders = [one.order_id for one in await here.service.queries.all_of_buyer(sale_id, "ann")]
    assert orders == [one.order_id for one in newest_first(order, kept)]
    assert steps == []


async def test_a_replayed_key_finds_the_tombstone(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id, key="first")
    await add(here, sale_id)
    replay = await prepare(here, sale_id, "first")
    assert (replay.reservation, replay.replayed) == (order, True)
    with pytest.raises(IdempotencyKeyReused):
        await prepare(here, sale_id, "first", units=2)
    await expect_tombstone(here, order)
    new = await prepare(here, sale_id, "second")
    assert not new.replayed
    assert new.reservation.status is Status.HELD


async def test_tombstones_count_as_unpaid_orders(here: Bench) -> None:
    sale_id = await here.sale()
    for _ in range(20):
        await leave(here, sale_id, buyer="bob")
    # The sustained rate, which these orders also use up, is read from the list of the buyer.
    assert await add(here, sale_id) == 20
    with pytest.raises(TooManyOrders):
        await here.hold(sale_id, "bob")
    await here.hold(sale_id, "cat")


async def test_a_late_claim_restores_the_order_and_takes_it_again(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await add(here, sale_id)
    claimed = await here.claim(order)
    assert claimed.fence == 1
    assert await bucket(here, order) == {}
    assert await here.service.store.orders_of_buyer(sale_id, "ann", 9) == [await read(here, order)]
    await here.finish(order, claimed.fence)
    assert (await read(here, order)).status is Status.CONFIRMED
    assert await add(here, sale_id) == 0
    assert await here.audited(sale_id) == ()


async def test_a_refused_claim_leaves_the_tombstone(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await here.service.sales.switch(sale_id, SaleStatus.CLOSED, reason="over", operator="op")
    await add(here, sale_id)
    with pytest.raises(ReservationExpired):
        await claim(here, order)
    await expect_tombstone(here, order)


async def test_other_calls_answer_as_for_the_ended_order(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await add(here, sale_id)
    epoch, store = await epoch_of(here, sale_id), here.service.store
    assert await release(here, order) is Status.RELEASED
    await expect_tombstone(here, order)
    refunded = await store.refund(order, epoch=epoch, restock=True, reason=OPERATOR)
    assert refunded is Status.RELEASED
    await expect_tombstone(here, order)
    taken = await store.take_over(order, epoch=epoch, lease_ms=1_000)
    assert taken == LeaseElsewhere()
    await expect_tombstone(here, order)


async def test_late_money_of_a_tombstone_is_given_back(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await add(here, sale_id)
    epoch = await epoch_of(here, sale_id)
    done = await here.service.store.finish(order, epoch=epoch, fence=0, outcome=TOO_LATE)
    assert (done.status, done.applied) == (Status.REFUNDED, True)
    assert (await read(here, order)).status is Status.REFUNDED
    assert await add(here, sale_id) == 0
    assert await bucket(here, order) == {}


async def test_orders_in_other_states_stay(here: Bench) -> None:
    sale_id = await here.sale()
    held, claimed, sold, void = [await here.hold(sale_id, buyer) for buyer in ("h", "c", "s", "v")]
    await here.claim(claimed)
    await here.finish(sold, (await here.claim(sold)).fence)
    declined = Outcome(
        name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "REJECT_CARD")
    )
    await here.finish(void, (await here.claim(void)).fence, declined)
    assert await add(here, sale_id) == 0
    assert all([await has_hash(here, order) for order in (held, claimed, sold, void)])
    sale = here.service.keys.of(sale_id).sale
    assert await here.service.connections.command("HEXISTS", sale, "tombstone_seq") == 0


async def test_an_order_without_its_last_event_in_sql_stays(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.flush(sale_id)
    await release(here, order)
    seq, _ = await here.service.sql.events.cursor(sale_id)
    assert await here.service.tombstones.run_once([sale_id], lambda _: seq) == 0
    assert await has_hash(here, order)
    assert await add(here, sale_id) == 1


async def test_an_order_stays_until_its_time(here: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sale_id = await here.sale()
    first, second = await leave(here, sale_id), await here.hold(sale_id, "bob")
    await release(here, second)
    rounds = here.service.tombstones
    monkeypatch.setattr(rounds, "_keep_ms", 0)
    assert await add(here, sale_id) == 0
    monkeypatch.setattr(rounds, "_keep_ms", AT_ONCE_MS)
    # The place of the round is known until its time has come.
    assert await add(here, sale_id) == 0
    rounds._sales.clear()
    assert await add(here, sale_id) == 2
    assert not await has_hash(here, first)


async def test_an_idle_sale_costs_no_call(here: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sale_id = await here.sale()
    await leave(here, sale_id)
    assert await add(here, sale_id) == 1
    seq, _ = await here.service.sql.events.cursor(sale_id)

    async def fail(*_: Any) -> None:
        raise AssertionError("an idle sale costs a call")

    monkeypatch.setattr(here.service.connections, "command", fail)
    monkeypatch.setattr(here.service.connections, "pipeline", fail)
    monkeypatch.setattr(here.service.sql.events, "list_after", fail)
    assert await here.service.tombstones.run_once([sale_id], lambda _: seq) == 0


async def test_a_failure_in_one_sale_delays_no_other(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, whole = await here.sale(), await here.sale()
    order = await leave(here, whole)
    await here.flush(whole)
    get = here.service.catalog.get

    async def get_whole(sale_id: str) -> Any:
        if sale_id == broken:
            raise StoreUnavailable("away")
        return await get(sale_id)

    monkeypatch.setattr(here.service.catalog, "get", get_whole)
    rounds = here.service.tombstones
    with pytest.raises(StoreUnavailable):
        await rounds.run_once([broken, whole], lambda _: 3)
    with pytest.raises(StoreUnavailable):
        await rounds.run_once([broken, whole], lambda _: 3)
    await expect_tombstone(here, order)


async def test_a_busy_sale_leaves_others_their_turn(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PAGES_MAX", "EVENTS_AT_ONCE"):
        monkeypatch.setattr(f"reservation.application.retention.tombstones.{name}", 1)
    busy, other = await here.sale(), await here.sale()
    for _ in range(4):
        await leave(here, busy)
    order = await leave(here, other)
    await here.flush(busy)
    await here.flush(other)
    seqs = {one: (await here.service.sql.events.cursor(one))[0] for one in (busy, other)}
    for _ in range(2 * seqs[other]):
        await here.service.tombstones.run_once([busy, other], lambda one: seqs[one])
    await expect_tombstone(here, order)
    assert here.service.tombstones._sales[busy].seq < seqs[busy]


async def test_two_rounds_at_once_do_no_harm(here: Bench) -> None:
    sale_id = await here.sale()
    orders = [await leave(here, sale_id, f"b{number}") for number in range(30)]
    await here.flush(sale_id)
    seq, _ = await here.service.sql.events.cursor(sale_id)
    rounds = here.service.tombstones
    made = await asyncio.gather(*(rounds.run_once([sale_id], lambda _: seq) for _ in range(4)))
    assert sum(made) == 30
    for order in orders:
        await expect_tombstone(here, order)
    assert await here.audited(sale_id) == ()


async def test_a_low_level_adds_no_tombstone(here: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)

    async def level() -> int:
        return 1

    monkeypatch.setattr(here.service.sql.installation, "level", level)
    assert await add(here, sale_id) == 0
    assert await has_hash(here, order)


@pytest.mark.parametrize("text", ["", "R 1", "R 999 {digest}", "E {seq} {digest}", "garbage"])
async def test_a_damaged_tombstone_is_an_alarm_and_never_a_guess(
    here: Bench, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id, key="first")
    await add(here, sale_id)
    key = here.service.keys.of(sale_id).ended("ann")
    damaged = text.format(seq=order.seq, digest=order.digest)
    await here.service.connections.command("HSET", key, order_field(order.order_id), damaged)
    alarms: list[str] = []
    monkeypatch.setattr(
        "reservation.application.reservations.tombstones.alarm",
        lambda name, **facts: alarms.append(facts["order_id"]),
    )
    assert await here.service.store.read(order.order_id) is None
    assert alarms == [order.order_id]
    with pytest.raises(SaleRecovering):
        await claim(here, order)
    with pytest.raises((OutcomeUnknown, UnexpectedReply)):
        await prepare(here, sale_id, "first")
    problems = await here.audited(sale_id)
    assert any(order.order_id in problem for problem in problems)
    report = await here.service.repair.run(sale_id, operator="op", drain=here.flush)
    assert (report.repaired, report.left) == (True, ())
    assert await read(here, order) == order
    assert (await prepare(here, sale_id, "first")).reservation == order


async def test_a_wrong_count_is_found_and_repaired(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await add(here, sale_id)
    key = here.service.keys.of(sale_id).ended("ann")
    await here.service.connections.command("HSET", key, buyer_field("ann"), "7")
    assert any("7" in problem for problem in await here.audited(sale_id))
    report = await here.service.repair.run(sale_id, operator="op", drain=here.flush)
    assert report.left == ()
    assert await read(here, order) == order


async def test_a_lost_tombstone_is_found(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await add(here, sale_id)
    await here.service.connections.command("UNLINK", here.service.keys.of(sale_id).ended("ann"))
    assert any("missing in Redis" in problem for problem in await here.audited(sale_id))
    assert await here.service.store.read(order.order_id) is None
    assert await here.service.queries.find(order.order_id) is not None


async def test_a_stray_tombstone_is_found(here: Bench) -> None:
    sale_id = await here.sale()
    await leave(here, sale_id)
    await add(here, sale_id)
    key = here.service.keys.of(sale_id).ended("ann")
    await here.service.connections.command("HSET", key, "x" * 24, "R 3 digest")
    assert any("x" * 24 in problem for problem in await here.audited(sale_id))


async def test_a_rebuild_restores_tombstones(here: Bench) -> None:
    sale_id = await here.sale()
    ended = [await leave(here, sale_id, buyer) for buyer in ("ann", "ann", "bob")]
    held = await here.hold(sale_id, "cat")
    assert await add(here, sale_id) == 3
    await here.lose(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    assert report.rebuilt
    for order in (*ended, held):
        assert await read(here, order) == order
    assert await here.audited(sale_id) == ()
    assert await add(here, sale_id) in (0, 3)
    assert not await has_hash(here, ended[0])
    assert await bucket(here, ended[0]) == {
        order_field(order.order_id): tombstone_text(order.status, order.seq, order.digest)
        for order in ended[:2]
    } | {buyer_field("ann"): "2"}
    assert await here.audited(sale_id) == ()


async def test_a_rebuild_below_the_level_restores_the_orders(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    assert await add(here, sale_id) == 1

    async def level() -> int:
        return 1

    monkeypatch.setattr(here.service.sql.installation, "level", level)
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    assert await has_hash(here, order)
    assert await bucket(here, order) == {}
    assert await here.audited(sale_id) == ()


async def test_a_rebuild_without_ended_orders_restores_no_count(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("recovery.sale_copy", "audit.records"):
        monkeypatch.setattr(f"reservation.application.{module}.ENDED_KEPT_MS", -172_800_000)
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    held = await here.hold(sale_id, "bob")
    await add(here, sale_id)
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    assert await bucket(here, order) == {}
    assert await here.audited(sale_id) == ()
    assert await here.service.store.read(order.order_id) is None
    assert await here.service.queries.find(order.order_id) == order
    assert (await read(here, held)).status is Status.HELD


@pytest.mark.parametrize("during", [False, True])
async def test_a_lost_claim_of_a_tombstone_is_claimed_again_in_a_rebuild(
    here: Bench, monkeypatch: pytest.MonkeyPatch, during: bool
) -> None:
    sale_id = await here.sale()
    order, other = await leave(here, sale_id), await leave(here, sale_id)
    assert await add(here, sale_id) == 2
    epoch, orders = await epoch_of(here, sale_id), here.service.sql.orders
    count = orders.count_never_claimed

    async def count_later(*args: Any, **how: Any) -> dict[str, int]:
        await intend(here, order, epoch)
        return await count(*args, **how)

    if during:
        # Between the tombstones of the rebuild and their counts.
        monkeypatch.setattr(orders, "count_never_claimed", count_later)
    else:
        await intend(here, order, epoch)
    await here.lose(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    assert report.claimed == (order.order_id,)
    found = await read(here, order)
    assert (found.status, found.payment_key) == (Status.CONFIRMING, "pk")
    await expect_tombstone(here, other)
    # Both may be of one millisecond, and then their ids decide.
    listed = await here.service.store.orders_of_buyer(sale_id, "ann", 9)
    assert {one.order_id: one for one in listed} == {
        other.order_id: other,
        found.order_id: found,
    }
    assert len(listed) == 2
    await here.flush(sale_id)
    assert not [problem for problem in await here.audited(sale_id) if "counts" in problem]


async def test_webhooks_of_unknown_orders_read_sql_within_their_limit(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone may send one; a missing order might have a tombstone, which SQL decides."""
    sale_id = await here.sale()
    await leave(here, sale_id)
    await add(here, sale_id)
    webhooks, read = here.service.notifications, here.service.sql.orders.get_many
    rows_read: list[Collection[str]] = []

    async def count_reads(order_ids: Collection[str]) -> list[OrderRow]:
        rows_read.append(order_ids)
        return await read(order_ids)

    monkeypatch.setattr(here.service.sql.orders, "get_many", count_reads)
    monkeypatch.setattr(webhooks, "_sql_rate", Limiter(Rate(count=5, per_seconds=3600)))
    answers = await asyncio.gather(
        *(webhooks.receive(f"{sale_id}-{number:024}", "key") for number in range(20)),
        return_exceptions=True,
    )
    assert len(rows_read) == 5
    assert sum(isinstance(answer, Unavailable) for answer in answers) == 15


async def test_a_forced_rebuild_replaces_the_orders_again(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await add(here, sale_id)
    await here.service.rebuild.run(sale_id, operator="op", force=True)
    assert await read(here, order) == order
    await add(here, sale_id)
    await expect_tombstone(here, order)


async def test_a_server_that_went_back_to_a_tombstone_loses_no_payment(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await add(here, sale_id)
    memory = await here.remembered(sale_id)
    await here.finish(order, (await here.claim(order)).fence)
    sold = await read(here, order)
    await here.flush(sale_id)
    await here.put_back(sale_id, memory)
    assert await here.service.store.read(order.order_id) is None
    found = await here.service.queries.find(order.order_id)
    assert found is not None
    assert (found.status, found.payment_key) == (Status.CONFIRMED, sold.payment_key)
    with pytest.raises(SaleRecovering):
        await claim(here, order, "another")
    await here.service.rebuild.run(sale_id, operator="op")
    assert (await read(here, order)).status is Status.CONFIRMED
    assert await here.audited(sale_id) == ()


async def test_a_server_that_went_back_before_a_tombstone_has_the_order(here: Bench) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await here.flush(sale_id)
    memory = await here.remembered(sale_id)
    await add(here, sale_id)
    await here.put_back(sale_id, memory)
    assert await read(here, order) == order
    assert await here.audited(sale_id) == ()
    await here.claim(order)


async def test_a_retired_sale_leaves_no_tombstone(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reservation.application.retention.retirement.REMOVE_AFTER_MS", -60_000)
    sale_id = await here.sale()
    order = await leave(here, sale_id, key="first")
    await here.service.sales.switch(sale_id, SaleStatus.CLOSED, reason="over", operator="op")
    assert await add(here, sale_id) == 1
    await here.service.retirement.archive(sale_id, reason="r", operator="op")
    await here.service.retirement.run_once()
    assert await here.keys(sale_id) == []
    assert await read(here, order) == order


async def test_a_call_survives_an_order_that_is_replaced_meanwhile(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    order = await leave(here, sale_id)
    await here.flush(sale_id)
    real = reservation_store.ReservationStore._call
    seen: list[str] = []

    async def call(self: Any, script: str, *args: Any, **how: Any) -> list[str]:
        # The worker replaces the order between the read and the first call.
        if not seen:
            await add(here, sale_id)
        seen.append(script)
        return await real(self, script, *args, **how)

    monkeypatch.setattr(reservation_store.ReservationStore, "_call", call)
    assert (await claim(here, order)).fence == 1
    assert seen == ["claim", "claim"]
    assert order_store.TRIES_MAX > 1


def test_an_order_stays_as_long_as_a_rate_counts_it() -> None:
    assert keep_ms_of(BuyerLimits()) == KEEP_MS_MIN
    daily = BuyerLimits(burst=Rate(20, 1), sustained=Rate(100, 86_400))
    assert keep_ms_of(daily) == 86_400_000
