"""Follow-up: money moved at the PG without our call is detected, kept, refunded or reported."""

import asyncio
import secrets
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.adapters.sql.payment_intents import Intent
from reservation.application.payments.webhooks import (
    CLOCKS_MS,
    LOOK_UPS_PER_ORDER,
    LOOK_UPS_TRIED,
    LOOK_UPS_UNKNOWN,
)
from reservation.bootstrap import Service
from reservation.domain.alarms import Alarm
from reservation.domain.errors import Unavailable
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.payment_gateway import Answer, Answered, PaymentStatus, VirtualAccount
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.payments.shop import (
    LIMITS,
    approve,
    current_status,
    kept_money,
    look_ups_showing,
    raising,
    refund_wish,
    shop,
    wait_for_status,
)
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

DECLINED = Outcome(
    name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "REJECT_CARD_COMPANY")
)


async def sold(
    bench: Bench, sandbox: RunningSandbox, sale_id: str, **more: object
) -> tuple[Reservation, str]:
    order = await bench.hold(sale_id, secrets.token_hex(4))
    payment_key = sandbox.put_payment(order.order_id, order.amount, **more)
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    if more:
        await wait_for_status(bench.service, order, Status.AWAITING_DEPOSIT)
        sandbox.deposit(payment_key)
        await bench.service.notifications.receive(order.order_id, payment_key)
    await wait_for_status(bench.service, order, Status.CONFIRMED)
    return order, payment_key


async def declined(
    bench: Bench, sandbox: RunningSandbox, sale_id: str, key: str = ""
) -> tuple[Reservation, str]:
    """An order that ended by a decline of a payment which the PG still may approve."""
    order = await bench.hold(sale_id, secrets.token_hex(4))
    payment_key = key or sandbox.put_payment(order.order_id, order.amount)
    await bench.finish(order, (await bench.claim(order, payment_key)).fence, DECLINED)
    return order, payment_key


