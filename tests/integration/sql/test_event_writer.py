"""The flusher's write: each event takes effect once, in order, or not at all."""

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from sqlalchemy import select

from reservation.adapters.sql import tables
from reservation.adapters.sql.event_writer import ApplyKind
from reservation.adapters.sql.events import EVENTS_MAX
from reservation.adapters.sql.sales import SkuFold
from reservation.adapters.sql.store import SqlStore
from reservation.domain.events import Event, chain_of
from tests.support.outbox import START_MS, Tape


@pytest.fixture
async def tape(sql: SqlStore) -> Tape:
    """A sale in SQL, with ten of `a` and five of `b`."""
    await sql.sales.register("s", "{}", 1)
    tape = Tape()
    tape.put(a=10, b=5)
    return tape


async def rows(sql: SqlStore, table: Any) -> list[Any]:
    async with sql.database.read() as connection:
        found = await connection.execute(select(table).order_by(*table.primary_key.columns))
        return [tuple(row) for row in found]


async def everything(sql: SqlStore) -> dict[str, list[Any]]:
    return {
        table.name: await rows(sql, table)
        for table in tables.metadata.sorted_tables
        if table.name not in ("probes", "sales")
    }


def pages(events: list[Event], size: int) -> Iterator[list[Event]]:
    for start in range(0, len(events), size):
        yield events[start : start + size]


def a_whole_sale(tape: Tape) -> None:
    """Every event and every edge of the table."""
    tape.sell("sold", buyer="ann", a=2)
    tape.prepare("left", a=1, b=1)
    tape.move("released", "left", "HELD", "RELEASED", cause="buyer")
    tape.prepare("late", b=2)
    tape.move("expired", "late", "HELD", "EXPIRED", cause="deadline")
    tape.claim("late", origin="EXPIRED")
    tape.move("taken_over", "late", "CONFIRMING", "CONFIRMING", fence=2, leaseUntil=START_MS)
    tape.move("declined", "late", "CONFIRMING", "RELEASED", fence=2, cause="REJECT")
    tape.write("restocked", data={"sku": "a", "delta": -1, "total": 9})
    tape.transfer("lent", number=1, units=2, up_to=2, total=7)
    tape.transfer("borrowed", number=1, units=1, up_to=1, total=8)
    tape.transfer("borrowed", number=4, units=1, up_to=2, total=9)
    tape.write("sale_switched", data={"status": "paused", "operator": "op", "reason": "r"})
    tape.prepare("account", buyer="bob", a=1)
    tape.claim("account")
    tape.move(
        "awaiting_deposit", "account", "CONFIRMING", "AWAITING_DEPOSIT", fence=1, dueAt=START_MS
    )
    tape.prepare("back", a=1)
    tape.claim("back")
    tape.move("voided", "back", "CONFIRMING", "HELD", fence=1, cause="unknown key")
    tape.sell("gone", a=1, b=1)
    tape.move("refunded", "gone", "CONFIRMED", "REFUNDED", fence=1, restock=False, cause="broken")
    tape.sell("returned", a=1)
    tape.move("refunded", "returned", "CONFIRMED", "REFUNDED", fence=1, restock=True, cause="c")
    tape.prepare("unheld", to="PREPARED", b=1)
    tape.prepare("charged", b=1)
    tape.claim("charged")
    tape.move("refunded", "charged", "CONFIRMING", "REFUNDED", fence=1, cause="cannot be served")
    tape.write("rebuilt", data={"epoch": "1" * 16, "operator": "op"})


AT_THE_END = {
    "a": SkuFold(total=8, available=4, held=2, confirming=0, sold=2),
    "b": SkuFold(total=4, available=4, held=0, confirming=0, sold=0),
}


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_any_batching_of_the_outbox_gives_the_same_rows(
    sql: SqlStore, tape: Tape, size: int
) -> None:
    a_whole_sale(tape)
    for page in pages(tape.events, size):
        outcome = await sql.events.apply("s", page)
        assert (outcome.kind, outcome.written) == (ApplyKind.APPLIED, len(page))

    fold = await sql.sales.counters("s")
    assert fold is not None
    assert (fold.flushed_seq, fold.chain) == (len(tape.events), tape.events[-1].chain)
    assert fold.skus == AT_THE_END
    assert await sql.events.cursor("s") == (len(tape.events), tape.events[-1].chain)
    assert await sql.events.list_after("s", 0, 1000) == tape.events
    statuses = {row.order_id: row.status for row in (await sql.orders.page())[0]}
    assert statuses == {
        "sold": "CONFIRMED",
        "left": "RELEASED",
        "late": "RELEASED",
        "account": "AWAITING_DEPOSIT",
        "back": "HELD",
        "gone": "REFUNDED",
        "returned": "REFUNDED",
        "unheld": "PREPARED",
        "charged": "REFUNDED",
    }


