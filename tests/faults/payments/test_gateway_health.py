"""Gateway health: a key that the PG refuses, and a key of another merchant."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.alarms import Alarm
from reservation.domain.errors import PaymentDeclined, Unavailable
from reservation.domain.payment_timeouts import PaymentTimeouts
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.telemetry.metrics import ALARMS
from tests.faults.payments.shop import LIMITS, current_status, shop, wait_for_status
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox, running_sandbox

CLOSED = msgspec.structs.replace(
    LIMITS, confirm_again_seconds=0.0, window_closed_seconds=0.0, missing_apart_seconds=0.0
)


def misconfigured() -> float:
    return ALARMS.labels(Alarm.GATEWAY_MISCONFIGURED)._value.get()


async def sold(bench: Bench, sandbox: RunningSandbox, sale_id: str) -> Reservation:
    order = await bench.hold(sale_id, "ben")
    payment_key = sandbox.put_payment(order.order_id, order.amount)
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    await wait_for_status(bench.service, order, Status.CONFIRMED)
    return order


async def charged_without_webhook(
    bench: Bench, sandbox: RunningSandbox, sale_id: str
) -> Reservation:
    """The PG has the money, and its answer was lost."""
    order = await bench.hold(sale_id, "ann")
    payment_key = sandbox.put_payment(order.order_id, order.amount)
    sandbox.order_fault("error_after_commit", orderId=order.order_id, times=1)
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    assert await current_status(bench.service, order) is Status.CONFIRMING
    assert sandbox.ledger(order.order_id)["charged"] == order.amount
    return order


@asynccontextmanager
async def other_merchant(
    folder: Path, redis_url: str, limits: PaymentTimeouts
) -> AsyncGenerator[Service]:
    """The same shop, restarted with the key of a merchant that has none of its payments."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    with running_sandbox(elsewhere) as sandbox:
        environ = {
            "RESERVATION_DATA_DIR": str(folder),
            "RESERVATION_REDIS_URL": redis_url,
            "RESERVATION_TOSS_API_URL": sandbox.url,
        }
        async with opened(Settings.load(environ, None), limits=limits) as service:
            yield service


async def test_a_404_for_every_payment_releases_no_hold(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        await sold(bench, sandbox, sale_id)
        order = await charged_without_webhook(bench, sandbox, sale_id)
        before = misconfigured()
        async with other_merchant(tmp_path, valkey_url, CLOSED) as wrong:
            for _ in range(3):
                assert await wrong.settlement.settle(order.order_id) is None
        assert misconfigured() > before
        assert await bench.service.settlement.settle(order.order_id) is Status.CONFIRMED


async def test_a_404_for_every_payment_voids_no_attempt(tmp_path: Path, valkey_url: str) -> None:
    """The buyer gets no "unknown payment" although the other merchant's key does not see it."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        await sold(bench, sandbox, sale_id)
        order = await bench.hold(sale_id, "ann")
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        async with other_merchant(tmp_path, valkey_url, LIMITS) as wrong:
            found = await wrong.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
            assert found.status is Status.CONFIRMING
        assert await bench.service.settlement.settle(order.order_id) is Status.CONFIRMED


@pytest.mark.parametrize("apart", [0.0, 60.0])
async def test_two_404s_some_time_apart_are_accepted(
    tmp_path: Path, valkey_url: str, apart: float
) -> None:
    limits = msgspec.structs.replace(CLOSED, missing_apart_seconds=apart)
    async with shop(tmp_path, valkey_url, limits=limits) as (bench, sandbox):
        sale_id = await bench.sale()
        await sold(bench, sandbox, sale_id)
        order = await bench.hold(sale_id, "ann")
        await bench.claim(order, "tviva-made-up-0123456789")
        confirming = bench.service.keys.of(sale_id).confirming
        await bench.service.connections.command("ZADD", confirming, 1, order.order_id)
        expected = None if apart else Status.EXPIRED
        assert await bench.service.settlement.settle(order.order_id) is expected


async def test_a_refused_api_key_closes_prepare_until_it_is_accepted(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        await service.redis_monitor.check_redis()
        order = await bench.hold(sale_id)
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        toss = service.gateway._gateway  # pyright: ignore[reportAttributeAccessIssue]
        with monkeypatch.context() as patch:
            wrong = {"authorization": "Basic d3Jvbmc6"}
            patch.setattr(toss, "_headers", toss._headers | wrong)
            found = await service.confirmation.confirm(
                order, payment_key=payment_key, may_claim=True
            )
            assert found.status is Status.CONFIRMING
            await service.redis_monitor.check_redis()
            with pytest.raises(Unavailable) as closed:
                await bench.hold(sale_id, "ben")
            assert closed.value.facts["missing"] == ["gateway"]
        monkeypatch.setattr("reservation.application.payments.gateway_health.PROBE_SECONDS", 0.0)
        service.health.refuse()
        for _ in range(200):
            await service.redis_monitor.check_redis()
            if not service.redis_monitor.missing:
                break
        await bench.hold(sale_id, "ben")
        assert await service.settlement.settle(order.order_id) is Status.CONFIRMED


async def test_a_forged_payment_is_refused_while_the_key_sees_others(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        sale_id = await bench.sale()
        await sold(bench, sandbox, sale_id)
        order = await bench.hold(sale_id, "ann")
        with pytest.raises(PaymentDeclined):
            await bench.service.confirmation.confirm(
                order, payment_key="tviva-made-up-0123456789", may_claim=True
            )
