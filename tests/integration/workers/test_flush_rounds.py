"""Rounds of the flusher: a large batch is followed by another one, a small one by a pause."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.workers import runner
from reservation.workers.runner import Worker
from tests.support.in_process import Bench, bench


@pytest.fixture
async def shop(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


@pytest.mark.parametrize(("least", "is_followed"), [(2, True), (100, False)])
async def test_only_a_large_batch_is_followed_by_another_at_once(
    shop: Bench, monkeypatch: pytest.MonkeyPatch, least: int, is_followed: bool
) -> None:
    monkeypatch.setattr(runner, "FLUSH_AGAIN_EVENTS", least)
    sale_id = await shop.sale()
    for buyer in ("ann", "ben", "eve"):
        await shop.hold(sale_id, buyer)
    worker = Worker(shop.service)
    await worker._list_sales()
    assert bool(await worker._flush(sale_id)) is is_followed
    # Both have written everything.
    head = (await shop.service.sql.sales.heads())[sale_id]
    assert head.seq >= 3
    assert await shop.service.outbox.backlog(sale_id) == 0