@pytest.mark.parametrize(
    ("amount", "alarm", "shown"),
    [
        (400, Alarm.PARTLY_CANCELLED_AT_THE_PG, "PARTIAL_CANCELED"),
        (None, Alarm.CANCELLED_AT_THE_PG, "CANCELED"),
    ],
)
async def test_a_cancel_in_the_console_is_reported_and_found_by_the_audit(
    tmp_path: Path, valkey_url: str, amount: int | None, alarm: Alarm, shown: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order, payment_key = await sold(bench, sandbox, sale_id)
        body: dict[str, Any] = {} if amount is None else {"cancelAmount": amount}
        assert sandbox.cancel(payment_key, **body).status_code == 200
        with raising(alarm):
            # A forged body that says DONE hides nothing from the PG's own webhook.
            await service.notifications.receive(order.order_id, payment_key, status="DONE")
            await service.notifications.receive(order.order_id, payment_key, status=shown)
            await service.notifications.receive(order.order_id, payment_key, status=shown)
        await bench.flush(sale_id)
        [problem] = await bench.audited(sale_id)
        assert order.order_id in problem
        assert shown in problem
        entries = [
            row for row in await service.sql.orders.history(order.order_id) if shown in row.facts
        ]
        assert len(entries) == 1


async def test_our_own_refund_is_not_reported_as_a_cancel_in_the_console(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, payment_key = await sold(bench, sandbox, await bench.sale())
        assert await bench.service.refunds.refund(refund_wish(order))
        with raising(Alarm.CANCELLED_AT_THE_PG, times=0):
            await bench.service.notifications.receive(
                order.order_id, payment_key, status="CANCELED"
            )


async def test_a_reversed_deposit_is_awaited_even_if_the_sale_has_no_accounts(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale(virtual_accounts=True)
        order, payment_key = await sold(bench, sandbox, sale_id, method="virtual_account")
        known = await bench.service.catalog.get(sale_id)
        plain = msgspec.structs.replace(known.sale, virtual_accounts=False)
        known = msgspec.structs.replace(known, sale=plain)
        sandbox.deposit(payment_key, reverse=True)
        with raising(Alarm.DEPOSIT_REVERSED):

            async def get(_: str) -> object:
                return known

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bench.service.catalog, "get", get)
                await bench.service.notifications.receive(
                    order.order_id, payment_key, status="WAITING_FOR_DEPOSIT"
                )
        assert await current_status(bench.service, order) is Status.AWAITING_DEPOSIT


async def test_a_second_payment_of_a_sold_order_is_refunded(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        order, first = await declined(bench, sandbox, sale_id)
        second = sandbox.put_payment(order.order_id, order.amount)
        await bench.service.confirmation.confirm(order, payment_key=second, may_claim=True)
        await wait_for_status(bench.service, order, Status.CONFIRMED)
        approve(sandbox, first, order)
        with raising(Alarm.SECOND_PAYMENT):
            await bench.service.notifications.receive(order.order_id, first, status="DONE")
        assert await current_status(bench.service, order) is Status.CONFIRMED
        assert kept_money(sandbox, order) == order.amount
        await bench.flush(sale_id)
        assert await bench.audited(sale_id) == ()


async def store_shown(service: Service, payment_key: str) -> None:
    """Store the payment as the PG shows it now."""
    shown = await service.gateway.look_up(payment_key)
    assert isinstance(shown, Answered)
    assert await service.refunds._resolver.store_payment(shown.payment)


async def two_accounts(bench: Bench, sandbox: RunningSandbox) -> tuple[Reservation, dict[str, str]]:
    """An order that awaits the deposit of its second account; the first one is still open.

    Returns:
        The order, and the secrets of the accounts by their payment keys, the first one first.
    """
    service, sale_id = bench.service, await bench.sale(virtual_accounts=True)
    order = await bench.hold(sale_id, secrets.token_hex(4))
    first, second = [
        sandbox.put_payment(order.order_id, order.amount, method="virtual_account")
        for _ in range(2)
    ]
    await bench.finish(order, (await bench.claim(order, first)).fence, DECLINED)
    approve(sandbox, first, order)
    await store_shown(service, first)
    await service.confirmation.confirm(order, payment_key=second, may_claim=True)
    await wait_for_status(service, order, Status.AWAITING_DEPOSIT)
    known = {
        row.payment_key: row.secret or ""
        for row in await service.sql.payments.list_by_order(order.order_id)
    }
    return order, {key: known[key] for key in (first, second)}


async def test_the_secret_of_a_deposit_identifies_its_account(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, accounts = await two_accounts(bench, sandbox)
        first, second = accounts
        sandbox.deposit(first)
        # A deposit goes back only to an account that an operator names.
        with raising(Alarm.SECOND_PAYMENT), pytest.raises(Unavailable):
            await service.notifications.receive(
                order.order_id, None, secret=accounts[first], status="DONE"
            )
        sandbox.deposit(second)
        await service.notifications.receive(order.order_id, None, secret="ps_guessed")
        assert await current_status(service, order) is Status.AWAITING_DEPOSIT
        await service.notifications.receive(
            order.order_id, None, secret=accounts[second], status="DONE"
        )
        assert await current_status(service, order) is Status.CONFIRMED


async def test_a_refund_uses_the_method_of_the_orders_own_payment(
    tmp_path: Path, valkey_url: str
) -> None:
    """An account of the order was paid after its card payment: its deposit is not the order's."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale(virtual_accounts=True)
        order = await bench.hold(sale_id, "ann")
        account = sandbox.put_payment(order.order_id, order.amount, method="virtual_account")
        await bench.finish(order, (await bench.claim(order, account)).fence, DECLINED)
        approve(sandbox, account, order)
        card = sandbox.put_payment(order.order_id, order.amount)
        await service.confirmation.confirm(order, payment_key=card, may_claim=True)
        await wait_for_status(service, order, Status.CONFIRMED)
        sandbox.deposit(account)
        with pytest.raises(Unavailable):
            await service.notifications.receive(order.order_id, account, status="DONE")
        assert await service.refunds.refund(refund_wish(order))
        assert await current_status(service, order) is Status.REFUNDED


async def is_confirming(bench: Bench, sandbox: RunningSandbox) -> tuple[Reservation, str, str]:
    """An order whose second payment another process confirms; its first one was declined."""
    order, first = await declined(bench, sandbox, await bench.sale())
    second = sandbox.put_payment(order.order_id, order.amount)
    await bench.claim(order, second)
    approve(sandbox, second, order)
    return order, first, second


async def is_decided(bench: Bench, order: Reservation) -> None:
    """The other process's lease ends, and the settler decides the payment."""
    confirming = bench.service.keys.of(order.sale_id).confirming
    await bench.service.connections.command("ZADD", confirming, "XX", 1, order.order_id)
    assert await bench.service.settlement.settle(order.order_id) is Status.CONFIRMED


async def test_another_payment_during_a_confirm_is_rechecked_later(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, first, _ = await is_confirming(bench, sandbox)
        approve(sandbox, first, order)
        await service.notifications.receive(order.order_id, first, status="DONE")
        [check] = await service.sql.payments.list_due_checks(10**15, 10)
        assert check.payment_key == first
        assert await current_status(service, order) is Status.CONFIRMING
        await is_decided(bench, order)
        await service.sql.payments.schedule_check(first, order.order_id, 1)
        assert await service.recheck.run_once() == 1
        assert kept_money(sandbox, order) == order.amount


async def test_the_webhook_of_an_unknown_payment_during_a_confirm_is_retried(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, _, _ = await is_confirming(bench, sandbox)
        with pytest.raises(Unavailable):
            await bench.service.notifications.receive(order.order_id, "tboxforged0123456789")
        assert await bench.service.sql.payments.list_due_checks(10**15, 10) == []


async def test_a_cancel_during_the_confirm_is_rechecked_later(
    tmp_path: Path, valkey_url: str
) -> None:
    """The process that confirms it has the PG's answer from before the cancel."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, _, second = await is_confirming(bench, sandbox)
        await service.notifications.receive(order.order_id, second, status="DONE")
        assert await service.sql.payments.list_due_checks(10**15, 10) == []
        assert sandbox.cancel(second).status_code == 200
        await service.notifications.receive(order.order_id, second, status="CANCELED")
        [check] = await service.sql.payments.list_due_checks(10**15, 10)
        assert check.payment_key == second
        found = await service.store.read(order.order_id)
        assert found is not None
        await bench.finish(order, found.fence)
        await service.sql.payments.schedule_check(second, order.order_id, 1)
        with raising(Alarm.CANCELLED_AT_THE_PG):
            assert await service.recheck.run_once() == 1


async def test_late_money_of_a_second_payment_is_refunded(tmp_path: Path, valkey_url: str) -> None:
    """Two payments were declined, and the PG approved both: the first made the order REFUNDED."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, first = await declined(bench, sandbox, await bench.sale())
        second = sandbox.put_payment(order.order_id, order.amount)
        claimed = await bench.claim(order, second)
        await service.sql.intents.add(
            Intent(
                order_id=order.order_id,
                sale_id=order.sale_id,
                fence=claimed.fence,
                payment_key=second,
                amount=order.amount,
                currency=order.currency,
                idempotency_key="a test",
                now_ms=service.clock.now_ms(),
            )
        )
        await bench.finish(order, claimed.fence, DECLINED)
        for payment_key in (first, second):
            approve(sandbox, payment_key, order)
        await service.notifications.receive(order.order_id, first, status="DONE")
        assert await current_status(service, order) is Status.REFUNDED
        await store_shown(service, second)
        await bench.flush(order.sale_id)
        [problem] = await bench.audited(order.sale_id)
        assert "is paid at the PG; it is REFUNDED in Redis" in problem
        await service.notifications.receive(order.order_id, second, status="DONE")
        ledger = sandbox.ledger(order.order_id)
        assert ledger["charged"] == ledger["cancelled"] == 2 * order.amount
        assert await bench.audited(order.sale_id) == ()


async def test_a_cancel_behind_a_webhook_storm_is_rechecked_later(
    tmp_path: Path, valkey_url: str
) -> None:
    """Its buyer posts a dozen webhooks, and has the payment cancelled meanwhile."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order, payment_key = await sold(bench, sandbox, sale_id)
        for _ in range(LOOK_UPS_PER_ORDER.count):
            await service.notifications.receive(order.order_id, payment_key, status="CANCELED")
        assert sandbox.cancel(payment_key).status_code == 200
        with raising(Alarm.CANCELLED_AT_THE_PG, times=0):
            for _ in range(100):
                await service.notifications.receive(order.order_id, payment_key, status="CANCELED")
        # Even if this process ends now: SQL has it.
        await service.sql.payments.schedule_check(payment_key, order.order_id, 1)
        with raising(Alarm.CANCELLED_AT_THE_PG):
            assert await service.recheck.run_once() == 1
        assert await service.sql.payments.list_due_checks(10**15, 10) == []


@pytest.mark.parametrize(("early_ms", "is_covered"), [(CLOCKS_MS + 1, True), (CLOCKS_MS, False)])
async def test_a_recheck_covers_webhooks_before_its_earliest_start(
    tmp_path: Path,
    valkey_url: str,
    monkeypatch: pytest.MonkeyPatch,
    early_ms: int,
    is_covered: bool,
) -> None:
    """A worker's clock is ahead of ours by less than `CLOCKS_MS`; it has ended the recheck."""
    patient = msgspec.structs.replace(LIMITS, look_up_seconds=10.0)
    async with shop(tmp_path, valkey_url, limits=patient) as (bench, sandbox):
        service, checks = bench.service, bench.service.sql.payments
        order, payment_key = await sold(bench, sandbox, await bench.sale())
        monotonic = service.clock.monotonic()
        monkeypatch.setattr(service.clock, "monotonic", lambda: monotonic)
        for _ in range(LOOK_UPS_PER_ORDER.count + 1):
            await service.notifications.receive(order.order_id, payment_key, status="CANCELED")
        [check] = await checks.list_due_checks(10**15, 10)
        await checks.remove_check(check)
        monkeypatch.setattr(service.clock, "now_ms", lambda: check.due_at_ms - early_ms)
        await service.notifications.receive(order.order_id, payment_key, status="CANCELED")
        assert (await checks.list_due_checks(10**15, 10) == []) is is_covered


async def test_a_storm_about_untried_payments_is_retried_without_a_row(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order, _ = await sold(bench, sandbox, sale_id)
        acknowledged = await asyncio.gather(
            *(
                service.notifications.receive(
                    order.order_id, f"forged-{number:020}", status="CANCELED"
                )
                for number in range(20)
            ),
            return_exceptions=True,
        )
        assert any(isinstance(one, Unavailable) for one in acknowledged)
        assert await service.sql.payments.list_due_checks(10**15, 10) == []


async def test_forged_webhooks_cause_few_look_ups_and_block_no_genuine_one(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        paid, paid_key = await sold(bench, sandbox, sale_id)
        late, late_key = await declined(bench, sandbox, sale_id)
        forged = [
            await declined(bench, sandbox, sale_id, f"made-up-{number}-0123456789")
            for number in range(2 * LOOK_UPS_TRIED.count)
        ]
        asked: list[str] = []
        look_up = service.gateway.look_up

        async def counted(payment_key: str) -> object:
            asked.append(payment_key)
            return await look_up(payment_key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.gateway, "look_up", counted)
            began = time.monotonic()
            await asyncio.gather(
                *(
                    service.notifications.receive(
                        order.order_id, f"{key}-forged-{number}", status="DONE"
                    )
                    for order, key in forged
                    for number in range(10)
                ),
                return_exceptions=True,
            )
            seconds = time.monotonic() - began
            assert len(asked) <= LOOK_UPS_UNKNOWN.count * (2 + seconds)
        approve(sandbox, late_key, late)
        await service.notifications.receive(late.order_id, late_key, status="DONE")
        assert await current_status(service, late) is Status.REFUNDED
        assert sandbox.cancel(paid_key).status_code == 200
        with raising(Alarm.CANCELLED_AT_THE_PG):
            await service.notifications.receive(paid.order_id, paid_key, status="CANCELED")


@pytest.mark.parametrize(
    ("status", "refund_status"),
    [
        ("CANCELED", "FAILED"),
        ("CANCELED", "PARTIAL_FAILED"),
        # A payment that is refunded in parts never has the status CANCELED.
        ("PARTIAL_CANCELED", "PARTIAL_FAILED"),
    ],
)
async def test_a_failed_bank_transfer_is_reported(
    tmp_path: Path, valkey_url: str, status: str, refund_status: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, payment_key = await sold(bench, sandbox, await bench.sale())
        assert await service.refunds.refund(refund_wish(order))
        account = VirtualAccount(
            bank="20", account_number="1", holder_name="Kim", refund_status=refund_status
        )
        shown = {
            "status": PaymentStatus(status),
            "balance_amount": 0,
            "virtual_account": account,
        }
        with raising(Alarm.BANK_REFUND_FAILED), look_ups_showing(service, **shown):
            await service.notifications.receive(order.order_id, payment_key)


async def test_a_look_up_from_before_a_refund_changes_nothing_after_it(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order, payment_key = await sold(bench, sandbox, sale_id)
        look_up, is_answered, may_return = service.gateway.look_up, asyncio.Event(), asyncio.Event()

        async def slow(key: str) -> Answer:
            answer = await look_up(key)
            is_answered.set()
            await may_return.wait()
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.gateway, "look_up", slow)
            webhook = asyncio.create_task(
                service.notifications.receive(order.order_id, payment_key)
            )
            await is_answered.wait()
        assert await service.refunds.refund(refund_wish(order))
        may_return.set()
        await webhook
        kept = await service.sql.payments.get(payment_key)
        assert kept is not None
        assert kept.status == PaymentStatus.CANCELED
        await bench.flush(sale_id)
        assert await bench.audited(sale_id) == ()
