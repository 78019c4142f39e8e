"""The audit reports the item, the order and the event of each manual edit of the data."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reservation.adapters.redis.audit_reader import AuditReader
from reservation.adapters.sql.refunds import RefundRecord, RefundWish
from reservation.application.audit import orders
from reservation.domain.payment import Cause, Reason
from reservation.domain.payment_gateway import Payment
from tests.support.in_process import Bench, bench


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


async def test_a_sale_with_orders_in_every_state_passes_the_audit(here: Bench) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.claim(await here.hold(sale_id, "bob"))
    sold = await here.hold(sale_id, "cat")
    await here.finish(sold, (await here.claim(sold)).fence)
    assert await here.audited(sale_id) == ()
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_a_buyer_count_that_differs_from_the_orders_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id, "ann")
    names = here.service.keys.of(sale_id)
    await here.service.connections.command("HSET", names.buyer("ann"), "a", 3)
    await here.service.connections.command("HSET", names.buyer("ann"), "b", 1)
    problems = await here.audited(sale_id)
    expected = f"1 by their orders; the last order is {order.order_id} (event 2)"
    assert f"a: buyer ann has a limit count of 3, {expected}" in problems
    assert "b: buyer ann has a limit count of 1 and no order" in problems


async def test_a_wrong_count_of_paid_orders_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    sold = await here.hold(sale_id, "cat")
    await here.finish(sold, (await here.claim(sold)).fence)
    names = here.service.keys.of(sale_id)
    await here.service.connections.command("HSET", names.buyer("cat"), ":paid", 0)
    [problem] = await here.audited(sale_id)
    assert problem.startswith(":paid: buyer cat has a limit count of 0, 1 by their orders")


async def test_buyers_missing_in_sql_are_read_in_one_batch(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round trip per buyer would be too slow for the audit of a running sale."""
    sale_id = await here.sale()
    buyer_ids = [f"buyer-{number}" for number in range(100)]
    await asyncio.gather(*(here.hold(sale_id, buyer_id) for buyer_id in buyer_ids))
    assert await here.audited(sale_id) == ()
    service, trips = here.service, 0
    pipeline = service.connections.pipeline

    async def counted(commands: Any, **how: Any) -> Any:
        nonlocal trips
        trips += 1
        return await pipeline(commands, **how)

    monkeypatch.setattr(service.connections, "pipeline", counted)
    inspection = AuditReader(service.connections, service.keys, service.store)
    states = await inspection.states(sale_id, buyer_ids)
    assert {state.orders[0].buyer_id for state in states.values()} == set(buyer_ids)
    assert trips == 3


class Noted:
    """Forwards calls and records the number of rows or records of each result."""

    def __init__(self, within: Any) -> None:
        self._within = within
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._within, name)

        async def noted(*args: Any, **how: Any) -> Any:
            answer = await found(*args, **how)
            if isinstance(answer, list | dict):
                self.most = max(self.most, len(answer))
            return answer

        async def pages(*args: Any, **how: Any) -> AsyncIterator[Any]:
            async for page in found(*args, **how):
                self.most = max(self.most, len(page))
                yield page

        return pages if inspect.isasyncgenfunction(found) else noted


