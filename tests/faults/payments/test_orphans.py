"""Orphaned payments: each comes to an end, and an operator gets the PG's decision.

An order whose claim Redis lost and that could not be placed again is found here as a rebuild leaves
it: it has ended without a payment, and SQL has an intent to take its money from an earlier epoch.
"""

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reservation.adapters.sql.payment_intents import Intent, IntentOutcome
from reservation.application.payments.absence import Absence
from reservation.application.payments.orphaned import OrphanedPayments
from reservation.application.payments.systems import PaymentSystems
from reservation.domain.alarms import Alarm
from reservation.domain.clock import as_datetime
from reservation.domain.payment import Cause, Reason
from reservation.domain.payment_gateway import Payment, PaymentStatus
from reservation.domain.reservation import Reservation
from tests.faults.payments.clock import SetClock
from tests.faults.payments.shop import approve, look_ups_showing, raised, raising, shop
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

ACCOUNT = {"bank": "20", "accountNumber": "2222222222", "holderName": "Kim"}


class Orphan:
    """One payment whose order does not have it."""

    def __init__(self, bench: Bench, sandbox: RunningSandbox, order: Reservation) -> None:
        self.bench, self.sandbox, self.order = bench, sandbox, order
        self.service, self.clock = bench.service, SetClock()
        self.payment_key = ""
        service = bench.service
        systems = PaymentSystems(
            catalog=service.catalog,
            store=service.store,
            sql=service.sql,
            gateway=service.gateway,
            clock=self.clock,
        )
        resolver = service.refunds._resolver
        absence = Absence(systems, resolver, service.health)
        self.orphans = OrphanedPayments(systems, resolver, service.data_loss, absence)

    async def asked_for(self, payment_key: str, order: Reservation | None = None) -> None:
        """Its intent is in SQL."""
        self.payment_key, order = payment_key, order or self.order
        written = await self.service.sql.intents.add(
            Intent(
                order_id=order.order_id,
                sale_id=order.sale_id,
                fence=1,
                payment_key=payment_key,
                amount=order.amount,
                currency="KRW",
                idempotency_key="i",
                now_ms=self.clock.now_ms(),
                epoch="an earlier one",
            )
        )
        assert written is IntentOutcome.WRITTEN

    async def confirmed(self, **more: Any) -> None:
        """The PG has carried out the confirm."""
        order = self.order
        await self.asked_for(self.sandbox.put_payment(order.order_id, order.amount, **more))
        approve(self.sandbox, self.payment_key, order)

    async def run_round(self, *, after_minutes: float = 1) -> bool:
        """The next check; whether the payment has come to its end."""
        self.clock.at_ms += round(after_minutes * 60_000)
        assert await self.orphans.run_once() == 1
        return not await self.service.sql.intents.list_unmet(self.order.sale_id)

    def shown(self) -> dict[str, Any]:
        return self.sandbox.http.get(f"/v1/payments/{self.payment_key}").json()

    def cancelled(self) -> int:
        return self.sandbox.ledger(self.order.order_id)["cancelled"]


@pytest.fixture
async def orphan(tmp_path: Path, valkey_url: str) -> AsyncGenerator[Orphan]:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await bench.hold(await bench.sale(virtual_accounts=True))
        await bench.service.releases.release(order, reason=Reason(Cause.BUYER))
        await bench.flush(order.sale_id)
        yield Orphan(bench, sandbox, order)


async def test_an_account_without_an_order_is_closed_before_the_deposit(
    orphan: Orphan,
) -> None:
    await orphan.confirmed(method="virtual_account")
    assert await orphan.run_round()
    assert orphan.shown()["status"] == "CANCELED"
    with pytest.raises(httpx.HTTPStatusError):
        orphan.sandbox.deposit(orphan.payment_key)
    assert await orphan.service.sql.intents.is_cancel_intended(orphan.payment_key)
    assert await orphan.bench.audited(orphan.order.sale_id) == ()


@pytest.mark.parametrize("method", ["card", "virtual_account"])
async def test_a_cancel_with_a_lost_answer_is_found_by_the_next_check(
    orphan: Orphan, method: str
) -> None:
    await orphan.confirmed(method=method)
    of_it = {"orderId": orphan.order.order_id, "operations": ["cancel"], "times": 1}
    orphan.sandbox.order_fault("error_after_commit", **of_it)
    assert not await orphan.run_round()
    assert await orphan.run_round()
    assert orphan.shown()["status"] == "CANCELED"


