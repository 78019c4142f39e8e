"""Transfers in SQL: the row of a lend comes with its event, and never before it."""

from typing import Any

import pytest
from sqlalchemy import select

from reservation.adapters.sql import tables
from reservation.adapters.sql.event_writer import ApplyKind
from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.transfers import LastTransfer, LendRow
from tests.support.outbox import Tape

DONOR = "s.2"


@pytest.fixture
async def tape(sql: SqlStore) -> Tape:
    """A partition that SQL knows, with ten of `a`."""
    await sql.sales.register(DONOR, "{}", 1)
    made = Tape(DONOR)
    made.put(a=10)
    return made


def lent(number: int, units: int, up_to: int, seq: int, **changes: Any) -> LendRow:
    row = {"receiver": 1, "sku": "a", "operation": f"op-{number}"} | changes
    return LendRow(sale_id=DONOR, number=number, units=units, up_to=up_to, seq=seq, **row)


async def rows(sql: SqlStore) -> list[tuple[Any, ...]]:
    async with sql.database.read() as connection:
        found = await connection.execute(select(tables.transfers))
        return [tuple(row) for row in found]


async def test_the_row_of_a_lend_is_written_with_its_event(sql: SqlStore, tape: Tape) -> None:
    tape.transfer("lent", number=1, units=4, up_to=4, total=6)
    tape.transfer("borrowed", number=3, units=1, up_to=1, total=7)
    tape.transfer("lent", number=2, units=2, up_to=6, total=5)
    first, second, third, fourth = tape.events
    await sql.events.apply(DONOR, [first])
    assert await sql.transfers.get(DONOR, 1, "a", 1) is None
    await sql.events.apply(DONOR, [second, third])
    assert await sql.transfers.get(DONOR, 1, "a", 1) == lent(1, 4, 4, 2)
    assert await sql.transfers.get(DONOR, 1, "a", 2) is None
    await sql.events.apply(DONOR, tape.events)
    await sql.events.apply(DONOR, [fourth])
    assert await sql.transfers.list_after(DONOR, 1, "a", 0, 9) == [
        lent(1, 4, 4, 2),
        lent(2, 2, 6, 4),
    ]
    assert await sql.transfers.list_after(DONOR, 1, "a", 1, 9) == [lent(2, 2, 6, 4)]
    assert await sql.transfers.list_after(DONOR, 1, "a", 0, 1) == [lent(1, 4, 4, 2)]
    assert await sql.transfers.list_last(["s.0", DONOR], 1) == [lent(2, 2, 6, 4)]
    assert await sql.transfers.list_last([DONOR], 0) == []
    assert await sql.transfers.list_last([], 1) == []


async def test_a_refused_batch_leaves_no_row(sql: SqlStore, tape: Tape) -> None:
    tape.transfer("lent", number=1, units=4, up_to=4, total=9)
    outcome = await sql.events.apply(DONOR, tape.events)
    assert (outcome.kind, outcome.seq) == (ApplyKind.POISON, 2)
    assert await rows(sql) == []


@pytest.mark.parametrize(("number", "units"), [(1, 1), (2, 0)])
async def test_a_lend_of_an_earlier_number_or_of_no_unit_is_poison(
    sql: SqlStore, tape: Tape, number: int, units: int
) -> None:
    tape.transfer("lent", number=1, units=4, up_to=4, total=6)
    tape.transfer("lent", number=number, units=units, up_to=4 + units, total=6 - units)
    outcome = await sql.events.apply(DONOR, tape.events)
    assert (outcome.kind, outcome.seq, outcome.flushed_seq) == (ApplyKind.POISON, 3, 2)
    assert [row[3] for row in await rows(sql)] == [1]


async def test_the_last_transfers_come_from_the_events(sql: SqlStore, tape: Tape) -> None:
    tape.transfer("lent", number=1, units=4, up_to=4, total=6)
    tape.transfer("borrowed", number=1, units=1, up_to=1, total=7)
    tape.transfer("borrowed", number=4, units=2, up_to=3, total=9)
    tape.transfer("lent", number=2, units=2, up_to=6, total=7)
    await sql.events.apply(DONOR, tape.events)
    assert await sql.transfers.last_of(DONOR) == {
        ("lent", 1, "a"): LastTransfer(1, "a", 2, 2, 6, "op-2"),
        ("received", 1, "a"): LastTransfer(1, "a", 4, 2, 3),
    }
    assert await sql.transfers.last_of("s.1") == {}
