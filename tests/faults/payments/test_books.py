"""Books of the money tests can fail: money that is not ours to have is reported."""

import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from reservation.application.payments import resolve as conclude
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.payment_gateway import Unknown
from reservation.domain.payment_rules import Decision, Finish, decide
from reservation.sandbox.faults import Fault
from tests.faults.payments.books import Report, check
from tests.faults.payments.environment import World, world
from tests.faults.payments.matrix import NONE, Cell, Entry, Plan
from tests.faults.payments.workload import Wave

SETTLED = Plan(Cell(NONE, NONE, Entry.SUCCESS))
POINT = "confirm:after_call"
DROPPED = Plan(Cell(Fault.COMMIT_THEN_DROP.value, NONE, Entry.SETTLER))


async def waved(made: World, *plans: Plan) -> Wave:
    wave = Wave(made, list(plans), outage_seconds=30.0, draw=random.Random(1))
    await wave.run()
    return wave


async def test_a_charge_without_a_sale_is_reported(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        wave = await waved(made, SETTLED, DROPPED)
        assert await check(made, [wave]) == []
        order_id = wave.stories[0].order.order_id
        again = made.sandbox.put_payment(order_id, 500)
        assert made.sandbox.confirm(again, order_id, 500).status_code == 200
        assert any(order_id in problem for problem in await check(made, [wave]))


async def test_a_timeout_counted_as_a_refusal_is_reported(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conclude, "decide", hasty)
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        wave = await waved(made, DROPPED)
        assert wave.stories[0].status == "RELEASED"
        wrong = await check(made, [wave])
        assert any("is RELEASED and the PG has" in problem for problem in wrong)
        assert any("we sold 0" in problem for problem in wrong)


def hasty(answer: object, **case: object) -> Decision:
    decision_of: Callable[..., Decision] = decide
    if isinstance(answer, Unknown):
        reason = Reason(Cause.PROVIDER_DECLINED, "X")
        return Finish(Outcome(name=PaymentOutcome.DECLINED, reason=reason))
    return decision_of(answer, **case)


async def test_an_empty_cell_and_a_slow_settler_are_reported(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, valkey_url, monkeypatch) as made:
        wave = await waved(made, SETTLED, DROPPED)
    report = Report(wave.stories)
    assert DROPPED.cell not in report.empty()
    assert Cell(NONE, POINT, Entry.SETTLER) in report.empty()
    assert report.late() == []
    overtaken = msgspec.structs.replace(
        wave.stories[0], plan=Plan(Cell(NONE, POINT, Entry.SETTLER))
    )
    assert report.missed() == []
    assert ["died at []" in missed for missed in Report([overtaken]).missed()] == [True]
    dropped = next(story for story in wave.stories if story.plan == DROPPED)
    slow = msgspec.structs.replace(dropped, ended_at=dropped.ended_at + 61_000)
    assert Report([slow]).late() != []
