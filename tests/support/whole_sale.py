"""A whole sale: every kind of transition, then audit, repair and rebuild."""

import asyncio

from redis.exceptions import RedisError

from reservation.domain.errors import ReservationError, SaleRecovering
from reservation.domain.payment import Cause, Reason
from reservation.domain.states import Status
from tests.faults.payments.shop import current_status, refund_wish, sold
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

__all__ = ["hold_when_open", "rebuild_and_check", "sell_and_check"]

#: Far above the needs of a busy machine.
PATIENCE_SECONDS = 40.0


async def sell_and_check(here: Bench, sandbox: RunningSandbox) -> str:
    """Sell, refund, release and expire; SQL gets all, the audit and `why` agree."""
    service = here.service
    sale_id = await here.sale()
    paid = await sold(here, sandbox, sale_id, "ann")
    returned = await sold(here, sandbox, sale_id, "bob")
    assert await service.refunds.refund(refund_wish(returned))
    released = await here.hold(sale_id, "cat")
    await service.releases.release(released, reason=Reason(Cause.BUYER))
    paying = await here.hold(sale_id, "dan")
    await here.claim(paying)
    held = await here.hold(sale_id, "eve", key="one key")
    assert (await here.hold(sale_id, "eve", key="one key")).order_id == held.order_id
    for order, status in (
        (paid, Status.CONFIRMED),
        (returned, Status.REFUNDED),
        (released, Status.RELEASED),
        (paying, Status.CONFIRMING),
        (held, Status.HELD),
    ):
        assert await current_status(service, order) is status
        assert await service.explain.next_step(order)
    assert (await service.explain.item(sale_id, "a")).item.sku == "a"
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    return sale_id


async def rebuild_and_check(here: Bench, sale_id: str) -> None:
    """Repair a damage, lose the sale and rebuild it; it sells again and the audit agrees."""
    service = here.service
    names, command = service.keys.of(sale_id), service.connections.command
    await command("HINCRBY", names.stock("a"), "available", 1)
    assert await here.audited(sale_id) != ()
    assert (await service.repair.run(sale_id, operator="kim", drain=here.flush)).repaired
    await hold_when_open(here, sale_id)
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    for key in (names.sale, names.outbox, names.deadlines, names.stock("a")):
        await command("UNLINK", key)
    await service.redis_monitor.check_redis()
    assert sale_id in service.redis_monitor.gaps
    assert (await service.rebuild.run(sale_id, operator="kim")).rebuilt
    await hold_when_open(here, sale_id)
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def hold_when_open(here: Bench, sale_id: str, *, compare: bool = True) -> None:
    """Hold one unit as soon as the sale takes holds.

    Args:
        here: the service.
        sale_id: the sale.
        compare: run rounds of the monitor; no other task does.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if compare:
                await here.service.redis_monitor.check_redis()
            try:
                await here.hold(sale_id, "zoe")
            except (ReservationError, SaleRecovering, RedisError):
                await asyncio.sleep(0.05)
            else:
                return