async def test_movements_add_up_to_the_counters(sql: SqlStore, tape: Tape) -> None:
    a_whole_sale(tape)
    await sql.events.apply("s", tape.events)
    sums: dict[str, list[int]] = {}
    for _, _, sku, available, held, sold, total in await rows(sql, tables.stock_movements):
        counters = sums.setdefault(sku, [0, 0, 0, 0])
        for position, delta in enumerate((total, available, held, sold)):
            counters[position] += delta
    assert sums == {
        sku: [fold.total, fold.available, fold.held, fold.sold] for sku, fold in AT_THE_END.items()
    }
    items = await rows(sql, tables.items)
    assert {row[1]: list(row[5:9]) for row in items} == sums


async def test_a_replay_from_the_start_changes_nothing(sql: SqlStore, tape: Tape) -> None:
    a_whole_sale(tape)
    await sql.events.apply("s", tape.events)
    before = await everything(sql)
    for size in (1, 10, 1000):
        for page in pages(tape.events, size):
            outcome = await sql.events.apply("s", page)
            assert (outcome.kind, outcome.written) == (ApplyKind.APPLIED, 0)
    assert await everything(sql) == before


async def test_a_batch_overlapping_written_events_adds_the_rest(sql: SqlStore, tape: Tape) -> None:
    a_whole_sale(tape)
    await sql.events.apply("s", tape.events[:10])
    outcome = await sql.events.apply("s", tape.events[5:20])
    assert (outcome.kind, outcome.written, outcome.flushed_seq) == (ApplyKind.APPLIED, 10, 20)


async def test_a_gap_reports_the_missing_event_and_writes_nothing(
    sql: SqlStore, tape: Tape
) -> None:
    a_whole_sale(tape)
    await sql.events.apply("s", tape.events[:3])
    before = await everything(sql)
    ahead = await sql.events.apply("s", tape.events[4:])
    inside = await sql.events.apply("s", [*tape.events[3:6], *tape.events[7:]])
    assert (ahead.kind, ahead.seq, ahead.flushed_seq) == (ApplyKind.GAP, 4, 3)
    assert (inside.kind, inside.seq, inside.flushed_seq) == (ApplyKind.GAP, 7, 3)
    assert await everything(sql) == before


async def test_a_different_event_at_a_written_seq_is_a_conflict(sql: SqlStore, tape: Tape) -> None:
    tape.prepare("o", a=1)
    await sql.events.apply("s", tape.events)
    other = Tape(seq=1, chain=tape.events[0].chain)
    other.prepare("p", a=1)
    other.prepare("q", a=1)
    before = await everything(sql)
    outcome = await sql.events.apply("s", other.events)
    assert (outcome.kind, outcome.seq, outcome.written) == (ApplyKind.CONFLICT, 2, 0)
    assert await everything(sql) == before


@pytest.mark.parametrize(
    "change",
    [
        {"data": '{"forged":true}'},
        {"order_id": "other"},
        {"at_ms": 1},
        {"chain": "f" * 40},
    ],
)
async def test_a_broken_chain_reports_its_event_and_keeps_earlier_ones(
    sql: SqlStore, tape: Tape, change: dict[str, Any]
) -> None:
    a_whole_sale(tape)
    forged = msgspec.structs.replace(tape.events[5], **change)
    outcome = await sql.events.apply("s", [*tape.events[:5], forged, *tape.events[6:]])
    assert (outcome.kind, outcome.seq) == (ApplyKind.BROKEN_CHAIN, 6)
    assert (outcome.written, outcome.flushed_seq) == (5, 5)
    assert await sql.events.cursor("s") == (5, tape.events[4].chain)


def unreadable(tape: Tape) -> None:
    tape.write("claimed", "o", "{")


def unnamed(tape: Tape) -> None:
    tape.write("vanished", "o", {"from": "HELD", "to": "EXPIRED"})


def without_order(tape: Tape) -> None:
    tape.move("expired", "nobody", "HELD", "EXPIRED")


def off_the_table(tape: Tape) -> None:
    tape.move("confirmed", "o", "HELD", "CONFIRMED")


def from_elsewhere(tape: Tape) -> None:
    tape.move("declined", "o", "CONFIRMING", "RELEASED")


def begun_twice(tape: Tape) -> None:
    tape.prepare("o", a=1)


def of_no_item(tape: Tape) -> None:
    tape.prepare("p", c=1)


