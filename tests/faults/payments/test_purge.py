"""A purge removes the rows that a sale no longer needs, and keeps every order with a payment."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from reservation.adapters.sql import purges
from reservation.adapters.sql.payments import AnswerRow
from reservation.adapters.sql.purges import PurgeRepository
from reservation.adapters.sql.tables import (
    events,
    metadata,
    order_lines,
    orders,
    payment_intents,
    sales,
    stock_movements,
)
from reservation.application.retention import retirement
from reservation.application.retention.purge import PurgeReport
from reservation.domain.errors import SaleNotFound
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import SaleStatus, Status
from tests.faults.payments.shop import approve, current_status, kept_money, refund_wish, shop
from tests.faults.payments.test_follow_up import declined, sold
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

DAYS = 40
DAY_MS = 86_400_000


@pytest.fixture(autouse=True)
def removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a retired sale go in the same round."""
    monkeypatch.setattr(retirement, "REMOVE_AFTER_MS", -60_000)


class Past:
    """A retired sale with orders of each kind."""

    def __init__(self, here: Bench, sandbox: RunningSandbox) -> None:
        self.here = here
        self.sandbox = sandbox
        self.unpaid: list[Reservation] = []

    async def begin(self, days: int = DAYS) -> None:
        here = self.here
        self.sale_id = await here.sale()
        self.paid, _ = await sold(here, self.sandbox, self.sale_id)
        self.refunded, _ = await sold(here, self.sandbox, self.sale_id)
        await here.flush(self.sale_id)
        assert await here.service.refunds.refund(refund_wish(self.refunded))
        self.declined, self.declined_key = await declined(here, self.sandbox, self.sale_id)
        for buyer in ("bob", "cat", "dan"):
            order = await here.hold(self.sale_id, buyer)
            await here.service.releases.release(order, reason=Reason(Cause.BUYER))
            self.unpaid.append(order)
        await self.retire()
        await self.age(days)

    async def retire(self) -> None:
        service = self.here.service
        await service.sales.switch(self.sale_id, SaleStatus.CLOSED, reason="over", operator="op")
        await self.here.flush(self.sale_id)
        for due in await service.sql.payments.list_due_checks(2**53, 100):
            await service.sql.payments.remove_check(due)
        await service.retirement.archive(self.sale_id, reason="r", operator="op")
        await service.retirement.run_once()

    async def age(self, days: int) -> None:
        """The sale was retired this long ago."""
        at_ms = self.here.service.clock.now_ms() - days * DAY_MS - 1
        async with self.here.service.sql.database.write() as connection:
            await connection.execute(
                update(sales).where(sales.c.sale_id == self.sale_id).values(retired_at_ms=at_ms)
            )

    async def purge(self) -> PurgeReport:
        return await self.here.service.purge.run(self.sale_id, operator="op", reason="old")

    async def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of each table."""
        found: dict[str, list[tuple[Any, ...]]] = {}
        async with self.here.service.sql.database.snapshot() as connection:
            for table in metadata.sorted_tables:
                answer = await connection.execute(select(table).order_by(*table.primary_key))
                found[table.name] = [tuple(row) for row in answer]
        return found


@pytest.fixture
async def past(tmp_path: Path, valkey_url: str, database_url: str) -> AsyncIterator[Past]:
    """The shop on each database."""
    url = "" if database_url.startswith("sqlite") else database_url
    async with shop(
        tmp_path,
        valkey_url,
        RESERVATION_DATABASE_URL=url,
        RESERVATION_RETENTION_DAYS=str(DAYS),
    ) as (here, sandbox):
        made = Past(here, sandbox)
        await made.begin()
        yield made


async def count(past: Past, table: Any, column: Any, order: Reservation) -> int:
    async with past.here.service.sql.database.read() as connection:
        found = await connection.execute(select(column).where(column == order.order_id))
        return len(found.all())


async def test_orders_without_a_payment_go_and_all_money_stays(past: Past) -> None:
    before = await past.rows()

    preview = await past.here.service.purge.preview(past.sale_id)
    assert await past.rows() == before
    report = await past.purge()

    assert report == preview
    assert (report.orders, report.events, report.refusal) == (3, 6, "")
    after = await past.rows()
    assert len(before["orders"]) - len(after["orders"]) == 3
    assert after["stock_movements"] == []
    for kept in ("payments", "payment_attempts", "refunds", "sales", "items", "cursors"):
        assert after[kept] == before[kept]
    for order in (past.paid, past.refunded, past.declined):
        assert await past.here.service.store.read(order.order_id) is not None
    for order in past.unpaid:
        for table in (orders, order_lines, events):
            assert await count(past, table, table.c.order_id, order) == 0
    for order in (past.paid, past.refunded, past.declined):
        kept_events = [row for row in before["events"] if order.order_id in row]
        assert kept_events == [row for row in after["events"] if order.order_id in row]
        assert await count(past, order_lines, order_lines.c.order_id, order) == 1
    assert {row[3] for row in after["payment_answers"]} <= {"cancel"}
    async with past.here.service.sql.database.read() as connection:
        copies = await connection.execute(select(payment_intents.c.reservation))
        assert set(copies.scalars()) == {None}
    assert await past.here.audited(past.sale_id) == ()


async def answered(past: Past, order: Reservation, kind: str, at_ms: int = 1) -> None:
    """An answer of the PG about a payment that the order never had."""
    await past.here.service.sql.payments.add_answer(
        AnswerRow(
            order_id=order.order_id,
            payment_key="another-key",
            kind=kind,
            answer='{"type":"PaymentMissing"}',
            created_at_ms=at_ms,
        )
    )


async def test_the_answers_about_a_removed_order_go_with_it(past: Past) -> None:
    order, other, third = past.unpaid
    for kind in ("look_up", "look_up", "confirm", "cancel"):
        await answered(past, order, kind)
    await answered(past, other, "look_up")
    preview = await past.here.service.purge.preview(past.sale_id)
    # It arrives after the purge began.
    await answered(past, third, "look_up", at_ms=2**53)

    report = await past.purge()

    assert report == preview
    left = [row for row in (await past.rows())["payment_answers"] if "another-key" in row]
    assert sorted((row[1], row[3]) for row in left) == sorted(
        [(order.order_id, "cancel"), (third.order_id, "look_up")]
    )
    assert await past.purge() == report


async def test_the_record_names_who_purged_what(past: Past) -> None:
    report = await past.purge()
    row = await past.here.service.sql.purges.get(past.sale_id)
    assert row is not None
    assert (row.operator, row.reason, row.orders) == ("op", "old", report.orders)
    assert row.done_at_ms is not None
    # A repeat changes nothing.
    rows = await past.rows()
    assert await past.purge() == report
    assert await past.rows() == rows


async def test_late_money_of_a_purged_sale_is_given_back(past: Past) -> None:
    await past.purge()
    approve(past.sandbox, past.declined_key, past.declined)

    await past.here.service.notifications.receive(past.declined.order_id, past.declined_key)

    assert kept_money(past.sandbox, past.declined) == 0
    assert await current_status(past.here.service, past.declined) is Status.REFUNDED
    assert await past.here.audited(past.sale_id) == ()


async def test_an_order_of_a_purged_sale_is_refunded(past: Past) -> None:
    await past.purge()

    assert await past.here.service.refunds.refund(refund_wish(past.paid))

    assert kept_money(past.sandbox, past.paid) == 0
    assert await past.here.audited(past.sale_id) == ()


async def test_a_broken_chain_after_the_purge_is_found(past: Past) -> None:
    await past.purge()
    assert await past.here.service.refunds.refund(refund_wish(past.paid))
    async with past.here.service.sql.database.write() as connection:
        await connection.execute(
            update(events)
            .where(events.c.order_id == past.paid.order_id, events.c.event == "refunded")
            .values(chain="0" * 40)
        )
    assert "chain" in (await past.here.audited(past.sale_id))[0]


async def test_a_sale_that_is_live_or_too_recent_keeps_its_rows(past: Past) -> None:
    live = await past.here.sale()
    await past.age(DAYS - 1)
    before = await past.rows()
    service = past.here.service
    for sale_id, reason in ((live, "not retired"), (past.sale_id, "too recently")):
        for report in (
            await service.purge.preview(sale_id),
            await service.purge.run(sale_id, operator="op", reason="old"),
        ):
            assert reason in report.refusal
            assert report.orders == 0
    assert await service.purge.due() == []
    assert await past.rows() == before
    with pytest.raises(SaleNotFound):
        await service.purge.run("no-such-sale", operator="op", reason="old")


async def test_a_sale_with_a_payment_in_progress_keeps_its_rows(past: Past) -> None:
    service = past.here.service
    await service.sql.payments.schedule_check(past.declined_key, past.declined.order_id, 1)
    before = await past.rows()
    assert "still checked" in (await past.purge()).refusal
    assert "still checked" in (await service.purge.preview(past.sale_id)).refusal
    assert await past.rows() == before
    async with service.sql.database.write() as connection:
        await connection.execute(update(payment_intents).values(ended_at_ms=None))
    for due in await service.sql.payments.list_due_checks(2**53, 100):
        await service.sql.payments.remove_check(due)
    assert "undecided" in (await past.purge()).refusal


class _Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("calls", range(1, 9))
async def test_a_purge_that_is_interrupted_continues(
    past: Past, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    monkeypatch.setattr(purges, "BATCH", 2)
    preview = await past.here.service.purge.preview(past.sale_id)
    left = calls
    with monkeypatch.context() as patch:
        for name in ("begin", "remove_unpaid", "remove_movements", "remove_answers", "finish"):
            step = getattr(PurgeRepository, name)

            async def killed_after(self: Any, *more: Any, _step: Any = step, **named: Any) -> Any:
                nonlocal left
                if not left:
                    raise _Killed
                left -= 1
                return await _step(self, *more, **named)

            patch.setattr(PurgeRepository, name, killed_after)
        with pytest.raises(_Killed):
            await past.purge()
    assert await past.here.audited(past.sale_id) == ()

    report = await past.purge()

    assert report == preview
    assert (await past.rows())["stock_movements"] == []
    assert await past.here.audited(past.sale_id) == ()


async def test_live_sales_are_untouched_by_a_purge(past: Past) -> None:
    live = await past.here.sale()
    order = await past.here.hold(live)
    await past.here.service.releases.release(order, reason=Reason(Cause.BUYER))
    await past.here.flush(live)
    tables = (orders, events, stock_movements)

    async def rows() -> list[Any]:
        async with past.here.service.sql.database.read() as connection:
            return [
                (await connection.execute(select(table).where(table.c.sale_id == live))).all()
                for table in tables
            ]

    before = await rows()
    assert all(before)
    assert (await past.purge()).orders == 3
    assert await rows() == before
