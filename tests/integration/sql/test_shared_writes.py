"""Batches of several sales in one transaction: each has its own outcome."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import pytest

from reservation.adapters.sql import events as events_module
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.event_writer import ApplyKind, ApplyOutcome
from reservation.adapters.sql.group_commit import GroupCommit
from reservation.adapters.sql.payments import AnswerRow
from reservation.adapters.sql.store import SqlStore
from tests.integration.sql.test_event_writer import a_whole_sale, everything
from tests.support.databases import PostgresServer
from tests.support.outbox import Tape

SALES = [f"s{number}" for number in range(9)]


@pytest.fixture
async def tapes(sql: SqlStore) -> dict[str, Tape]:
    """Sales in SQL, each with ten of `a` and five of `b` and all kinds of events."""
    made: dict[str, Tape] = {}
    for sale_id in SALES:
        await sql.sales.register(sale_id, "{}", 1)
        made[sale_id] = tape = Tape(sale_id)
        tape.put(a=10, b=5)
        # An order's id is unique among all sales.
        rename(tape, sale_id)
    return made


def rename(tape: Tape, sale_id: str) -> None:
    write = tape.write

    def named(name: str, order_id: str = "", data: Any = "{}") -> Any:
        return write(name, order_id and f"{sale_id}-{order_id}", data)

    tape.write = named
    a_whole_sale(tape)


@pytest.fixture
def transactions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """One entry for each transaction that writes."""
    made: list[object] = []
    run_write = Database.run_write

    async def count(database: Database, work: Callable[..., Any]) -> Any:
        made.append(work)
        return await run_write(database, work)

    monkeypatch.setattr(Database, "run_write", count)
    return made


async def apply_all(sql: SqlStore, tapes: dict[str, Tape]) -> dict[str, ApplyOutcome]:
    """Apply each sale's events, all at once."""
    asked: list[Awaitable[ApplyOutcome]] = [
        sql.events.apply(sale_id, tape.events) for sale_id, tape in tapes.items()
    ]
    return dict(zip(tapes, await asyncio.gather(*asked), strict=True))


async def test_batches_that_arrive_together_share_a_transaction(
    sql: SqlStore, tapes: dict[str, Tape], transactions: list[object]
) -> None:
    outcomes = await apply_all(sql, tapes)
    assert len(transactions) == 1
    for sale_id, tape in tapes.items():
        last = tape.events[-1].seq
        assert outcomes[sale_id] == ApplyOutcome(
            kind=ApplyKind.APPLIED, flushed_seq=last, written=last
        )
    again = await apply_all(sql, tapes)
    assert [one.written for one in again.values()] == [0] * len(SALES)


async def test_a_shared_transaction_writes_the_rows_of_a_transaction_per_sale(
    sql: SqlStore, tapes: dict[str, Tape]
) -> None:
    alone = "s0"
    await sql.events.apply(alone, tapes[alone].events)
    await apply_all(sql, {sale_id: tapes[sale_id] for sale_id in SALES if sale_id != alone})
    written = await everything(sql)
    rows_of = {"orders", "order_lines", "items", "events", "stock_movements", "cursors"}
    assert rows_of <= {table for table, rows in written.items() if rows}
    for table, rows in written.items():
        of_sale = {
            sale_id: [
                tuple(str(value).replace(sale_id, "S") for value in row)
                for row in rows
                if any(str(value).partition("-")[0] == sale_id for value in row)
            ]
            for sale_id in SALES
        }
        # Each event's chain covers the order's id.
        if table in ("events", "cursors"):
            of_sale = {sale: [row[:-1] for row in kept] for sale, kept in of_sale.items()}
        assert all(kept == of_sale[alone] for kept in of_sale.values()), table


