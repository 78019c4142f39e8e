"""Shop: a service in the test's own loop with its own sandbox PG and short time-outs."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.application.payments.refunds import RefundWish
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.alarms import Alarm
from reservation.domain.payment_gateway import Answer, Answered, RefundAccount
from reservation.domain.payment_timeouts import PaymentTimeouts
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.telemetry import metrics
from tests.support.in_process import Bench, place_database
from tests.support.sandbox import RunningSandbox, running_sandbox

__all__ = [
    "LIMITS",
    "approve",
    "current_status",
    "damage",
    "kept_money",
    "look_ups_showing",
    "payment_key_of",
    "raised",
    "raising",
    "refund_wish",
    "shop",
    "sold",
    "wait_for_status",
]

#: Far above a busy machine's needs.
PATIENCE_SECONDS = 20.0

#: A hanging cancel is abandoned after a moment, and an undecided order is checked again at once.
#: The PG's call and the buyer's response have the time of a busy machine.
LIMITS = PaymentTimeouts(
    confirm_seconds=5.0,
    look_up_seconds=5.0,
    lease_margin_seconds=30.0,
    lease_left_seconds=0.1,
    answer_seconds=6.0,
    hand_over_seconds=0.0,
    pause_least_seconds=0.0,
    pause_most_seconds=0.0,
)


@asynccontextmanager
async def shop(
    folder: Path, redis_url: str, limits: PaymentTimeouts = LIMITS, **more: str
) -> AsyncGenerator[tuple[Bench, RunningSandbox]]:
    with running_sandbox(folder) as sandbox:
        environ = {
            "RESERVATION_DATA_DIR": str(folder),
            "RESERVATION_REDIS_URL": redis_url,
            "RESERVATION_TOSS_API_URL": sandbox.url,
            **more,
        }
        settings = Settings.load(environ, None)
        place_database(settings)
        async with opened(settings, limits=limits) as service:
            here = Bench(service)
            await here.until_connected()
            yield here, sandbox


async def current_status(service: Service, order: Reservation) -> Status:
    found = await service.store.read(order.order_id)
    assert found is not None
    return found.status


async def wait_for_status(service: Service, order: Reservation, status: Status) -> None:
    """Wait for the work that continues after the response to a buyer's request."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while (found := await current_status(service, order)) is not status:
        assert time.monotonic() < give_up_at, found
        await asyncio.sleep(0.02)


def raised(name: Alarm) -> float:
    """How often an alarm was raised in this process."""
    return metrics.ALARMS.labels(name)._value.get()


@contextmanager
def raising(alarm: Alarm, times: int = 1) -> Iterator[None]:
    """Assert that the steps within raise an alarm this often."""
    before = raised(alarm)
    yield
    assert raised(alarm) == before + times


@contextmanager
def look_ups_showing(service: Service, **fields: Any) -> Iterator[None]:
    """Change these fields of the payment in each answer to a look-up."""
    look_up = service.gateway.look_up

    async def changed(payment_key: str) -> Answer:
        answer = await look_up(payment_key)
        assert isinstance(answer, Answered)
        return Answered(msgspec.structs.replace(answer.payment, **fields))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service.gateway, "look_up", changed)
        yield


def approve(sandbox: RunningSandbox, payment_key: str, order: Reservation) -> None:
    """Confirm a payment at the PG without a call of the service."""
    assert sandbox.confirm(payment_key, order.order_id, order.amount).is_success


def kept_money(sandbox: RunningSandbox, order: Reservation) -> int:
    """The charged money of an order that was not cancelled."""
    ledger = sandbox.ledger(order.order_id)
    return ledger["charged"] - ledger["cancelled"]


async def payment_key_of(service: Service, order: Reservation) -> str:
    """The key of the order's own payment."""
    found = await service.store.read(order.order_id)
    assert found is not None
    assert found.payment_key is not None
    return found.payment_key


def refund_wish(order: Reservation, account: RefundAccount | None = None) -> RefundWish:
    """An operator wants the money back to the buyer, and the units back on sale."""
    return RefundWish(
        order_id=order.order_id,
        reason="a test",
        restock=True,
        account=account,
        idempotency_key=secrets.token_hex(8),
        operator="op",
    )


async def damage(service: Service, order: Reservation, lost: str) -> None:
    """Delete a field; no script of ours does."""
    key = service.keys.of(order.sale_id).order(order.order_id)
    assert await service.connections.command("HDEL", key, lost) == 1


async def sold(bench: Bench, sandbox: RunningSandbox, sale_id: str, buyer: str) -> Reservation:
    order = await bench.hold(sale_id, buyer)
    payment_key = sandbox.put_payment(order.order_id, order.amount)
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    await wait_for_status(bench.service, order, Status.CONFIRMED)
    return order
