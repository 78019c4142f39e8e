"""What the settler does where one order is damaged: nobody else's money waits for its repair."""

from pathlib import Path

import pytest

from reservation.bootstrap import Service
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.workers.settler import Settler
from tests.fixtures.in_process import Bench
from tests.fixtures.sandbox import RunningSandbox
from tests.money.shop import comes_to, refund_wish, shop, stands


def settler_of(service: Service) -> Settler:
    return Settler(
        service.store, service.ledger, service.settle, service.refund, clock=service.clock
    )


async def damage(service: Service, order: Reservation, lost: str) -> None:
    """A field is gone, as no script of ours leaves it."""
    key = service.keys.of(order.sale_id).order(order.order_id)
    assert await service.connections.command("HDEL", key, lost) == 1


async def sold(bench: Bench, sandbox: RunningSandbox, sale_id: str, buyer: str) -> Reservation:
    order = await bench.hold(sale_id, buyer)
    payment_key = sandbox.put_payment(order.order_id, order.amount)
    await bench.service.confirm(order, payment_key=payment_key, may_claim=True)
    await comes_to(bench.service, order, Status.CONFIRMED)
    return order


@pytest.mark.parametrize("lost", ["fence", "items"])
async def test_a_damaged_payment_does_not_keep_the_others_from_being_settled(
    tmp_path: Path, valkey_url: str, lost: str
) -> None:
    """It stays first in the line for as long as nobody repairs it, and is told of each time."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        orders = [await bench.hold(sale_id, buyer) for buyer in ("ann", "ben", "cho")]
        confirming = service.keys.of(sale_id).confirming
        for number, order in enumerate(orders):
            await bench.claim(order, sandbox.put_payment(order.order_id, order.amount))
            await service.connections.command("ZADD", confirming, number, order.order_id)
        damaged, *others = orders
        await damage(service, damaged, lost)
        with pytest.raises(KeyError, match=lost):
            await settler_of(service).run_once(sale_id)
        assert [await stands(service, order) for order in others] == [Status.CONFIRMED] * 2


async def test_a_damaged_refund_does_not_keep_the_others_from_going_on(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        damaged, other = [await sold(bench, sandbox, sale_id, buyer) for buyer in ("ann", "ben")]
        for order in (damaged, other):
            sandbox.order_fault(
                "error_before_commit", orderId=order.order_id, operations=["cancel"], times=1
            )
            wish = refund_wish(order)
            assert not await service.refund(wish)
        await damage(service, damaged, "fence")
        with pytest.raises(KeyError, match="fence"):
            await settler_of(service).refunds()
        assert await stands(service, other) is Status.REFUNDED


async def test_who_waits_for_a_rebuild_is_not_asked_about_without_a_pause(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order = await bench.hold(sale_id, "ann")
        await bench.claim(order, sandbox.put_payment(order.order_id, order.amount))
        confirming = service.keys.of(sale_id).confirming
        await service.connections.command("ZADD", confirming, 1, order.order_id, 2, "gone")
        await service.connections.command("XTRIM", service.keys.of(sale_id).outbox, "MAXLEN", 0)
        settler = settler_of(service)
        assert await settler.run_once(sale_id) == 2
        assert await settler.run_once(sale_id) == 0
        assert await stands(service, order) is Status.CONFIRMING


async def test_a_refund_whose_event_was_lost_is_gone_through_again(
    tmp_path: Path, valkey_url: str
) -> None:
    """The money is back and SQL says so, but the order was rebuilt as it was before: sold."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order = await sold(bench, sandbox, sale_id, "ann")
        await bench.flush(sale_id)
        wish = refund_wish(order)
        assert await service.refund(wish)
        await bench.lose(sale_id)
        await service.rebuild(sale_id, operator="op")
        service.catalog.forget(sale_id)
        assert await stands(service, order) is Status.CONFIRMED
        await settler_of(service).refunds()
        assert await stands(service, order) is Status.REFUNDED
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount
        await bench.flush(sale_id)
        assert await bench.audited(sale_id) == ()
        # Nothing is left of it, and an operator who asks again is told the same.
        assert await service.ledger.pending_refunds(10) == []
        assert await service.refund(wish)
