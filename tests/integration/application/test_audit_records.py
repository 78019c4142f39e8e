"""Each hash in Redis against the state that SQL would restore: the audit reports its key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reservation.adapters.redis.keys import SaleKeys
from reservation.domain.reservation import Reservation
from tests.support.in_process import Bench, bench

Damage = Callable[[SaleKeys, Reservation], tuple[Any, ...]]


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> Any:
    async with bench(tmp_path, valkey_url) as made:
        yield made


#: A corruption of Redis, and a word that the audit must report for it.
DAMAGES: dict[str, tuple[Damage, str]] = {
    "the sale's name": (lambda k, _: ("HSET", k.sale, "name", "Tost sale"), "name"),
    "the sale's end": (lambda k, _: ("HSET", k.sale, "closes_at", "9"), "closes_at"),
    "when the sale was made": (lambda k, _: ("HSET", k.sale, "created_at", "9"), "created at 9"),
    "an unknown field": (lambda k, _: ("HSET", k.sale, "nama", "x"), "nama"),
    "a price": (lambda k, _: ("HSET", k.stock("a"), "price", "1"), "price"),
    "a limit": (lambda k, _: ("HSET", k.stock("a"), "limit", "99"), "limit"),
    "an operation": (lambda k, _: ("HSET", k.operations, "op-9", "x"), "op-9"),
    "an order's amount": (lambda k, o: ("HSET", k.order(o.order_id), "amount", "1"), "amount"),
    "an order's price": (
        lambda k, o: ("HSET", k.order(o.order_id), "items", '[["a",1,1]]'),
        "items",
    ),
    "an order's deadline": (
        lambda k, o: ("HSET", k.order(o.order_id), "expires_at", "9"),
        "expires_at",
    ),
    "an order without a buyer": (
        lambda k, o: ("HDEL", k.order(o.order_id), "buyer"),
        "buyer is 'absent'",
    ),
    "bytes that are not text": (
        lambda k, o: ("HSET", k.order(o.order_id), "name", b"\xff\xfe"),
        "name",
    ),
    "a deadline in the set": (lambda k, o: ("ZADD", k.deadlines, 9, o.order_id), "deadlines"),
    "a place in the buyer's list": (
        lambda k, o: ("ZREM", k.buyer_orders("ann"), o.order_id),
        "its buyer's list",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
async def test_fields_that_differ_from_sql_are_reported(here: Bench, what: str) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    damage, word = DAMAGES[what]
    await here.service.connections.command(*damage(here.service.keys.of(sale_id), order))
    problems = await here.audited(sale_id)
    assert any(word in problem for problem in problems), problems


async def test_a_sale_missing_in_the_set_of_all_sales_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    await here.service.connections.command("SREM", here.service.keys.sales, sale_id)
    assert any("set of all sales" in problem for problem in await here.audited(sale_id))


async def test_an_endless_lease_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.claim(order)
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    keys = here.service.keys.of(sale_id)
    await here.service.connections.command(
        "ZADD", keys.confirming, 9_795_444_592_300, order.order_id
    )
    assert any("lease" in problem for problem in await here.audited(sale_id))


async def test_an_event_that_differs_from_sql_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.flush(sale_id)
    keys, command = here.service.keys.of(sale_id), here.service.connections.command
    ((entry_id, flat),) = await command("XRANGE", keys.outbox, "-", "+")
    changed = [part.replace("HELD", "HELP") for part in flat]
    assert changed != flat
    # The same stream again, with one word changed.
    await command("DEL", keys.outbox)
    await command("XADD", keys.outbox, entry_id, *changed)
    assert any(
        "event 2 in the outbox differs" in problem for problem in await here.audited(sale_id)
    )


async def test_an_unreadable_event_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.flush(sale_id)
    keys, command = here.service.keys.of(sale_id), here.service.connections.command
    ((entry_id, flat),) = await command("XRANGE", keys.outbox, "-", "+")
    unreadable = ["chaio" if field == "chain" else field for field in flat]
    await command("DEL", keys.outbox)
    await command("XADD", keys.outbox, entry_id, *unreadable)
    problems = await here.audited(sale_id)
    assert any(entry_id in problem and "cannot be read" in problem for problem in problems)


async def test_orders_not_yet_flushed_to_sql_are_no_problem(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    for number in range(5):
        await here.hold(sale_id, buyer=f"buyer-{number}")
    assert await here.audited(sale_id) == ()