def more_than_there_is(tape: Tape) -> None:
    tape.prepare("p", a=10)


def twice_the_same_item(tape: Tape) -> None:
    tape.write(
        "prepared",
        "p",
        {
            "from": "",
            "to": "HELD",
            "items": [["a", 1, 100], ["a", 1, 100]],
            "amount": 200,
            "digest": "d",
            "expiresAt": 1,
            "buyer": "b",
            "name": "n",
        },
    )


def below_nothing(tape: Tape) -> None:
    tape.write("restocked", data={"sku": "a", "delta": -10, "total": 0})


def miscounted(tape: Tape) -> None:
    tape.write("restocked", data={"sku": "a", "delta": 1, "total": 10})


def lent_without_units(tape: Tape) -> None:
    tape.transfer("lent", number=1, units=10, up_to=10, total=0)


def a_miscounted_transfer(tape: Tape) -> None:
    tape.transfer("borrowed", number=1, units=1, up_to=1, total=10)


def more_lent_than_in_all(tape: Tape) -> None:
    tape.transfer("lent", number=1, units=2, up_to=1, total=8)


def under_what_is_held(tape: Tape) -> None:
    tape.put(version=2, b=5)


def beyond_bigint(tape: Tape) -> None:
    tape.write("restocked", data={"sku": "a", "delta": 2**70, "total": 2**70 + 10})


def claimed_without_key(tape: Tape) -> None:
    tape.move("claimed", "o", "HELD", "CONFIRMING", fence=1)


def with_a_nul(tape: Tape) -> None:
    tape.prepare("p", buyer="a\0b", a=1)


POISONS = [
    unreadable,
    unnamed,
    without_order,
    off_the_table,
    from_elsewhere,
    begun_twice,
    of_no_item,
    more_than_there_is,
    twice_the_same_item,
    below_nothing,
    miscounted,
    lent_without_units,
    a_miscounted_transfer,
    more_lent_than_in_all,
    under_what_is_held,
    beyond_bigint,
    claimed_without_key,
    with_a_nul,
]


@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__)
async def test_an_invalid_event_stops_later_events_and_keeps_earlier_ones(
    sql: SqlStore, tape: Tape, poison: Any
) -> None:
    tape.prepare("o", a=1)
    poison(tape)
    tape.prepare("after", a=1)
    outcome = await sql.events.apply("s", tape.events)
    assert (outcome.kind, outcome.seq, outcome.written) == (ApplyKind.POISON, 3, 2)
    assert outcome.reason
    assert await sql.events.cursor("s") == (2, tape.events[1].chain)

    alone = await sql.events.apply("s", tape.events[2:])
    assert (alone.kind, alone.seq, alone.written) == (ApplyKind.POISON, 3, 0)
    fold = await sql.sales.counters("s")
    assert fold is not None
    assert fold.skus["a"] == SkuFold(total=10, available=9, held=1, confirming=0, sold=0)


async def test_an_event_violating_a_constraint_is_isolated_by_bisection(
    sql: SqlStore, tape: Tape
) -> None:
    """An order with the same id in another sale passes the fold of this one."""
    await sql.sales.register("t", "{}", 1)
    other = Tape("t")
    other.put(a=10)
    other.prepare("o", a=1)
    await sql.events.apply("t", other.events)
    async with sql.database.write() as connection:
        await connection.execute(tables.order_lines.delete())
        await connection.execute(tables.orders.delete())

    for number in range(20):
        tape.prepare(f"before-{number}", to="PREPARED", a=1)
    tape.prepare("o", a=1)
    tape.prepare("after", a=1)
    outcome = await sql.events.apply("s", tape.events)
    assert (outcome.kind, outcome.seq, outcome.written) == (ApplyKind.POISON, 22, 21)
    assert (await sql.events.cursor("s"))[0] == 21


async def test_an_event_whose_time_is_no_number_of_sql_is_poison(sql: SqlStore, tape: Tape) -> None:
    last = tape.events[-1]
    data = '{"status":"paused","operator":"op","reason":"r"}'
    wrong = {"seq": 2, "event": "sale_switched", "order_id": "", "at_ms": 2**63, "data": data}
    event = Event(sale_id="s", chain=chain_of(last.chain, **wrong), **wrong)
    outcome = await sql.events.apply("s", [last, event])
    assert (outcome.kind, outcome.seq, outcome.written) == (ApplyKind.POISON, 2, 1)