async def test_a_transaction_has_a_bounded_number_of_events(
    sql: SqlStore,
    tapes: dict[str, Tape],
    transactions: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = len(tapes["s0"].events)
    monkeypatch.setattr(sql.events._group, "_weight_max", 3 * count + 1)
    await apply_all(sql, tapes)
    assert len(transactions) == 3
    monkeypatch.setattr(sql.events._group, "_weight_max", count - 1)
    await apply_all(sql, tapes)
    assert len(transactions) == 3 + len(SALES), "one batch may be larger"


async def test_an_invalid_event_stops_its_own_sale(sql: SqlStore, tapes: dict[str, Tape]) -> None:
    tapes["s3"].write("confirmed", "unknown")
    tapes["s5"].events.pop(4)
    found = await apply_all(sql, tapes | {"unknown": Tape("unknown")})
    kinds = {sale_id: found[sale_id].kind for sale_id in found}
    assert kinds.pop("s3") is ApplyKind.POISON
    assert kinds.pop("s5") is ApplyKind.GAP
    assert kinds.pop("unknown") is ApplyKind.UNKNOWN_SALE
    assert set(kinds.values()) == {ApplyKind.APPLIED}
    assert found["s3"].flushed_seq == tapes["s3"].events[-2].seq
    assert found["s5"].flushed_seq == 0


async def test_a_row_that_sql_refuses_stops_its_own_sale(
    sql: SqlStore, tapes: dict[str, Tape]
) -> None:
    """The projection accepts the event, and the whole transaction fails."""
    other = tapes["s2"].events[1].order_id
    bad = Tape("bad")
    await sql.sales.register("bad", "{}", 1)
    bad.put(a=10, b=5)
    assert (await sql.events.apply("s2", tapes["s2"].events)).kind is ApplyKind.APPLIED
    bad.prepare(other, a=1)
    found = await apply_all(sql, {"bad": bad} | tapes)
    assert (found["bad"].kind, found["bad"].seq) == (ApplyKind.POISON, 2)
    assert {found[sale_id].kind for sale_id in SALES} == {ApplyKind.APPLIED}


async def test_an_order_that_two_sales_create_is_written_once(
    sql: SqlStore, tapes: dict[str, Tape]
) -> None:
    """The projection of a sale has no such order: only a constraint detects the second one."""
    twins = {"left": Tape("left"), "right": Tape("right")}
    for sale_id, tape in twins.items():
        await sql.sales.register(sale_id, "{}", 1)
        tape.put(a=10)
        tape.prepare("twin", a=1)
    found = await apply_all(sql, twins)
    assert [found[sale_id].kind for sale_id in twins] == [ApplyKind.APPLIED, ApplyKind.POISON]
    order = await sql.orders.get("twin")
    assert order is not None
    assert order.sale_id == "left"


async def test_another_epoch_refuses_its_own_sale(sql: SqlStore, tapes: dict[str, Tape]) -> None:
    found = await asyncio.gather(
        sql.events.apply("s0", tapes["s0"].events, epoch="another"),
        sql.events.apply("s1", tapes["s1"].events),
    )
    assert [one.kind for one in found] == [ApplyKind.OTHER_EPOCH, ApplyKind.APPLIED]


async def test_two_batches_of_one_sale_are_written_one_after_the_other(
    sql: SqlStore, tapes: dict[str, Tape], transactions: list[object]
) -> None:
    events = tapes["s0"].events
    found = await asyncio.gather(
        sql.events.apply("s0", events[:5]),
        sql.events.apply("s1", tapes["s1"].events),
        sql.events.apply("s0", events[5:]),
        sql.events.apply("s0", events),
    )
    assert [one.kind for one in found] == [ApplyKind.APPLIED] * 4
    assert [one.written for one in found] == [5, len(tapes["s1"].events), len(events) - 5, 0]
    assert len(transactions) == 1


async def test_an_outage_is_raised_to_every_caller(
    sql: SqlStore, tapes: dict[str, Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **_more: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(events_module, "write_batches", away)
        asked = [sql.events.apply(sale_id, tape.events) for sale_id, tape in tapes.items()]
        found = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in found] == [OSError] * len(SALES)
    outcomes = await apply_all(sql, tapes)
    assert {outcome.kind for outcome in outcomes.values()} == {ApplyKind.APPLIED}


async def test_a_value_that_the_driver_refuses_fails_its_own_caller(sql: SqlStore) -> None:
    async def add(number: int) -> None:
        at_ms = 2**63 if number == 3 else 1
        answer = AnswerRow(
            order_id=f"o{number}", payment_key="k", kind="confirm", answer="{}", created_at_ms=at_ms
        )
        await sql.payments.add_answer(answer)

    ends = await asyncio.gather(*(add(number) for number in range(8)), return_exceptions=True)
    assert [number for number, end in enumerate(ends) if isinstance(end, Exception)] == [3]


async def test_callers_behind_a_cancelled_batch_are_cancelled() -> None:
    """The batch is being repeated item by item."""
    alone = asyncio.Event()

    async def commit(items: Sequence[int]) -> list[int]:
        if len(items) > 1:
            raise ValueError("one of them is wrong")
        alone.set()
        await asyncio.sleep(3600)
        return list(items)

    group = GroupCommit[int, int](commit)
    callers = [asyncio.create_task(group.submit(number)) for number in range(4)]
    await alone.wait()
    assert group._running is not None
    group._running.cancel()
    ends = await asyncio.wait_for(asyncio.gather(*callers, return_exceptions=True), 30)
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 4


async def test_a_locked_sale_delays_no_other(postgres: PostgresServer) -> None:
    url = await asyncio.to_thread(postgres.make_database)
    sql = await SqlStore.open(url)
    other = await asyncpg.connect(url)
    try:
        tapes = {sale_id: Tape(sale_id) for sale_id in SALES}
        for sale_id, tape in tapes.items():
            await sql.sales.register(sale_id, "{}", 1)
            tape.put(a=10)
        lock = other.transaction()
        await lock.start()
        await other.execute("SELECT * FROM cursors WHERE sale_id = 's3' FOR UPDATE")
        asked = {
            sale_id: asyncio.create_task(sql.events.apply(sale_id, tape.events))
            for sale_id, tape in tapes.items()
        }
        others = [task for sale_id, task in asked.items() if sale_id != "s3"]
        done, _ = await asyncio.wait(others, timeout=10)
        assert {task.result().kind for task in done} == {ApplyKind.APPLIED}
        assert len(done) == len(others)
        assert not asked["s3"].done()
        await lock.rollback()
        assert (await asked["s3"]).kind is ApplyKind.APPLIED
    finally:
        await other.close()
        await sql.aclose()
