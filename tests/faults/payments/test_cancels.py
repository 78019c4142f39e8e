"""Cancels: one whose answer was lost may run minutes later, so its order is never sold.

The PG lies once about the amount, so the service gives the money back; that cancel hangs at the PG.
From then on a look-up shows a payment that is ours in every member, and is still not to be sold.
"""

from pathlib import Path
from typing import Any

import pytest

from reservation.bootstrap import Service
from reservation.domain.errors import Unavailable
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.payments.shop import approve, current_status, shop, wait_for_status
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox


async def lied_to(bench: Bench, sandbox: RunningSandbox, **fault: Any) -> tuple[Reservation, str]:
    """An order whose money was cancelled for a wrong amount, with a fault in the cancel."""
    order = await bench.hold(await bench.sale())
    payment_key = sandbox.put_payment(order.order_id, order.amount)
    of_it = {"orderId": order.order_id, "times": 1}
    sandbox.order_fault("error_after_commit", operations=["confirm"], **of_it)
    sandbox.order_fault("other_amount", operations=["look_up"], **of_it)
    sandbox.order_fault(**{"operations": ["cancel"], **of_it, **fault})
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    assert await bench.service.settlement.settle(order.order_id) is None
    return order, payment_key


async def eventually_settled(service: Service, order: Reservation) -> None:
    """Once the last claimant's lease is over."""
    confirming = service.keys.of(order.sale_id).confirming
    await service.connections.command("ZADD", confirming, "XX", 1, order.order_id)
    await service.settlement.settle(order.order_id)


async def test_a_payment_with_a_hanging_cancel_is_not_sold(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, payment_key = await lied_to(bench, sandbox, fault="hang", seconds=600)
        shown = sandbox.http.get(f"/v1/payments/{payment_key}").json()
        assert (shown["status"], shown["totalAmount"]) == ("DONE", order.amount)
        for _ in range(3):
            assert await bench.service.settlement.settle(order.order_id) is None
            assert await current_status(bench.service, order) is Status.CONFIRMING
        sandbox.clear_faults()
        assert await bench.service.settlement.settle(order.order_id) is Status.REFUNDED
        ledger = sandbox.ledger(order.order_id)
        assert (ledger["charged"], ledger["cancelled"]) == (order.amount, order.amount)


async def test_an_undelivered_cancel_is_sent_again(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, _ = await lied_to(bench, sandbox, fault="error_before_commit")
        assert sandbox.ledger(order.order_id)["cancelled"] == 0
        assert await bench.service.settlement.settle(order.order_id) is Status.REFUNDED
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_an_account_paid_while_being_closed_is_sold(tmp_path: Path, valkey_url: str) -> None:
    """The PG's last word: no cancel of a paid deposit without an account for the refund."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await bench.hold(await bench.sale(virtual_accounts=True))
        payment_key = sandbox.put_payment(order.order_id, order.amount, method="virtual_account")
        service = bench.service
        await service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        await wait_for_status(service, order, Status.AWAITING_DEPOSIT)
        sandbox.order_fault("error_before_commit", operations=["cancel"], times=1)
        assert await service.settlement.deposit(order.order_id) is None
        sandbox.deposit(payment_key)
        assert await service.settlement.deposit(order.order_id) is Status.CONFIRMED
        ledger = sandbox.ledger(order.order_id)
        assert (ledger["charged"], ledger["cancelled"]) == (order.amount, 0)


@pytest.mark.slow
async def test_a_late_return_during_a_refund_of_late_money_is_not_sold(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        await service.releases.release(order, reason=Reason(Cause.BUYER))
        approve(sandbox, payment_key, order)
        sandbox.order_fault("hang", operations=["cancel"], seconds=600, times=1)
        # Not refunded yet: the PG must send the webhook again.
        with pytest.raises(Unavailable):
            await service.notifications.receive(order.order_id, payment_key)
        ended = await service.store.read(order.order_id)
        assert ended is not None
        await service.confirmation.confirm(ended, payment_key=payment_key, may_claim=True)
        assert await current_status(service, order) is Status.CONFIRMING
        sandbox.clear_faults()
        await eventually_settled(service, order)
        assert await current_status(service, order) is Status.REFUNDED
        ledger = sandbox.ledger(order.order_id)
        assert (ledger["charged"], ledger["cancelled"]) == (order.amount, order.amount)
