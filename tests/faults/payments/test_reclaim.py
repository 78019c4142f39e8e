"""A rebuild gives an order whose money moved the stock that only overdue holds take."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from reservation.domain.states import Status
from tests.faults.payments.shop import PATIENCE_SECONDS, current_status, shop
from tests.faults.payments.test_orphans_of_rebuilds import Place
from tests.faults.payments.test_went_back import rebuilt, settled


@pytest.fixture
async def place(tmp_path: Path, valkey_url: str) -> AsyncIterator[Place]:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        yield Place(bench, sandbox)


async def a_sale(place: Place, *, total: int, limit: int = 10) -> str:
    """A sale whose holds end after a second."""
    item = Item(sku="a", name="A", price=1000, total=total, limit_per_buyer=limit)
    return await place.bench.sale(items=(item,), hold_seconds=1)


async def until_due(place: Place, *orders: Reservation) -> None:
    """Wait until the deadlines of these orders have passed; nothing ends them."""
    wanted, give_up_at = {order.order_id for order in orders}, time.monotonic() + PATIENCE_SECONDS
    while not wanted <= set(await place.service.store.due(orders[0].sale_id, 100)):
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.02)


async def expire(place: Place, order: Reservation) -> None:
    epoch = (await place.service.catalog.fresh(order.sale_id)).epoch
    assert await place.service.store.expire(order.sale_id, [order.order_id], epoch=epoch) == 1


async def pay(place: Place, order: Reservation) -> None:
    key = place.sandbox.put_payment(order.order_id, order.amount)
    await place.service.confirmation.confirm(order, payment_key=key, may_claim=True)
    assert await current_status(place.service, order) is Status.CONFIRMED


async def first_listed(place: Place, sale_id: str, before: list[Reservation]) -> Reservation:
    """A hold whose payment is listed before those of the others."""
    ids, first = place.service.order_ids, min(order.order_id for order in before)
    numbers = map(str, itertools.count())
    key = next(
        key
        for key in numbers
        if ids.order_id(sale_id=sale_id, buyer_id="cat", idempotency_key=key) < first
    )
    return await place.bench.hold(sale_id, "cat", key)


async def is_sold(place: Place, order: Reservation) -> None:
    """The settler sells it, and its money stays."""
    assert await settled(place.bench, order) is Status.CONFIRMED
    assert place.money(order) == (order.amount, 0)


@pytest.mark.parametrize("short_of", ["stock", "limit"])
async def test_a_lost_order_takes_what_an_overdue_hold_has(place: Place, short_of: str) -> None:
    if short_of == "stock":
        sale_id, buyer = await a_sale(place, total=1), "ben"
    else:
        sale_id, buyer = await a_sale(place, total=2, limit=1), "ann"
    overdue = await place.bench.hold(sale_id, "ann")
    await place.bench.flush(sale_id)
    memory = await place.bench.remembered(sale_id)
    await until_due(place, overdue)
    await expire(place, overdue)
    paid = await place.bench.hold(sale_id, buyer)
    await pay(place, paid)
    await place.bench.put_back(sale_id, memory)

    await rebuilt(place.bench, sale_id)
    await is_sold(place, paid)
    assert await current_status(place.service, overdue) is Status.EXPIRED
    await place.bench.flush(sale_id)
    assert await place.bench.audited(sale_id) == ()


async def test_a_hold_with_a_payment_is_claimed_before_overdue_holds_end(place: Place) -> None:
    """Whatever the order of the ids, by which the payments are listed."""
    sale_id = await a_sale(place, total=7)
    holds = [await place.bench.hold(sale_id, "ann") for _ in range(6)]
    overdue = await place.bench.hold(sale_id, "ben")
    await place.bench.flush(sale_id)
    memory = await place.bench.remembered(sale_id)
    await until_due(place, *holds, overdue)
    for order in holds:
        await pay(place, order)
    await expire(place, overdue)
    lost = await first_listed(place, sale_id, holds)
    await pay(place, lost)
    await place.bench.put_back(sale_id, memory)

    await rebuilt(place.bench, sale_id)
    for order in (*holds, lost):
        await is_sold(place, order)
    await place.bench.flush(sale_id)
    events = await place.service.sql.events.list_after(sale_id, 0, 1000)
    assert [event.order_id for event in events if event.event == "expired"] == [overdue.order_id]
    assert await place.bench.audited(sale_id) == ()


async def test_a_paid_order_is_not_refused_while_more_overdue_holds_can_end(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buyer's claim gives up after some rounds of expiry; here the money has moved."""
    sale_id = await a_sale(place, total=1)
    paid = await place.bench.hold(sale_id, "ann")
    await until_due(place, paid)
    await expire(place, paid)
    overdue = await place.bench.hold(sale_id, "ben")
    await place.bench.flush(sale_id)
    memory = await place.bench.remembered(sale_id)
    await until_due(place, overdue)
    await expire(place, overdue)
    await pay(place, paid)
    await place.bench.put_back(sale_id, memory)

    monkeypatch.setattr("reservation.adapters.redis.reservation_store.DUE_ROUNDS_MAX", 1)
    await rebuilt(place.bench, sale_id)
    await is_sold(place, paid)
