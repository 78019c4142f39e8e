"""Pending work of sales, as the worker reads it from a real server."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reservation.adapters.redis.pending_work import DAMAGED, SALES_AT_ONCE, PendingWorkReader
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
    work = (await reader_of(here).read([sale_id]))[sale_id]
    assert (work.deadline_ms, work.lease_ms, work.deposit_ms) == (None, None, None)
    assert (work.seq, work.outbox) == (1, 1)


async def test_a_hold_shows_its_event_and_its_deadline(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    work = (await reader_of(here).read([sale_id]))[sale_id]
    assert (work.seq, work.outbox) == (2, 2)
    deadlines = await here.service.store.first_deadlines(sale_id, 1)
    assert work.deadline_ms == deadlines[order.order_id]


async def test_a_claimed_payment_shows_the_end_of_its_lease(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.claim(order)
    work = (await reader_of(here).read([sale_id]))[sale_id]
    leases = await here.service.store.first_leases(sale_id, 1)
    assert work.lease_ms == leases[order.order_id]
    assert work.deadline_ms is None


async def test_a_damaged_sale_has_work_of_every_kind(here: Bench) -> None:
    sale_id = await here.sale()
    key = here.service.keys.of(sale_id).deadlines
    await here.service.connections.command("SET", key, "not a sorted set")
    assert (await reader_of(here).read([sale_id]))[sale_id] is DAMAGED


async def test_a_sale_without_keys_has_no_event(here: Bench) -> None:
    work = (await reader_of(here).read(["gone"]))["gone"]
    assert (work.seq, work.outbox) == (-1, 0)


async def test_more_sales_than_one_exchange_takes_are_all_read(here: Bench) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    others = [f"gone-{number}" for number in range(SALES_AT_ONCE + 5)]
    found = await reader_of(here).read([*others, sale_id])
    assert list(found) == [*others, sale_id]
    assert found[sale_id].seq == 2
