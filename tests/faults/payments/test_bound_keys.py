"""Idempotency keys: a clean 4xx stays bound to its key, and the next request has another key."""

from pathlib import Path
from typing import Any

import pytest

from reservation.adapters.sql.payment_intents import Intent
from reservation.domain.errors import NotRefundable, Unavailable
from reservation.domain.idempotency_keys import cancel_key, confirm_key
from reservation.domain.payment import Cause, Reason
from reservation.domain.payment_gateway import RefundAccount
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.payments.shop import approve, current_status, refund_wish, shop, wait_for_status
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

RIGHT = RefundAccount(bank="20", account_number="1002345678", holder_name="Kim")
WRONG = RefundAccount(bank="20", account_number="not a number", holder_name="Kim")


async def paid_by_account(bench: Bench, sandbox: RunningSandbox) -> tuple[Reservation, str]:
    """An order whose virtual account is open, and its payment."""
    order = await bench.hold(await bench.sale(virtual_accounts=True))
    payment_key = sandbox.put_payment(order.order_id, order.amount, method="virtual_account")
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    await wait_for_status(bench.service, order, Status.AWAITING_DEPOSIT)
    return order, payment_key


async def sold(bench: Bench, sandbox: RunningSandbox) -> tuple[Reservation, str]:
    order = await bench.hold(await bench.sale())
    payment_key = sandbox.put_payment(order.order_id, order.amount)
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    await wait_for_status(bench.service, order, Status.CONFIRMED)
    return order, payment_key


def cancel(sandbox: RunningSandbox, payment_key: str, key: str, **body: Any) -> None:
    """The PG's own cancel, which it refuses, and keeps the refusal with the key."""
    answer = sandbox.http.post(
        f"/v1/payments/{payment_key}/cancel",
        json={"cancelReason": "a test", **body},
        headers={"Idempotency-Key": key},
    )
    assert 400 <= answer.status_code < 500, answer.text


async def test_a_refund_to_a_wrong_account_restarts_with_the_right_one(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, payment_key = await paid_by_account(bench, sandbox)
        sandbox.deposit(payment_key)
        await bench.service.notifications.receive(order.order_id, payment_key)
        assert await current_status(bench.service, order) is Status.CONFIRMED
        with pytest.raises(NotRefundable):
            await bench.service.refunds.refund(refund_wish(order, WRONG))
        assert await bench.service.refunds.refund(refund_wish(order, RIGHT))
        assert await current_status(bench.service, order) is Status.REFUNDED
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_an_account_paid_while_being_closed_can_be_refunded(
    tmp_path: Path, valkey_url: str
) -> None:
    """Our own cancel was refused under the first key."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, payment_key = await paid_by_account(bench, sandbox)
        sandbox.order_fault("error_before_commit", operations=["cancel"], times=1)
        assert await bench.service.settlement.deposit(order.order_id) is None
        sandbox.deposit(payment_key)
        assert await bench.service.settlement.deposit(order.order_id) is Status.CONFIRMED
        assert await bench.service.refunds.refund(refund_wish(order, RIGHT))
        assert await current_status(bench.service, order) is Status.REFUNDED


async def test_an_account_does_not_block_the_refund_of_a_card_payment(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, _ = await sold(bench, sandbox)
        assert await bench.service.refunds.refund(refund_wish(order, RIGHT))
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_a_refund_aborted_by_the_pg_resumes_under_the_next_key(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, payment_key = await sold(bench, sandbox)
        for attempt in range(2):
            too_much = order.amount + 1
            cancel(sandbox, payment_key, cancel_key(payment_key, attempt), cancelAmount=too_much)
        assert not await bench.service.refunds.refund(refund_wish(order))
        [record] = await bench.service.sql.refunds.list_pending(10)
        assert not await bench.service.refunds.resume(record)
        assert await bench.service.refunds.resume(record)
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_unusable_money_is_refunded_under_the_next_key(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        sandbox.order_fault("error_after_commit", operations=["confirm"], times=1)
        await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        cancel(sandbox, payment_key, cancel_key(payment_key, 0), cancelAmount=order.amount + 1)
        sandbox.order_fault("other_amount", operations=["look_up"], times=1)
        assert await bench.service.settlement.settle(order.order_id) is None
        assert await bench.service.settlement.settle(order.order_id) is Status.REFUNDED
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_late_money_is_refunded_under_the_next_key_after_a_refusal(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        approve(sandbox, payment_key, order)
        await service.releases.release(order, reason=Reason(Cause.BUYER))
        # A refund account for a card payment: the PG refuses the request.
        account = {"bank": "20", "accountNumber": "1002345678", "holderName": "Kim"}
        cancel(sandbox, payment_key, cancel_key(payment_key, 0), refundReceiveAccount=account)
        with pytest.raises(Unavailable):
            await service.notifications.receive(order.order_id, payment_key)
        await service.notifications.receive(order.order_id, payment_key)
        assert await current_status(service, order) is Status.REFUNDED
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_a_confirm_refused_by_misconfiguration_is_retried(
    tmp_path: Path, valkey_url: str
) -> None:
    """As with a contract that was corrected: the first key returns the refusal for fifteen days."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        key = confirm_key(payment_key, 0)
        refused = sandbox.confirm(payment_key, order.order_id, order.amount + 1, key=key)
        assert refused.json()["code"] == "INVALID_REQUEST"
        await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        assert await current_status(bench.service, order) is Status.CONFIRMING
        assert await bench.service.settlement.settle(order.order_id) is Status.CONFIRMED
        assert sandbox.ledger(order.order_id)["charged"] == order.amount


@pytest.mark.parametrize("code", ["NOT_FOUND_PAYMENT", "REJECT_CARD_COMPANY"])
async def test_a_refusal_bound_to_its_key_is_followed_by_the_next_key(
    tmp_path: Path, valkey_url: str, code: str
) -> None:
    """A passing refusal of the first confirm, while the payment waits for its confirm."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        # The PG answers by the idempotency key alone, whatever the body says.
        refused = {
            "NOT_FOUND_PAYMENT": "tviva-made-up-0123456789",
            "REJECT_CARD_COMPANY": sandbox.put_payment("another-order", 1000, decline=code),
        }[code]
        key = confirm_key(payment_key, 0)
        assert sandbox.confirm(refused, "another-order", 1000, key=key).json()["code"] == code
        await bench.claim(order, payment_key)
        confirming = bench.service.keys.of(order.sale_id).confirming
        await bench.service.connections.command("ZADD", confirming, 1, order.order_id)
        # As for the settler after a confirm whose answer was lost.
        await bench.service.sql.intents.add(
            Intent(
                order_id=order.order_id,
                sale_id=order.sale_id,
                fence=1,
                payment_key=payment_key,
                amount=order.amount,
                currency=order.currency,
                idempotency_key=key,
                now_ms=bench.service.clock.now_ms(),
            )
        )
        assert await bench.service.settlement.settle(order.order_id) is None
        assert await bench.service.settlement.settle(order.order_id) is Status.CONFIRMED
        assert sandbox.ledger(order.order_id)["charged"] == order.amount
