"""Simulation without one protection: some of its seeds must fail, and for that reason."""

from collections.abc import Sequence
from typing import Any

import pytest

from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.toss.client import TossGateway
from reservation.domain.events import Event
from reservation.domain.payment_gateway import Answer, Declined, Unknown
from reservation.sandbox.webhooks import Webhooks
from tests.faults.simulation.plans import Plan
from tests.faults.simulation.run import Ground, ground

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

#: The planted fault must be found within this many seeds.
SEEDS_MAX = 40
#: A hang here never ends: the wait is shorter than elsewhere.
REST_SECONDS = 240.0


def _is_found(here: Ground, sentence: str) -> bool:
    """Whether a seed fails with this in its findings; others may fail for a consequence of it."""
    for seed in range(1, SEEDS_MAX + 1):
        problems = here.run(Plan.of(seed), rest_seconds=REST_SECONDS).problems
        if any(sentence in problem for problem in problems):
            return True
    return False


def test_uncounted_stock_is_detected() -> None:
    old = "short = short or stock.available < line.quantity"
    with ground({"lib/sold_out.lua": (old, "short = false")}) as here:
        assert _is_found(here, "negative counter")


def test_a_lost_answer_taken_for_a_decline_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No webhook is sent: it would refund the late charge and hide the bug."""
    ask = TossGateway.confirm

    async def hasty(self: TossGateway, **what: Any) -> Answer:
        answer = await ask(self, **what)
        return Declined("REJECT_CARD_COMPANY", "") if isinstance(answer, Unknown) else answer

    def silent(*_: object) -> None:
        return

    monkeypatch.setattr(TossGateway, "confirm", hasty)
    monkeypatch.setattr(Webhooks, "publish", silent)
    with ground() as here:
        assert _is_found(here, "the PG's balance is")


def test_events_acknowledged_before_sql_has_them_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = RedisOutbox.read_new

    async def hasty(self: RedisOutbox, sale_id: str, count: int) -> Sequence[Event]:
        events = await read(self, sale_id, count)
        await self.ack(sale_id, [event.seq for event in events])
        return events

    monkeypatch.setattr(RedisOutbox, "read_new", hasty)
    with ground() as here:
        assert _is_found(here, "in confirmed orders")
