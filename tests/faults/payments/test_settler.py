"""Settler with one damaged order: no other payment waits for its repair."""

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from reservation.application.payments.settle import LOOK_UPS_AT_ONCE
from reservation.bootstrap import Service
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.workers.settler import Settler
from tests.faults.payments.shop import (
    LIMITS,
    PATIENCE_SECONDS,
    approve,
    current_status,
    damage,
    shop,
    wait_for_status,
)


def settler_of(service: Service) -> Settler:
    return Settler(service.store, service.settlement, clock=service.clock)


@pytest.mark.parametrize("lost", ["fence", "items"])
async def test_a_damaged_payment_does_not_block_the_settling_of_others(
    tmp_path: Path, valkey_url: str, lost: str
) -> None:
    """It stays first in the queue until it is repaired, and raises an alarm each time."""
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
        assert [await current_status(service, order) for order in others] == [Status.CONFIRMED] * 2


async def test_payments_of_a_sale_under_rebuild_are_retried_with_pauses(
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
        assert await current_status(service, order) is Status.CONFIRMING


async def test_a_hanging_confirm_does_not_delay_other_payments(
    tmp_path: Path, valkey_url: str
) -> None:
    """More of them hang than there are places for look-ups."""
    patient = msgspec.structs.replace(LIMITS, confirm_seconds=60.0, look_up_seconds=10.0)
    async with shop(tmp_path, valkey_url, limits=patient) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        confirming = service.keys.of(sale_id).confirming
        settler = settler_of(service)
        silent: list[Reservation] = []
        for number in range(LOOK_UPS_AT_ONCE + 8):
            order = await bench.hold(sale_id, f"silent-{number}")
            await bench.claim(order, sandbox.put_payment(order.order_id, order.amount))
            await service.connections.command("ZADD", confirming, 1, order.order_id)
            sandbox.order_fault("hang", orderId=order.order_id, seconds=60)
            silent.append(order)
        try:
            await settler.tick(sale_id)
            give_up_at = time.monotonic() + PATIENCE_SECONDS
            while sum(rule["applied"] for rule in sandbox.faults()) < len(silent):
                assert time.monotonic() < give_up_at
                await asyncio.sleep(0.1)
            other = await bench.hold(sale_id, "ann")
            payment_key = sandbox.put_payment(other.order_id, other.amount)
            await bench.claim(other, payment_key)
            approve(sandbox, payment_key, other)
            await service.connections.command("ZADD", confirming, 1, other.order_id)
            await settler.tick(sale_id)
            await wait_for_status(service, other, Status.CONFIRMED)
            assert await current_status(service, silent[0]) is Status.CONFIRMING
        finally:
            sandbox.clear_faults()
            await settler.run_once(sale_id)
            await settler.aclose()
