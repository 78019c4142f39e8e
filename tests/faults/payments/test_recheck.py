"""Rechecks find payments that changed after their order was decided, without a webhook."""

import secrets
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from reservation.application.payments.recheck import MISSING_CHECKS_MAX
from reservation.application.payments.webhooks import LOOK_UPS_PER_ORDER
from reservation.domain.alarms import Alarm
from reservation.domain.errors import Unavailable
from reservation.domain.payment_gateway import Answer, PaymentMissing, TryAgain
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.payments.shop import (
    LIMITS,
    approve,
    current_status,
    raising,
    shop,
    wait_for_status,
)
from tests.faults.payments.test_follow_up import declined, sold
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

#: A new entry on the list is due at once.
AT_ONCE = msgspec.structs.replace(LIMITS, recheck_seconds=0.0, deposit_check_seconds=0.0)


async def is_due(bench: Bench) -> None:
    """Time passes: everything on the list is due."""
    for check in await bench.service.sql.payments.list_due_checks(10**15, 100):
        await bench.service.sql.payments.reschedule_check(check, 1, check.looks)


async def account(bench: Bench, sandbox: RunningSandbox) -> tuple[Reservation, str]:
    order = await bench.hold(await bench.sale(virtual_accounts=True), secrets.token_hex(4))
    payment_key = sandbox.put_payment(order.order_id, order.amount, method="virtual_account")
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    await wait_for_status(bench.service, order, Status.AWAITING_DEPOSIT)
    return order, payment_key


