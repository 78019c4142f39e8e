"""A payment is orphaned only in a state of Redis that is whole: never while its sale is rebuilt."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from reservation.adapters.sql.payment_intents import Intent
from reservation.bootstrap import Service
from reservation.domain.alarms import Alarm
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.payments.shop import approve, current_status, raising, shop
from tests.faults.payments.test_went_back import paid_and_lost, rebuilt, settled, shop_beside
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

#: Far above what a call takes, and far below a time-out of the PG.
MOMENT_SECONDS = 15.0


class Place(NamedTuple):
    bench: Bench
    sandbox: RunningSandbox

    @property
    def service(self) -> Service:
        return self.bench.service

    async def orphans(self) -> int:
        """A full round of the loop, as every half a minute."""
        self.service.orphaned_payments._next_full_scan = None
        return await self.service.orphaned_payments.run_once()

    async def paid_under_intent(self, order: Reservation, epoch: str) -> str:
        """Take the money under an intent of this epoch, with no claim in Redis."""
        key = self.sandbox.put_payment(order.order_id, order.amount)
        await self.service.sql.intents.add(
            Intent(
                order_id=order.order_id,
                sale_id=order.sale_id,
                fence=1,
                payment_key=key,
                amount=order.amount,
                currency="KRW",
                idempotency_key=f"key-of-{order.order_id}",
                now_ms=self.service.clock.now_ms(),
                epoch=epoch,
            )
        )
        approve(self.sandbox, key, order)
        return key

    def money(self, order: Reservation) -> tuple[int, int]:
        ledger = self.sandbox.ledger(order.order_id)
        return ledger["charged"], ledger["cancelled"]


@pytest.fixture
async def place(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Place]:
    monkeypatch.setattr("reservation.application.payments.orphaned.UNMET_SECONDS", -60.0)
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        yield Place(bench, sandbox)


def after(
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    then: Callable[[], Coroutine[Any, Any, Any]],
) -> None:
    """Run `then` right after each call of the method."""
    real = getattr(owner, name)

    async def both(*args: Any, **kwargs: Any) -> Any:
        out = await real(*args, **kwargs)
        await then()
        return out

    monkeypatch.setattr(owner, name, both)


@pytest.mark.parametrize("moment", ["after the epoch", "after the keys are cleared"])
async def test_a_round_during_a_rebuild_refunds_no_reclaimable_payment(
    place: Place, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    order, _, _ = await paid_and_lost(place.bench, place.sandbox, flushed="the hold")
    await place.service.redis_monitor.check_redis()
    assert order.sale_id in place.service.redis_monitor.gaps
    if moment == "after the epoch":
        after(monkeypatch, place.service.sql.rebuilds, "begin", place.orphans)
    else:
        after(monkeypatch, place.service.rebuild._restorer, "clear", place.orphans)
    await place.service.rebuild.run(order.sale_id, operator="op")
    await place.service.redis_monitor.check_redis()
    assert place.money(order) == (order.amount, 0)
    assert await settled(place.bench, order) is Status.CONFIRMED


async def test_a_sold_order_keeps_its_payment_when_flushed_during_a_rebuild(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, sale_id = place.service, await place.bench.sale()
    order = await place.bench.hold(sale_id)
    await place.bench.flush(sale_id)
    flushed = (await service.sql.sales.heads())[sale_id].seq
    key = place.sandbox.put_payment(order.order_id, order.amount)
    shown = await service.confirmation.confirm(order, payment_key=key, may_claim=True)
    assert shown.status is Status.CONFIRMED
    batch = await service.outbox.after(sale_id, flushed, 1000)
    await place.bench.lose(sale_id)
    await service.redis_monitor.check_redis()

    async def flusher_commits() -> None:
        if (await service.sql.sales.heads())[sale_id].seq == flushed:
            await service.sql.events.apply(sale_id, batch)

    after(monkeypatch, service.gateway, "look_up", flusher_commits)
    after(monkeypatch, service.rebuild._restorer, "clear", place.orphans)
    await service.rebuild.run(sale_id, operator="op")
    await service.redis_monitor.check_redis()
    assert place.money(order) == (order.amount, 0)


async def test_an_interrupted_rebuild_leaves_its_payments_to_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, _, _ = await paid_and_lost(place.bench, place.sandbox, flushed="the claim")
    service = place.service
    await service.redis_monitor.check_redis()

    async def dies(*_: Any, **__: Any) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(service.rebuild._copy, "restore_orders", dies)
        with pytest.raises(ConnectionError):
            await service.rebuild.run(order.sale_id, operator="op")
    await service.redis_monitor.check_redis()
    await place.orphans()
    await service.rebuild.run(order.sale_id, operator="op")
    await service.redis_monitor.check_redis()
    assert await settled(place.bench, order) is Status.CONFIRMED
    assert place.money(order) == (order.amount, 0)


async def test_an_intent_of_an_earlier_epoch_is_kept_during_a_new_loss(
    place: Place,
) -> None:
    order, _, _ = await paid_and_lost(place.bench, place.sandbox, flushed="the claim")
    service = place.service
    await service.redis_monitor.check_redis()
    await service.rebuild.run(order.sale_id, operator="op")
    await service.redis_monitor.check_redis()
    await place.bench.flush(order.sale_id)
    await place.bench.lose(order.sale_id)
    await place.orphans()
    assert place.money(order) == (order.amount, 0)


async def test_a_sale_without_its_hash_does_not_hide_orphans_of_others(place: Place) -> None:
    sales = [await place.bench.sale(), await place.bench.sale()]
    orders = [await place.bench.hold(sale_id) for sale_id in sales]
    for order in orders:
        await place.paid_under_intent(order, "an earlier epoch")
    damaged = place.service.keys.of(sales[0]).sale
    await place.service.connections.command("UNLINK", damaged)
    await place.orphans()
    assert [place.money(order)[1] for order in orders] == [0, orders[1].amount]


async def test_a_hanging_cancel_does_not_delay_other_orphans(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await place.bench.sale()
    orders = [await place.bench.hold(sale_id, buyer) for buyer in ("ann", "ben")]
    keys = [await place.paid_under_intent(order, "an earlier epoch") for order in orders]
    cancel, hanging = place.service.gateway.cancel, asyncio.Event()
    others = asyncio.Event()

    async def hang_on_the_first(**asked: Any) -> Any:
        if asked["payment_key"] == keys[0]:
            await hanging.wait()
        else:
            others.set()
        return await cancel(**asked)

    monkeypatch.setattr(place.service.gateway, "cancel", hang_on_the_first)
    round_of_all = asyncio.create_task(place.orphans())
    await asyncio.wait_for(others.wait(), MOMENT_SECONDS)
    hanging.set()
    await round_of_all
    assert [place.money(order)[1] for order in orders] == [order.amount for order in orders]


class _Unplaced(NamedTuple):
    """A payment that a rebuild could not place, and whose order's unit is free by now."""

    order: Reservation
    key: str