async def test_each_read_of_the_audit_returns_at_most_a_page_of_buyers(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    buyer_ids = [f"buyer-{number:02d}" for number in range(40)]
    for buyer_id in buyer_ids:
        await here.hold(sale_id, buyer_id)
    await here.flush(sale_id)
    names, service = here.service.keys.of(sale_id), here.service
    await service.connections.command("HSET", names.buyer("buyer-07"), "a", 3)
    await service.connections.command("DEL", names.buyer("buyer-33"))
    await service.connections.command("HSET", names.buyer("buyer-34"), "b", 1)
    # The buyers of these orders are not in SQL yet.
    for number in range(40, 60):
        await here.hold(sale_id, f"buyer-{number}")
    await service.connections.command("HSET", names.buyer("buyer-50"), "a", 2)
    monkeypatch.setattr(orders, "PAGE_ORDERS", 7)
    monkeypatch.setattr("reservation.adapters.sql.orders.PAGE_IDS", 7)
    monkeypatch.setattr("reservation.adapters.redis.audit_reader.KEYS_AT_ONCE", 7)
    inspection: Any = Noted(AuditReader(service.connections, service.keys, service.store))
    read = Noted(service.sql.orders)
    sql: Any = SimpleNamespace(
        orders=read,
        events=service.sql.events,
        intents=service.sql.intents,
        payments=service.sql.payments,
        refunds=service.sql.refunds,
    )
    problems = await orders.OrderAudit(inspection, sql, clock=here.service.clock).compare(sale_id)
    assert [problem.partition("; ")[0] for problem in problems] == [
        "a: buyer buyer-07 has a limit count of 3, 1 by their orders",
        "a: buyer buyer-33 has a limit count of 0, 1 by their orders",
        "a: buyer buyer-50 has a limit count of 2, 1 by their orders",
        "b: buyer buyer-34 has a limit count of 1 and no order",
    ]
    assert read.most <= 7
    # The server returns all members of a small set at once.
    assert inspection.most <= 60


@pytest.mark.parametrize("name", ["deadlines", "confirming", "deposits"])
async def test_an_order_in_the_wrong_set_is_reported(here: Bench, name: str) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    epoch = (await here.service.catalog.fresh(sale_id)).epoch
    await here.service.store.release(order, epoch=epoch, reason=Reason(Cause.BUYER))
    key = getattr(here.service.keys.of(sale_id), name)
    await here.service.connections.command("ZADD", key, 1, order.order_id)
    (problem,) = await here.audited(sale_id)
    assert f"order {order.order_id} (event 3) is RELEASED and in {name}" in problem


async def test_a_hold_without_a_deadline_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.flush(sale_id)
    names = here.service.keys.of(sale_id)
    await here.service.connections.command("ZREM", names.deadlines, order.order_id)
    (problem,) = await here.audited(sale_id)
    assert problem.endswith("is HELD and in none of the sets, expected in deadlines")


async def test_a_live_order_missing_in_redis_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.flush(sale_id)
    names = here.service.keys.of(sale_id)
    await here.service.connections.command("DEL", names.order(order.order_id))
    problems = await here.audited(sale_id)
    assert any(f"order {order.order_id} is missing in Redis" in problem for problem in problems)


async def test_a_sold_order_without_a_completed_payment_is_reported(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    claimed = await here.claim(order, f"key-{sale_id}")
    await here.finish(order, claimed.fence)
    await here.flush(sale_id)
    await here.service.sql.payments.put(
        Payment(
            payment_key=f"key-{sale_id}",
            order_id=order.order_id,
            status="CANCELED",
            total_amount=1000,
            balance_amount=0,
            currency="KRW",
        ),
        2,
    )
    assert await here.audited(sale_id) == (
        f"order {order.order_id} (event 4) is CONFIRMED, its payment at the PG is CANCELED",
    )


async def test_a_sold_order_whose_refund_is_done_is_reported(here: Bench) -> None:
    """Redis lost the event of the refund, and no rebuild reopened the refund."""
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    claimed = await here.claim(order, f"key-{sale_id}")
    await here.finish(order, claimed.fence)
    await here.flush(sale_id)
    service = here.service
    wish = RefundWish(
        order_id=order.order_id,
        idempotency_key=f"refund-{sale_id}",
        digest="d",
        reason="broken",
        restock=True,
        operator="op",
        account_json=None,
    )
    refund = await service.sql.refunds.begin(wish, now_ms=1)
    assert isinstance(refund, RefundRecord)
    await service.sql.payments.put(
        Payment(
            payment_key=f"key-{sale_id}",
            order_id=order.order_id,
            status="CANCELED",
            total_amount=1000,
            balance_amount=0,
            currency="KRW",
        ),
        2,
    )
    # While it is pending, the worker continues it.
    assert await here.audited(sale_id) == ()
    await service.sql.refunds.finish(refund, status="done", code=None, now_ms=3)
    (problem,) = await here.audited(sale_id)
    assert problem == (
        f"order {order.order_id} (event 4) is CONFIRMED, its payment at the PG is CANCELED and its"
        " refund is done"
    )
    sold = await service.store.read(order.order_id)
    assert sold is not None
    epoch = (await service.catalog.fresh(sale_id)).epoch
    await service.store.refund(
        sold, epoch=epoch, restock=True, reason=Reason(Cause.OPERATOR, operator="op")
    )
    # SQL does not have the end yet.
    assert await here.audited(sale_id) == ()
