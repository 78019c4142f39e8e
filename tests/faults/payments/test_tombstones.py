"""Money of an order with a tombstone: it comes late, and goes back."""

from pathlib import Path

import pytest

from reservation import bootstrap
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import SaleStatus, Status
from tests.faults.payments.shop import approve, current_status, kept_money, shop
from tests.support.in_process import Bench


@pytest.fixture(autouse=True)
def due_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "keep_ms_of", lambda _: -3_600_000)


async def replaced(bench: Bench, sale_id: str) -> Reservation:
    """An order that its buyer released, and that has a tombstone."""
    order = await bench.hold(sale_id)
    epoch = (await bench.service.catalog.fresh(sale_id)).epoch
    await bench.service.store.release(order, epoch=epoch, reason=Reason(Cause.BUYER))
    await bench.flush(sale_id)
    seq, _ = await bench.service.sql.events.cursor(sale_id)
    assert await bench.service.tombstones.run_once([sale_id], lambda _: seq) == 1
    return order


@pytest.mark.parametrize("closed", [False, True])
async def test_late_money_is_given_back(tmp_path: Path, valkey_url: str, closed: bool) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        order = await replaced(bench, sale_id)
        if closed:
            await bench.service.sales.switch(
                sale_id, SaleStatus.CLOSED, reason="over", operator="op"
            )
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        approve(sandbox, payment_key, order)

        await bench.service.notifications.receive(order.order_id, payment_key)

        assert kept_money(sandbox, order) == 0
        assert await current_status(bench.service, order) is Status.REFUNDED
        await bench.flush(sale_id)
        assert await bench.audited(sale_id) == ()


async def test_a_restored_order_is_paid_once(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        order = await replaced(bench, sale_id)
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        found = await bench.service.queries.find(order.order_id)
        assert found is not None

        for _ in range(2):
            await bench.service.confirmation.confirm(found, payment_key=payment_key, may_claim=True)

        assert kept_money(sandbox, order) == order.amount
        assert await current_status(bench.service, order) is Status.CONFIRMED
        await bench.flush(sale_id)
        assert await bench.audited(sale_id) == ()
