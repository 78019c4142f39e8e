"""Pending work of sales, as the worker reads it from a real server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.adapters.redis.pending_work import DAMAGED, PendingWorkReader
from reservation.domain.states import SaleStatus
from tests.support.in_process import Bench, bench


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


def reader_of(here: Bench) -> PendingWorkReader:
    return PendingWorkReader(here.service.connections, here.service.keys)


async def test_a_flushed_sale_without_holds_has_one_outbox_entry_and_no_times(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    work = (await reader_of(here).read({sale_id: None}))[sale_id]
    assert (work.deadline_ms, work.lease_ms, work.deposit_ms) == (None, None, None)
    assert (work.seq, work.outbox) == (1, 1)


async def test_a_hold_shows_its_event_and_its_deadline(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    work = (await reader_of(here).read({sale_id: None}))[sale_id]
    assert (work.seq, work.outbox) == (2, 2)
    deadlines = await here.service.store.first_deadlines(sale_id, 1)
    assert work.deadline_ms == deadlines[order.order_id]


async def test_a_claimed_payment_shows_the_end_of_its_lease(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.claim(order)
    work = (await reader_of(here).read({sale_id: None}))[sale_id]
    leases = await here.service.store.first_leases(sale_id, 1)
    assert work.lease_ms == leases[order.order_id]
    assert work.deadline_ms is None


async def test_a_damaged_sale_has_work_of_every_kind(here: Bench) -> None:
    sale_id = await here.sale()
    key = here.service.keys.of(sale_id).deadlines
    await here.service.connections.command("SET", key, "not a sorted set")
    assert (await reader_of(here).read({sale_id: None}))[sale_id] is DAMAGED


async def test_a_sale_without_keys_has_no_event(here: Bench) -> None:
    work = (await reader_of(here).read({"gone": None}))["gone"]
    assert (work.seq, work.outbox) == (-1, 0)


async def test_a_known_sale_is_read_again_after_its_next_event(here: Bench) -> None:
    quiet, busy = await here.sale(), await here.sale()
    reader = reader_of(here)
    before = await reader.read({quiet: None, busy: None})
    await here.hold(busy)
    after = await reader.read(before)
    assert after[quiet] is before[quiet]
    assert (before[busy].seq, after[busy].seq) == (1, 2)
    assert after[busy].deadline_ms is not None


async def test_a_known_sale_that_is_gone_or_damaged_is_read_again(here: Bench) -> None:
    gone, damaged = await here.sale(), await here.sale()
    reader = reader_of(here)
    before = await reader.read({gone: None, damaged: None})
    await here.lose(gone)
    key = here.service.keys.of(damaged).sale
    await here.service.connections.command("DEL", key)
    await here.service.connections.command("SET", key, "text")
    after = await reader.read(before)
    assert (after[gone].seq, after[damaged]) == (-1, DAMAGED)


async def test_a_sale_that_an_operator_closed_is_over_at_once(here: Bench) -> None:
    sale_id = await here.sale()
    reader = reader_of(here)
    work = (await reader.read({sale_id: None}))[sale_id]
    assert work.closes_at_ms > here.service.clock.now_ms()
    await here.service.sales.switch(sale_id, SaleStatus.CLOSED, reason="test", operator="op")
    assert (await reader.read({sale_id: None}))[sale_id].closes_at_ms == 0
