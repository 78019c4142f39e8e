"""A cancelled payment of a sold order is an alarm only where the cancel is not our own refund."""

import random
from pathlib import Path

import pytest

from reservation.domain.states import Status
from reservation.metrics import ALARMS
from reservation.refund import RefundWish
from tests.money.plan import NONE, Cell, Entry, Plan
from tests.money.wave import Wave
from tests.money.world import Story, World, world


def alarms() -> float:
    return ALARMS.labels("cancelled_at_the_pg")._value.get()


async def sold(made: World) -> Story:
    """One order, paid for. The wave's own refunds are kept from it."""
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


async def test_the_webhook_of_our_own_unfinished_refund_is_no_alarm(
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
        await made.in_first(story, made.first.refund(wish))
        assert story.died_at == ["refund:after_cancel"]
        before = alarms()
        assert await made.hear(story.order.order_id, story.payment_key)
        assert alarms() == before


async def test_a_cancel_that_nobody_here_asked_for_is_an_alarm(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        story = await sold(made)
        assert made.sandbox.cancel(story.payment_key).status_code == 200
        before = alarms()
        assert await made.hear(story.order.order_id, story.payment_key)
        assert alarms() == before + 1
