"""What the settler does where one order is damaged: nobody else's money waits for its repair."""

from pathlib import Path

import pytest

from reservation.bootstrap import Service
from reservation.domain.states import Status
from reservation.workers.settler import Settler
from tests.money.shop import damage, shop, stands


def settler_of(service: Service) -> Settler:
    return Settler(service.store, service.settle, clock=service.clock)


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
