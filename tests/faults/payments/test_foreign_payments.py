"""Foreign payments can never be the order's: voided at once, counted per buyer, no alarm."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.application.payments.confirm import VOIDS_PER_BUYER
from reservation.domain.alarms import Alarm
from reservation.domain.errors import AmountMismatch, InvalidToken, PaymentDeclined, RateLimited
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.telemetry.metrics import ALARMS
from tests.faults.payments.shop import LIMITS, current_status, shop, wait_for_status
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

MADE_UP = "tviva-made-up-0123456789"
#: The PG's window counts as closed at once.
CLOSED = msgspec.structs.replace(
    LIMITS, confirm_again_seconds=0.0, window_closed_seconds=0.0, missing_apart_seconds=0.0
)
#: They page an operator, and their runbook stops the sale.
PAGES = (Alarm.GATEWAY_MISCONFIGURED, Alarm.ANSWER_FOR_ANOTHER_ORDER, Alarm.PAYMENT_UNDECIDED)


def alarms() -> list[float]:
    return [ALARMS.labels(name)._value.get() for name in PAGES]


async def dies_after_claim(bench: Bench, order: Reservation, payment_key: str) -> None:
    await bench.claim(order, payment_key)
    confirming = bench.service.keys.of(order.sale_id).confirming
    await bench.service.connections.command("ZADD", confirming, 1, order.order_id)


async def test_a_payment_of_another_amount_is_refused_at_once(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        before, sale_id = alarms(), await bench.sale()
        order = await bench.hold(sale_id)
        payment_key = sandbox.put_payment(order.order_id, 100)
        for _ in range(2):
            with pytest.raises(AmountMismatch):
                await bench.service.confirmation.confirm(
                    order, payment_key=payment_key, may_claim=True
                )
        found = await bench.service.store.read(order.order_id)
        assert found is not None
        assert (found.status, found.expires_at_ms) == (Status.HELD, order.expires_at_ms)
        assert alarms() == before
        # The right payment is still possible.
        right = sandbox.put_payment(order.order_id, order.amount)
        await bench.service.confirmation.confirm(order, payment_key=right, may_claim=True)
        await wait_for_status(bench.service, order, Status.CONFIRMED)
        await bench.flush(sale_id)
        assert await bench.audited(sale_id) == ()


async def foreign(bench: Bench, sandbox: RunningSandbox) -> tuple[Reservation, str]:
    """An order with its own payment window, and the authenticated payment of another one."""
    sale_id = await bench.sale()
    other, order = await bench.hold(sale_id, "ann"), await bench.hold(sale_id, "ann", "second")
    sandbox.put_payment(order.order_id, order.amount)
    return order, sandbox.put_payment(other.order_id, other.amount)


async def test_a_payment_of_another_order_is_refused_at_once(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        before = alarms()
        order, payment_key = await foreign(bench, sandbox)
        for _ in range(2):
            with pytest.raises(InvalidToken):
                await bench.service.confirmation.confirm(
                    order, payment_key=payment_key, may_claim=True
                )
        assert await current_status(bench.service, order) is Status.HELD
        assert alarms() == before


@pytest.mark.parametrize(
    ("limits", "status"), [(LIMITS, Status.HELD), (CLOSED, Status.EXPIRED)], ids=["early", "late"]
)
async def test_the_settler_releases_an_order_paid_with_anothers_payment(
    tmp_path: Path, valkey_url: str, limits: Any, status: Status
) -> None:
    """The process died after the claim. The order's own unpaid payment is not money either."""
    async with shop(tmp_path, valkey_url, limits=limits) as (bench, sandbox):
        before = alarms()
        order, payment_key = await foreign(bench, sandbox)
        await dies_after_claim(bench, order, payment_key)
        assert await bench.service.settlement.settle(order.order_id) is status
        assert alarms() == before


async def test_invented_payments_are_limited_per_buyer(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()

        async def open_success_url(buyer: str, number: int) -> None:
            order = await bench.hold(sale_id, buyer, f"order-{number // 5}")
            await service.confirmation.confirm(
                order, payment_key=f"{MADE_UP}-{buyer}-{number}", may_claim=True
            )

        for number in range(VOIDS_PER_BUYER.count):
            with pytest.raises(PaymentDeclined):
                await open_success_url("eve", number)
        with pytest.raises(RateLimited) as refused:
            await open_success_url("eve", VOIDS_PER_BUYER.count)
        assert refused.value.facts["retryAfter"]
        order = await bench.hold(sale_id, "ann")
        await service.confirmation.confirm(
            order, payment_key=sandbox.put_payment(order.order_id, order.amount), may_claim=True
        )
        await wait_for_status(service, order, Status.CONFIRMED)
        # The PG and SQL have no trace of the one above the limit.
        keys = {row.payment_key for row in await service.sql.intents.list_by_order(order.order_id)}
        assert f"{MADE_UP}-eve-{VOIDS_PER_BUYER.count}" not in keys


async def test_payments_of_another_amount_are_limited_per_buyer(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()

        async def open_success_url(number: int) -> None:
            order = await bench.hold(sale_id, "eve", f"order-{number // 5}")
            key = sandbox.put_payment(order.order_id, 100)
            await bench.service.confirmation.confirm(order, payment_key=key, may_claim=True)

        for number in range(VOIDS_PER_BUYER.count):
            with pytest.raises(AmountMismatch):
                await open_success_url(number)
        with pytest.raises(RateLimited):
            await open_success_url(VOIDS_PER_BUYER.count)


async def test_payments_of_other_orders_are_limited_per_buyer(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()

        async def open_success_url(number: int) -> None:
            sold = await bench.hold(sale_id, f"ann-{number}")
            used = sandbox.put_payment(sold.order_id, sold.amount)
            await bench.service.confirmation.confirm(sold, payment_key=used, may_claim=True)
            order = await bench.hold(sale_id, "eve", f"order-{number // 5}")
            await bench.service.confirmation.confirm(order, payment_key=used, may_claim=True)

        for number in range(VOIDS_PER_BUYER.count):
            with pytest.raises(InvalidToken):
                await open_success_url(number)
        with pytest.raises(RateLimited):
            await open_success_url(VOIDS_PER_BUYER.count)