async def test_a_deposit_overtaking_the_cancel_is_reported_until_refunded(
    orphan: Orphan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PG gives no deposit back without an account to send it to."""
    await orphan.confirmed(method="virtual_account")
    cancel, before = orphan.service.gateway.cancel, raised(Alarm.PAYMENT_WITHOUT_ORDER)

    async def too_late(**asked: Any) -> Any:
        if orphan.shown()["status"] == "WAITING_FOR_DEPOSIT":
            orphan.sandbox.deposit(orphan.payment_key)
        return await cancel(**asked)

    monkeypatch.setattr(orphan.service.gateway, "cancel", too_late)
    assert not await orphan.run_round()
    assert not await orphan.run_round()
    assert raised(Alarm.PAYMENT_WITHOUT_ORDER) > before
    assert orphan.sandbox.cancel(orphan.payment_key, refundReceiveAccount=ACCOUNT).is_success
    assert await orphan.run_round()
    assert orphan.cancelled() == orphan.order.amount


async def test_the_rest_of_a_partly_cancelled_payment_is_refunded(orphan: Orphan) -> None:
    await orphan.confirmed()
    assert orphan.sandbox.cancel(orphan.payment_key, cancelAmount=400).is_success
    assert await orphan.run_round()
    assert orphan.cancelled() == orphan.order.amount


async def test_a_payment_refunded_in_parts_has_ended(orphan: Orphan) -> None:
    await orphan.confirmed()
    for amount in (400, orphan.order.amount - 400):
        assert orphan.sandbox.cancel(orphan.payment_key, cancelAmount=amount).is_success
    assert orphan.shown()["status"] == "PARTIAL_CANCELED"
    assert await orphan.run_round()
    assert await orphan.bench.audited(orphan.order.sale_id) == ()


@pytest.mark.parametrize("other_payment", [False, True])
async def test_a_payment_unknown_to_the_pg_ends_once_no_charge_is_possible(
    orphan: Orphan, other_payment: bool
) -> None:
    if other_payment:
        # That is for the requester to decide.
        order = orphan.order
        second = orphan.sandbox.put_payment(order.order_id, order.amount)
        approve(orphan.sandbox, second, order)
    await orphan.asked_for("tboxunknown0123456789")
    with raising(Alarm.PAYMENT_WITHOUT_ORDER):
        assert not await orphan.run_round()
    assert not await orphan.run_round(after_minutes=5)
    assert await orphan.run_round(after_minutes=7)
    assert await orphan.service.sql.intents.is_cancel_intended(orphan.payment_key)


async def test_a_pg_without_any_of_our_payments_is_not_trusted(orphan: Orphan) -> None:
    await orphan.asked_for("tboxunknown0123456789")
    await orphan.service.sql.payments.put(
        Payment(
            payment_key="tboxours0123456789",
            order_id="another",
            status="DONE",
            total_amount=1000,
            balance_amount=1000,
            currency="KRW",
            method="CARD",
            approved_at=as_datetime(1),
        ),
        1,
    )
    for _ in range(3):
        assert not await orphan.run_round(after_minutes=20)


async def test_a_payment_of_another_order_ends_once_no_charge_is_possible(orphan: Orphan) -> None:
    other = await orphan.bench.hold(orphan.order.sale_id, "ben")
    await orphan.asked_for(orphan.sandbox.put_payment(other.order_id, other.amount))
    assert not await orphan.run_round()
    assert await orphan.run_round(after_minutes=12)


async def test_intents_known_to_their_orders_are_read_with_growing_pauses(
    orphan: Orphan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing ends while the flusher is stopped: each payment of the sale has its intent."""
    clock, intents, read = orphan.clock, orphan.service.sql.intents, list[float]()
    list_unmet, began = intents.list_unmet, clock.monotonic()

    async def counted(*args: Any, **asked: Any) -> Any:
        found = await list_unmet(*args, **asked)
        if found:
            read.append(clock.monotonic() - began)
        return found

    monkeypatch.setattr(intents, "list_unmet", counted)
    for buyer, reads in (("ann", [11, 16, 32, 62, 92]), ("ben", [111, 122])):
        order = await orphan.bench.hold(orphan.order.sale_id, buyer)
        await orphan.bench.claim(order, f"key-of-{buyer}")
        await orphan.asked_for(f"key-of-{buyer}", order)
        read.clear()
        for _ in range(100 if buyer == "ann" else 25):
            clock.at_ms += 1_000
            assert await orphan.orphans.run_once() == 0
        assert read == reads


async def test_an_answer_about_another_order_does_not_end_a_charged_payment(
    orphan: Orphan,
) -> None:
    order, sandbox = orphan.order, orphan.sandbox
    await orphan.confirmed()
    second = sandbox.put_payment(order.order_id, order.amount)
    approve(sandbox, second, order)
    other = await orphan.bench.hold(order.sale_id, "ben")
    sandbox.put_payment(other.order_id, other.amount)
    sandbox.order_fault("other_order", operations=["look_up"], times=1, orderId=order.order_id)
    assert not await orphan.run_round(after_minutes=13)
    assert orphan.shown()["balanceAmount"] == order.amount


async def test_an_answer_about_another_payment_ends_no_orphan(orphan: Orphan) -> None:
    await orphan.confirmed()
    another = {
        "payment_key": "tboxanother0123456789",
        "status": PaymentStatus.EXPIRED,
        "balance_amount": 0,
    }
    with look_ups_showing(orphan.service, **another):
        assert not await orphan.run_round()
    assert orphan.shown()["balanceAmount"] == orphan.order.amount