async def unplaced(place: Place, method: str = "card") -> _Unplaced:
    """The gateway does not answer the first rebuild, while another buyer has the only unit."""
    order, key, _ = await paid_and_lost(
        place.bench, place.sandbox, flushed="nothing", order_too=True, method=method
    )
    async with shop_beside(place.bench) as other:
        ben = await other.hold(order.sale_id, "ben")
    place.sandbox.order_fault("refuse", operations=["look_up"], orderId=order.order_id)
    await rebuilt(place.bench, order.sale_id)
    place.sandbox.clear_faults()
    await place.service.releases.release(ben, reason=Reason(Cause.BUYER))
    await place.bench.flush(order.sale_id)
    return _Unplaced(order, key)


async def lose_and_rebuild(place: Place, order: Reservation) -> None:
    """A second loss; its rebuild places the payment."""
    await place.bench.lose(order.sale_id)
    await rebuilt(place.bench, order.sale_id)
    assert await current_status(place.service, order) is Status.CONFIRMING


def once(then: Callable[[], Coroutine[Any, Any, Any]]) -> Callable[[], Coroutine[Any, Any, Any]]:
    """Run it at the first call only."""
    calls = itertools.count()

    async def first() -> None:
        if next(calls) == 0:
            await then()

    return first


@pytest.mark.parametrize("method", ["card", "virtual_account"])
@pytest.mark.parametrize("settles", ["at once", "later"])
async def test_a_payment_that_a_later_rebuild_places_is_sold_and_not_cancelled(
    place: Place, monkeypatch: pytest.MonkeyPatch, method: str, settles: str
) -> None:
    """The second loss happens while the orphan's look-up hangs."""
    order, key = await unplaced(place, method)
    sold = Status.CONFIRMED if method == "card" else Status.AWAITING_DEPOSIT

    async def meanwhile() -> None:
        await lose_and_rebuild(place, order)
        if settles == "at once":
            assert await settled(place.bench, order) is sold

    after(monkeypatch, place.service.gateway, "look_up", once(meanwhile))
    with raising(Alarm.PAYMENT_WITHOUT_ORDER, times=0):
        assert await place.orphans() == 1
    if settles == "later":
        assert await settled(place.bench, order) is sold
    if method == "virtual_account":
        place.sandbox.deposit(key)
        await place.service.notifications.receive(order.order_id, key)
    assert await current_status(place.service, order) is Status.CONFIRMED
    assert place.money(order) == (order.amount, 0)
    await place.bench.flush(order.sale_id)
    assert await place.service.sql.intents.list_unmet(order.sale_id) == []
    assert await place.bench.audited(order.sale_id) == ()


async def test_a_payment_whose_cancel_is_recorded_before_a_rebuild_places_it_is_refunded(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second loss happens right before the cancel leaves."""
    order, _ = await unplaced(place)

    async def meanwhile() -> None:
        await lose_and_rebuild(place, order)
        assert await settled(place.bench, order) is Status.REFUNDED

    after(monkeypatch, place.service.sql.intents, "intend_cancel", once(meanwhile))
    assert await place.orphans() == 1
    assert await current_status(place.service, order) is Status.REFUNDED
    assert place.money(order) == (order.amount, order.amount)
    await place.bench.flush(order.sale_id)
    assert await place.service.sql.intents.list_unmet(order.sale_id) == []
    assert await place.bench.audited(order.sale_id) == ()
