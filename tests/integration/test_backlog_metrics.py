"""How far SQL is behind, as an alert sees it, most of all while SQL is away."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sqlalchemy.exc import OperationalError

from reservation.workers.runner import Worker
from tests.fixtures.in_process import Bench, bench


@pytest.fixture
async def shop(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


def seen(name: str, sale_id: str) -> float | None:
    return REGISTRY.get_sample_value(f"reservation_outbox_{name}", {"sale": sale_id})


async def test_a_backlog_grows_in_length_and_age_while_sql_is_away(
    shop: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await shop.sale()
    await shop.hold(sale_id)
    worker = Worker(shop.service)

    async def away(*_: Any) -> None:
        raise OperationalError("apply", {}, OSError("away"))

    with monkeypatch.context() as broken:
        broken.setattr(shop.service.ledger, "apply", away)
        ages: list[float] = []
        for _ in range(2):
            with pytest.raises(OperationalError):
                await worker._flush(sale_id)
            ages.append(seen("oldest_seconds", sale_id) or 0.0)
            await asyncio.sleep(0.02)
    assert 0 < ages[0] < ages[1]
    backlog = seen("backlog_events", sale_id)
    assert backlog
    await worker._flush(sale_id)
    await worker._flush(sale_id)
    assert (seen("backlog_events", sale_id), seen("oldest_seconds", sale_id)) == (0, 0)