async def test_an_event_for_an_order_of_another_sale_is_poison(sql: SqlStore, tape: Tape) -> None:
    await sql.sales.register("t", "{}", 1)
    other = Tape("t")
    other.put(a=10)
    other.prepare("o", a=1)
    await sql.events.apply("t", other.events)
    tape.move("expired", "o", "HELD", "EXPIRED")
    outcome = await sql.events.apply("s", tape.events)
    assert (outcome.kind, outcome.seq) == (ApplyKind.POISON, 2)


async def test_events_of_a_sale_unknown_to_sql_create_no_sale(sql: SqlStore) -> None:
    tape = Tape("unknown")
    tape.put(a=1)
    outcome = await sql.events.apply("unknown", tape.events)
    assert (outcome.kind, outcome.written) == (ApplyKind.UNKNOWN_SALE, 0)


async def test_two_flushers_with_the_same_events_write_each_once(sql: SqlStore, tape: Tape) -> None:
    a_whole_sale(tape)
    outcomes = await asyncio.gather(*(sql.events.apply("s", tape.events) for _ in range(4)))
    assert {outcome.kind for outcome in outcomes} == {ApplyKind.APPLIED}
    assert sum(outcome.written for outcome in outcomes) == len(tape.events)
    assert len(await rows(sql, tables.events)) == len(tape.events)


async def test_sales_are_written_concurrently(sql: SqlStore) -> None:
    tapes = [Tape(f"sale-{number}") for number in range(4)]
    for tape in tapes:
        await sql.sales.register(tape.sale_id, "{}", 1)
        tape.put(a=10, b=5)
        for number in range(5):
            tape.sell(f"{tape.sale_id}-{number}", a=1)
    outcomes = await asyncio.gather(
        *(sql.events.apply(tape.sale_id, tape.events) for tape in tapes)
    )
    assert [outcome.written for outcome in outcomes] == [16] * 4


async def test_an_item_removed_and_added_again_is_counted_correctly(
    sql: SqlStore, tape: Tape
) -> None:
    tape.put(version=2, a=10)
    tape.put(version=3, a=12, b=3)
    tape.prepare("o", b=3)
    await sql.events.apply("s", tape.events[:2])
    fold = await sql.sales.counters("s")
    assert fold is not None
    assert fold.skus["b"] == SkuFold(total=0, available=0, held=0, confirming=0, sold=0)
    assert [row[-1] for row in await rows(sql, tables.items)] == [True, False]
    await sql.events.apply("s", tape.events[2:])
    fold = await sql.sales.counters("s")
    assert fold is not None
    assert fold.skus["b"] == SkuFold(total=3, available=0, held=3, confirming=0, sold=0)


async def test_the_sale_row_matches_its_events(sql: SqlStore, tape: Tape) -> None:
    tape.write("sale_switched", data={"status": "closed", "operator": "op", "reason": "r"})
    tape.put(version=2, a=11, b=5)
    await sql.events.apply("s", tape.events)
    sale = await sql.sales.get("s")
    assert sale is not None
    assert (sale.version, sale.switched) == (2, "closed")
    assert sale.settings == tape.events[-1].data


async def test_a_name_invalid_in_sql_is_kept_in_the_event(sql: SqlStore, tape: Tape) -> None:
    template = Tape().prepare("o", a=1).data
    data = template.replace("A and more", "A\\u0000B 재고 ☂")
    tape.write("prepared", "o", data)
    assert (await sql.events.apply("s", tape.events)).kind is ApplyKind.APPLIED
    order = await sql.orders.get("o")
    assert order is not None
    assert order.order_name == "AB 재고 ☂"
    assert (await sql.events.list_after("s", 1, 1))[0].data == data


async def test_an_empty_batch_is_accepted(sql: SqlStore) -> None:
    await sql.sales.register("s", "{}", 1)
    outcome = await sql.events.apply("s", [])
    assert (outcome.kind, outcome.flushed_seq, outcome.written) == (ApplyKind.APPLIED, 0, 0)


async def test_an_unbounded_batch_is_refused(sql: SqlStore, tape: Tape) -> None:
    with pytest.raises(ValueError):
        await sql.events.apply("s", tape.events * (EVENTS_MAX + 1))


async def test_the_cursors_of_some_sales_and_of_more_than_a_statement_takes(
    sql: SqlStore,
) -> None:
    for sale_id in ("one", "two"):
        await sql.sales.register(sale_id, "{}", 1)
    assert await sql.events.cursors(["one", "gone"]) == {"one": 0}
    assert set(await sql.sales.heads(["two"])) == {"two"}
    many = [f"sale-{number}" for number in range(40_000)]
    assert await sql.events.cursors([*many, "one"]) == {"one": 0, "two": 0}
    assert set(await sql.sales.heads([*many, "one"])) == {"one", "two"}