async def test_a_deposit_is_found_without_its_webhook(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        order, payment_key = await account(bench, sandbox)
        assert await bench.service.recheck.run_once() == 1
        assert await current_status(bench.service, order) is Status.AWAITING_DEPOSIT
        sandbox.deposit(payment_key)
        await is_due(bench)
        assert await bench.service.recheck.run_once() == 1
        assert await current_status(bench.service, order) is Status.CONFIRMED
        await is_due(bench)
        await bench.service.recheck.run_once()
        assert await bench.service.sql.payments.list_due_checks(10**15, 10) == []


async def looks_after_lookup(bench: Bench) -> int | None:
    """The lookups of the only listed payment after one more; None once it is off the list.

    On a busy machine a lookup may time out, which does not count.
    """
    payments = bench.service.sql.payments
    [before] = await payments.list_due_checks(10**15, 10)
    for _ in range(20):
        await is_due(bench)
        assert await bench.service.recheck.run_once() == 1
        after = await payments.list_due_checks(10**15, 10)
        if not after:
            return None
        if after[0].looks != before.looks:
            return after[0].looks
    raise AssertionError("no lookup succeeded")


async def test_a_late_approved_decline_is_refunded_without_a_webhook(
    tmp_path: Path, valkey_url: str
) -> None:
    """The PG answered the confirm with a refusal, and shows the payment as DONE."""
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order = await bench.hold(sale_id, "ann")
        payment_key = sandbox.put_payment(order.order_id, order.amount, decline="FDS_ERROR")
        with pytest.raises(Exception, match="fraud"):
            await service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        assert await current_status(service, order) is Status.RELEASED
        [check] = await service.sql.payments.list_due_checks(10**15, 10)
        assert (check.payment_key, check.order_id) == (payment_key, order.order_id)
        # Looked up twice, the second time a day later; then it is off the list.
        assert [await looks_after_lookup(bench) for _ in range(2)] == [1, None]

        late, late_key = await declined(bench, sandbox, sale_id)
        approve(sandbox, late_key, late)
        await service.sql.payments.schedule_check(late_key, late.order_id, 1)
        assert await service.recheck.run_once() == 1
        assert await current_status(service, late) is Status.REFUNDED
        assert sandbox.ledger(late.order_id)["cancelled"] == late.amount


async def test_a_failed_cancel_is_retried_without_a_webhook(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        late, late_key = await declined(bench, sandbox, sale_id)
        approve(sandbox, late_key, late)
        sandbox.order_fault("error_before_commit", orderId=late.order_id, operations=["cancel"])
        with pytest.raises(Exception, match="not settled"):
            await service.notifications.receive(late.order_id, late_key, status="DONE")
        await is_due(bench)
        assert await service.recheck.run_once() == 1
        assert await current_status(service, late) is Status.RELEASED
        sandbox.clear_faults()
        await is_due(bench)
        assert await service.recheck.run_once() == 1
        assert await current_status(service, late) is Status.REFUNDED


async def test_a_failed_look_up_does_not_count_as_a_check(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        service = bench.service
        late, late_key = await declined(bench, sandbox, await bench.sale())
        await service.sql.payments.schedule_check(late_key, late.order_id, 1)
        sandbox.order_fault("error_before_commit", orderId=late.order_id, operations=["look_up"])
        for _ in range(3):
            assert await service.recheck.run_once() == 1
            await is_due(bench)
        sandbox.clear_faults()
        approve(sandbox, late_key, late)
        await service.recheck.run_once()
        assert await current_status(service, late) is Status.REFUNDED


async def test_two_workers_do_not_check_one_payment_concurrently(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        late, late_key = await declined(bench, sandbox, await bench.sale())
        payments = bench.service.sql.payments
        await payments.schedule_check(late_key, late.order_id, 1)
        [check] = await payments.list_due_checks(10**15, 10)
        assert await payments.lease_check(check, 10**15)
        assert await payments.lease_check(check, 10**15) is None


@contextmanager
def after_each_lookup(bench: Bench, action: Callable[[], Awaitable[object]]) -> Generator[None]:
    """Run an action between the PG's answer and its effect."""
    look_up = bench.service.gateway.look_up

    async def answered(payment_key: str) -> Answer:
        answer = await look_up(payment_key)
        await action()
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.service.gateway, "look_up", answered)
        yield


async def test_a_webhook_during_a_check_is_checked_separately(
    tmp_path: Path, valkey_url: str
) -> None:
    """It is over a limit and answered 200: only the list has it."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, payment_key = await sold(bench, sandbox, await bench.sale())
        for _ in range(LOOK_UPS_PER_ORDER.count):
            await service.notifications.receive(order.order_id, payment_key, status="CANCELED")
        await service.sql.payments.schedule_check(payment_key, order.order_id, 1)

        async def cancelled_meanwhile() -> None:
            assert sandbox.cancel(payment_key).status_code == 200
            await service.notifications.receive(order.order_id, payment_key, status="CANCELED")

        with (
            raising(Alarm.CANCELLED_AT_THE_PG, times=0),
            after_each_lookup(bench, cancelled_meanwhile),
        ):
            assert await service.recheck.run_once() == 1
        await is_due(bench)
        with raising(Alarm.CANCELLED_AT_THE_PG):
            assert await service.recheck.run_once() == 1


async def test_a_postponed_check_keeps_an_earlier_one(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        payments = bench.service.sql.payments
        late, late_key = await declined(bench, sandbox, await bench.sale())
        await payments.schedule_check(late_key, late.order_id, 1)
        soon_ms = bench.service.clock.now_ms() + 15_000
        with after_each_lookup(
            bench, lambda: payments.schedule_check(late_key, late.order_id, soon_ms)
        ):
            assert await bench.service.recheck.run_once() == 1
        [check] = await payments.list_due_checks(10**15, 10)
        assert check.due_at_ms == soon_ms


async def test_a_repeatedly_failing_cancel_is_retried_less_often(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        late, late_key = await declined(bench, sandbox, await bench.sale())
        approve(sandbox, late_key, late)
        sandbox.order_fault("refuse", orderId=late.order_id, operations=["cancel"])
        await service.sql.payments.schedule_check(late_key, late.order_id, 1)
        for looks in (1, 2, 3, 4):
            now_ms = service.clock.now_ms()
            await is_due(bench)
            assert await service.recheck.run_once() == 1
            [check] = await service.sql.payments.list_due_checks(10**15, 10)
            assert check.looks == looks
            assert check.due_at_ms >= now_ms + 2 ** (looks - 1) * 60_000


async def is_listed_as(bench: Bench, order: Reservation, payment_key: str, looks: int) -> None:
    """The payment is due, after this many lookups that the PG has answered."""
    checks = bench.service.sql.payments
    await checks.schedule_check(payment_key, order.order_id, 1)
    [check] = await checks.list_due_checks(10**15, 10)
    await checks.reschedule_check(check, 1, looks)


@pytest.mark.parametrize("closes", ["before", "meanwhile"])
async def test_a_payment_of_a_closed_sale_stays_listed(
    tmp_path: Path, valkey_url: str, closes: str
) -> None:
    """Redis may have the order in its state before the payment, in which a 404 changes nothing."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        catalog, checks = bench.service.catalog, bench.service.sql.payments
        unknown = "unknown-to-the-pg-0123456789"
        late, late_key = await declined(bench, sandbox, await bench.sale(), unknown)
        await is_listed_as(bench, late, late_key, looks=1)

        async def closed() -> None:
            catalog.close(late.sale_id, "a test")

        if closes == "before":
            await closed()
        with after_each_lookup(bench, closed):
            assert await bench.service.recheck.run_once() == 1
        [check] = await checks.list_due_checks(10**15, 10)
        assert check.looks == 1
        catalog.reopen(late.sale_id)
        await is_due(bench)
        assert await bench.service.recheck.run_once() == 1
        assert await checks.list_due_checks(10**15, 10) == []


async def test_a_failed_look_up_leaves_both_checks_of_a_decline(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        late, late_key = await declined(bench, sandbox, await bench.sale())
        await is_listed_as(bench, late, late_key, looks=0)
        sandbox.order_fault("error_before_commit", orderId=late.order_id, operations=["look_up"])
        assert await service.recheck.run_once() == 1
        sandbox.clear_faults()
        for looks in (0, 1):
            [check] = await service.sql.payments.list_due_checks(10**15, 10)
            assert check.looks == looks
            await is_due(bench)
            assert await service.recheck.run_once() == 1
        assert await service.sql.payments.list_due_checks(10**15, 10) == []


@pytest.mark.parametrize("fault", ["other_key", "other_order", "missing"])
async def test_a_wrong_answer_about_a_sold_order_is_no_check(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """No cancel leaves for the payment that the PG shows instead, and the news is not lost."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, payment_key = await sold(bench, sandbox, await bench.sale())
        assert sandbox.cancel(payment_key).status_code == 200
        await is_listed_as(bench, order, payment_key, looks=0)
        with monkeypatch.context() as patch:
            if fault == "missing":
                patch.setattr(service.gateway, "look_up", _missing)
            else:
                sandbox.order_fault(fault, orderId=order.order_id, operations=["look_up"])
            assert await service.recheck.run_once() == 1
        sandbox.clear_faults()
        assert "cancel" not in [
            row.what for row in await service.sql.orders.history(order.order_id)
        ]
        with raising(Alarm.CANCELLED_AT_THE_PG):
            await is_due(bench)
            assert await service.recheck.run_once() == 1


async def _missing(_: str) -> Answer:
    return PaymentMissing("NOT_FOUND_PAYMENT")


async def test_a_webhook_of_an_order_missing_in_redis_is_listed(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order, payment_key = await sold(bench, sandbox, await bench.sale())
        await bench.flush(order.sale_id)
        key = service.keys.of(order.sale_id).order(order.order_id)
        await service.connections.command("DEL", key)
        with pytest.raises(Unavailable):
            await service.notifications.receive(order.order_id, "tboxforged0123456789")
        assert await service.sql.payments.list_due_checks(10**15, 10) == []
        for _ in range(3):
            with pytest.raises(Unavailable):
                await service.notifications.receive(order.order_id, payment_key)
        [check] = await service.sql.payments.list_due_checks(10**15, 10)
        assert (check.payment_key, check.order_id) == (payment_key, order.order_id)


@pytest.mark.parametrize("paid", [True, False])
async def test_a_charged_payment_without_an_order_stays_listed(
    tmp_path: Path, valkey_url: str, paid: bool
) -> None:
    """A rebuild of a sale that ended long ago restores no order that ended unpaid."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        late, late_key = await declined(bench, sandbox, await bench.sale())
        if paid:
            approve(sandbox, late_key, late)
        key = service.keys.of(late.sale_id).order(late.order_id)
        await service.connections.command("DEL", key)
        await is_listed_as(bench, late, late_key, looks=MISSING_CHECKS_MAX)
        with raising(Alarm.PAYMENT_WITHOUT_ORDER, times=paid):
            assert await service.recheck.run_once() == 1
        assert len(await service.sql.payments.list_due_checks(10**15, 10)) == paid


@pytest.mark.parametrize("fault", ["other_key", "other_order"])
async def test_an_answer_about_another_payment_is_no_check_of_late_money(
    tmp_path: Path, valkey_url: str, fault: str
) -> None:
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        service = bench.service
        late, late_key = await declined(bench, sandbox, await bench.sale())
        # The first of its two checks showed nothing; the money came since.
        await is_listed_as(bench, late, late_key, looks=1)
        approve(sandbox, late_key, late)
        sandbox.order_fault(fault, orderId=late.order_id, operations=["look_up"])
        assert await service.recheck.run_once() == 1
        sandbox.clear_faults()
        await is_due(bench)
        assert await service.recheck.run_once() == 1
        assert await current_status(service, late) is Status.REFUNDED


@pytest.mark.parametrize("looks", [1, MISSING_CHECKS_MAX])
async def test_a_404_keeps_a_payment_with_known_money(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    async def missing(_: str) -> Answer:
        return PaymentMissing("NOT_FOUND_PAYMENT")

    async def busy(**_: object) -> Answer:
        return TryAgain("busy")

    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        service = bench.service
        late, late_key = await declined(bench, sandbox, await bench.sale())
        await is_listed_as(bench, late, late_key, looks=0)
        approve(sandbox, late_key, late)
        with monkeypatch.context() as patch:
            patch.setattr(service.gateway, "cancel", busy)
            assert await service.recheck.run_once() == 1
        await is_listed_as(bench, late, late_key, looks=looks)
        with monkeypatch.context() as patch:
            patch.setattr(service.gateway, "look_up", missing)
            assert await service.recheck.run_once() == 1
        await is_due(bench)
        assert await service.recheck.run_once() == 1
        assert await current_status(service, late) is Status.REFUNDED
        assert sandbox.ledger(late.order_id)["cancelled"] == late.amount
