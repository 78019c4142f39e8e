"""Money of a retired sale: refunds, late money and reversed deposits end in SQL alone."""

from pathlib import Path

import msgspec
import pytest

from reservation.application.retention import retirement
from reservation.domain.alarms import Alarm
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.states import SaleStatus, Status
from tests.faults.payments.shop import (
    LIMITS,
    approve,
    current_status,
    kept_money,
    raising,
    refund_wish,
    shop,
)
from tests.faults.payments.test_follow_up import declined, sold
from tests.faults.payments.test_recheck import is_due
from tests.support.in_process import Bench

#: A new entry on the list is due at once.
AT_ONCE = msgspec.structs.replace(LIMITS, recheck_seconds=0.0, deposit_check_seconds=0.0)


@pytest.fixture(autouse=True)
def removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retirement, "REMOVE_AFTER_MS", -60_000)


async def retire(bench: Bench, sale_id: str) -> None:
    await bench.service.sales.switch(sale_id, SaleStatus.CLOSED, reason="over", operator="op")
    await bench.flush(sale_id)
    await bench.service.retirement.archive(sale_id, reason="r", operator="op")
    await bench.service.retirement.run_once()
    assert await bench.keys(sale_id) == []


async def test_an_operator_refunds_an_order_of_a_retired_sale(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        order, _ = await sold(bench, sandbox, sale_id)
        await retire(bench, sale_id)
        wish = refund_wish(order)

        assert await bench.service.refunds.refund(wish)
        assert await bench.service.refunds.refund(wish)

        assert await current_status(bench.service, order) is Status.REFUNDED
        assert kept_money(sandbox, order) == 0
        assert await bench.audited(sale_id) == ()


async def test_late_money_of_a_retired_sale_is_given_back_by_a_webhook(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        order, payment_key = await declined(bench, sandbox, sale_id)
        await retire(bench, sale_id)
        approve(sandbox, payment_key, order)

        await bench.service.notifications.receive(order.order_id, payment_key)

        assert kept_money(sandbox, order) == 0
        assert await current_status(bench.service, order) is Status.REFUNDED
        assert await bench.audited(sale_id) == ()


async def test_late_money_of_a_retired_sale_is_given_back_without_a_webhook(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        sale_id = await bench.sale()
        order, payment_key = await declined(bench, sandbox, sale_id)
        await bench.service.sql.payments.schedule_check(payment_key, order.order_id, 1)
        await retire(bench, sale_id)
        approve(sandbox, payment_key, order)
        await is_due(bench)

        assert await bench.service.recheck.run_once() == 1

        assert kept_money(sandbox, order) == 0
        assert await current_status(bench.service, order) is Status.REFUNDED


async def test_a_deposit_of_a_retired_sale_that_the_bank_reverses_is_followed(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        sale_id = await bench.sale(virtual_accounts=True)
        order, payment_key = await sold(bench, sandbox, sale_id, method="virtual_account")
        await retire(bench, sale_id)
        sandbox.deposit(payment_key, reverse=True)
        with raising(Alarm.DEPOSIT_REVERSED):
            await bench.service.notifications.receive(order.order_id, payment_key)
        assert await current_status(bench.service, order) is Status.AWAITING_DEPOSIT

        sandbox.deposit(payment_key)
        await is_due(bench)
        await bench.service.recheck.run_once()

        assert await current_status(bench.service, order) is Status.CONFIRMED
        assert await bench.audited(sale_id) == ()


async def test_a_return_from_the_payment_page_after_the_retirement_charges_nothing(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        order = await bench.hold(sale_id)
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        voided = Outcome(
            name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "REJECT")
        )
        await bench.finish(order, (await bench.claim(order, "another-key")).fence, voided)
        await retire(bench, sale_id)
        found = await bench.service.queries.find(order.order_id)
        assert found is not None

        with pytest.raises(Exception, match="expired"):
            await bench.service.confirmation.confirm(found, payment_key=payment_key, may_claim=True)

        assert kept_money(sandbox, order) == 0
