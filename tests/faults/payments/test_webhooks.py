"""Late webhooks of the PG: money for an order that has ended, a cancel of one that is sold."""

import random
from pathlib import Path

import pytest

from reservation.application.payments.refunds import RefundWish
from reservation.application.payments.webhooks import LOOK_UPS_PER_ORDER
from reservation.domain.states import Status
from reservation.sandbox.faults import Fault
from reservation.telemetry.metrics import ALARMS
from tests.faults.payments.environment import Story, World, world
from tests.faults.payments.matrix import NONE, Cell, Entry, Plan
from tests.faults.payments.workload import Wave


def alarms() -> float:
    return ALARMS.labels("cancelled_at_the_pg")._value.get()


async def sold(made: World) -> Story:
    """One order, paid for. The wave's own refunds exclude it."""
    wave = Wave(
        made,
        [Plan(Cell(NONE, NONE, Entry.SUCCESS))],
        outage_seconds=30.0,
        draw=random.Random(1),
        refunds=False,
    )
    await wave.run()
    assert wave.stories[0].status == Status.CONFIRMED
    return wave.stories[0]


async def test_the_webhook_of_our_own_pending_refund_raises_no_alarm(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        story = await sold(made)
        story.deaths = ["refund:after_cancel"]
        wish = RefundWish(
            order_id=story.order.order_id,
            reason="a test",
            restock=True,
            account=None,
            idempotency_key="once",
            operator="op",
        )
        await made.in_first(story, made.first.refunds.refund(wish))
        assert story.died_at == ["refund:after_cancel"]
        before = alarms()
        assert await made.deliver_webhook(story.order.order_id, story.payment_key)
        assert alarms() == before


async def test_a_foreign_cancel_raises_an_alarm(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        story = await sold(made)
        assert made.sandbox.cancel(story.payment_key).status_code == 200
        before = alarms()
        assert await made.deliver_webhook(story.order.order_id, story.payment_key)
        assert alarms() == before + 1


async def ended(made: World) -> Story:
    """One order whose hold ran out, and whose payment the PG approved nevertheless."""
    wave = Wave(
        made,
        [Plan(Cell(NONE, "confirm:before_claim", Entry.SETTLER))],
        outage_seconds=30.0,
        draw=random.Random(1),
        refunds=False,
    )
    await wave.run()
    story = wave.stories[0]
    assert story.status == Status.EXPIRED
    order = story.order
    confirmed = made.sandbox.confirm(story.payment_key, order.order_id, order.amount)
    assert confirmed.status_code == 200
    return story


@pytest.mark.parametrize(
    ("operation", "fault"),
    [
        ("look_up", Fault.ERROR_BEFORE_COMMIT),
        ("look_up", Fault.OTHER_KEY),
        ("cancel", Fault.ERROR_BEFORE_COMMIT),
        ("cancel", Fault.COMMIT_THEN_DROP),
    ],
)
async def test_a_late_webhook_is_retried_until_the_money_is_refunded(
    tmp_path: Path,
    valkey_url: str,
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    fault: Fault,
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        story = await ended(made)
        order_id = story.order.order_id
        made.sandbox.order_fault(fault, orderId=order_id, operations=[operation], times=1)
        assert not await made.deliver_webhook(order_id, story.payment_key)
        assert await made.deliver_webhook(order_id, story.payment_key)
        found = await made.second.store.read(order_id)
        assert found is not None
        assert found.status is Status.REFUNDED
        ledger = made.sandbox.ledger(order_id)
        assert ledger["charged"] == ledger["cancelled"] == story.order.amount


async def test_a_late_webhook_within_a_storm_is_retried(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        story = await ended(made)
        order_id = story.order.order_id
        for _ in range(LOOK_UPS_PER_ORDER.count):
            await made.deliver_webhook(order_id, "tboxforged0123456789")
            await made.clock.turn(1)
        assert not await made.deliver_webhook(order_id, story.payment_key)
        await made.clock.turn(LOOK_UPS_PER_ORDER.per_seconds)
        assert await made.deliver_webhook(order_id, story.payment_key)
        ledger = made.sandbox.ledger(order_id)
        assert ledger["charged"] == ledger["cancelled"] == story.order.amount


async def test_only_the_looked_up_payment_is_cancelled(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        story = await ended(made)
        order_id = story.order.order_id
        made.sandbox.order_fault(Fault.OTHER_KEY, orderId=order_id, operations=["look_up"])
        assert not await made.deliver_webhook(order_id, story.payment_key)
        asked = await made.second.sql.orders.history(order_id)
        assert "cancel" not in [row.what for row in asked]


async def test_a_webhook_of_a_payment_unknown_to_the_pg_is_not_retried(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        story = await sold(made)
        assert await made.deliver_webhook(story.order.order_id, "tboxforged0123456789")
