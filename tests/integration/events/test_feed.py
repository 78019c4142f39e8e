"""The event feed: every committed event once, in the order of ids, however many processes write."""

import asyncio

import msgspec
import pytest
from sqlalchemy import insert

from reservation.adapters.sql.feed_ids import RESTORE_IDS
from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.tables import restores
from reservation.application.events.feed import EventFeed, FeedEvent
from tests.support.outbox import START_MS, Tape


async def begin(sql: SqlStore, sale_id: str = "s") -> Tape:
    await sql.sales.register(sale_id, "{}", 1)
    tape = Tape(sale_id)
    tape.put(a=1_000)
    return tape


async def assign_all(sql: SqlStore) -> None:
    while await sql.feed.assign():
        pass


async def read_all(sql: SqlStore, *, after: int = 0, limit: int = 7) -> list[FeedEvent]:
    feed, found = EventFeed(sql), list[FeedEvent]()
    while True:
        page = await feed.page(after=after, limit=limit)
        found += page.events
        if page.next == after:
            return found
        after = page.next


async def test_an_event_is_read_once_it_has_an_id(sql: SqlStore) -> None:
    tape = await begin(sql)
    tape.prepare("s-1", a=2)
    await sql.events.apply("s", tape.events)
    assert await read_all(sql) == []
    assert await sql.feed.assign() == 2
    put, held = await read_all(sql)
    assert (put.id, put.seq, put.type, put.order_id) == (1, 1, "sale.put", None)
    assert (held.id, held.seq, held.type, held.partition) == (2, 2, "reservation.held", 0)
    assert held.epoch == "0" * 16
    assert held.data["reservation"] == {
        "orderId": "s-1",
        "saleId": "s",
        "buyerId": "b",
        "status": "HELD",
        "items": [{"sku": "a", "quantity": 2, "price": 100}],
        "amount": 200,
        "currency": "KRW",
        "orderName": "A and more",
        "createdAt": "2023-11-14T22:13:20.002Z",
        "updatedAt": "2023-11-14T22:13:20.002Z",
        "expiresAt": "2023-11-14T22:14:20.000Z",
    }


async def test_an_event_shows_the_state_at_its_time(sql: SqlStore) -> None:
    tape = await begin(sql)
    tape.sell("s-1", a=1)
    tape.move("refunded", "s-1", "CONFIRMED", "REFUNDED", fence=1, restock=True, cause="operator")
    await sql.events.apply("s", tape.events)
    await assign_all(sql)
    _, *found = await read_all(sql)
    assert [(event.type, event.data["reservation"]["status"]) for event in found] == [
        ("reservation.held", "HELD"),
        ("reservation.confirming", "CONFIRMING"),
        ("order.confirmed", "CONFIRMED"),
        ("order.refunded", "REFUNDED"),
    ]


async def test_the_feed_has_no_payment_key(sql: SqlStore) -> None:
    tape = await begin(sql)
    tape.sell("s-1", a=1)
    await sql.events.apply("s", tape.events)
    await assign_all(sql)
    text = msgspec.json.encode(await read_all(sql)).decode()
    assert "key-s-1" not in text
    assert "...-1-1" in text


@pytest.mark.parametrize("limit", [1, 2, 3, 50])
async def test_any_page_size_reads_the_same_events(sql: SqlStore, limit: int) -> None:
    tapes = [await begin(sql, sale_id) for sale_id in ("r", "s", "t")]
    for turn in range(4):
        for tape in tapes:
            tape.prepare(f"{tape.sale_id}-{turn}", a=1)
            await sql.events.apply(tape.sale_id, tape.events)
        await sql.feed.assign()
        await sql.feed.add_notices(START_MS + turn)
    found = await read_all(sql, limit=limit)
    assert [event.id for event in found] == list(range(1, len(found) + 1))
    for tape in tapes:
        seqs = [event.seq for event in found if event.sale_id == tape.sale_id and event.data]
        assert seqs == [1, 2, 3, 4, 5]


async def test_the_feed_of_one_sale_has_no_other_sale(sql: SqlStore) -> None:
    for sale_id in ("s", "s-2"):
        tape = await begin(sql, sale_id)
        await sql.events.apply(sale_id, tape.events)
        await sql.feed.assign()
    page = await EventFeed(sql).page(after=0, limit=10, sale_id="s-2")
    assert [event.sale_id for event in page.events] == ["s-2"]


async def test_a_rebuild_begins_another_epoch(sql: SqlStore) -> None:
    tape = await begin(sql)
    tape.prepare("s-1", a=1)
    tape.write("rebuilt", data={"epoch": "1" * 16, "operator": "op"})
    tape.prepare("s-2", a=1)
    await sql.events.apply("s", tape.events)
    await assign_all(sql)
    found = await read_all(sql)
    assert [event.epoch for event in found] == ["0" * 16] * 2 + ["1" * 16] * 2
    assert [event.id for event in found] == [1, 2, 3, 4]


async def test_no_id_is_used_again_after_a_restore(sql: SqlStore) -> None:
    tape = await begin(sql)
    await sql.events.apply("s", tape.events)
    await sql.feed.assign()
    row = {"number": 1, "taken_at_ms": 1, "restored_at_ms": 2, "operator": "op", "reason": "disk"}
    async with sql.database.write() as connection:
        await connection.execute(insert(restores), row)
    tape.prepare("s-1", a=1)
    await sql.events.apply("s", tape.events)
    await sql.feed.assign()
    assert [event.id for event in await read_all(sql)] == [1, RESTORE_IDS + 1]


async def test_two_processes_assign_each_id_once(database_url: str) -> None:
    stores = [await SqlStore.open(database_url) for _ in range(3)]
    tapes = [await begin(stores[0], f"sale-{number}") for number in range(6)]
    writing = True

    async def write(sql: SqlStore, tape: Tape) -> None:
        for number in range(12):
            tape.prepare(f"{tape.sale_id}-{number}", a=1)
            await sql.events.apply(tape.sale_id, tape.events[-3:])
            await asyncio.sleep(0)

    async def assign(sql: SqlStore) -> None:
        while writing or await sql.feed.assign():
            await sql.feed.assign()

    async def follow(sql: SqlStore) -> list[FeedEvent]:
        """Read as a consumer does: an event behind its position would be lost."""
        feed, after, found = EventFeed(sql), 0, list[FeedEvent]()
        while len(found) < 6 * 13:
            page = await feed.page(after=after, limit=5)
            after = page.next
            found += page.events
        return found

    assigning = [asyncio.create_task(assign(sql)) for sql in stores[:2]]
    async with asyncio.timeout(60):
        reading = asyncio.create_task(follow(stores[2]))
        await asyncio.gather(
            *(write(stores[number % 2], tape) for number, tape in enumerate(tapes))
        )
        writing = False
        await asyncio.gather(*assigning)
        found = await reading
    assert [event.id for event in found] == list(range(1, len(found) + 1))
    for tape in tapes:
        seqs = [event.seq for event in found if event.sale_id == tape.sale_id]
        assert seqs == list(range(1, 14))
    for sql in stores:
        await sql.aclose()


async def test_a_sale_announces_that_it_opens_sells_out_and_closes(sql: SqlStore) -> None:
    await sql.sales.register("s", "{}", 1)
    tape = Tape("s")
    put = tape.put(a=1)
    data = msgspec.json.decode(put.data) | {"opensAt": 1_000, "closesAt": 9_000}
    tape = Tape("s")
    tape.write("sale_put", data=data)
    tape.prepare("s-1", a=1)
    await sql.events.apply("s", tape.events[:1])
    await sql.feed.assign()
    assert await sql.feed.add_notices(999) == 0
    assert await sql.feed.add_notices(1_000) == 1
    assert await sql.feed.add_notices(1_001) == 0
    await sql.events.apply("s", tape.events)
    await sql.feed.assign()
    assert await sql.feed.add_notices(1_002) == 1
    assert await sql.feed.add_notices(9_000) == 1
    types = [event.type for event in await read_all(sql)]
    assert types == [
        "sale.put",
        "sale.opened",
        "reservation.held",
        "sale.sold_out",
        "sale.closed",
    ]


async def test_a_draft_opens_when_it_is_published(sql: SqlStore) -> None:
    await sql.sales.register("s", "{}", 1)
    data = msgspec.json.decode(Tape("s").put(a=1).data) | {"opensAt": 1_000, "closesAt": 9_000}
    tape = Tape("s")
    tape.write("sale_put", data=data | {"visibility": "draft"})
    tape.write("sale_put", data=data | {"version": 2})
    await sql.events.apply("s", tape.events[:1])
    await sql.feed.assign()
    assert await sql.feed.add_notices(2_000) == 0
    await sql.events.apply("s", tape.events)
    await sql.feed.assign()
    assert await sql.feed.add_notices(3_000) == 1
    types = [event.type for event in await read_all(sql)]
    assert types == ["sale.put", "sale.put", "sale.opened"]


async def test_a_reader_waits_for_the_next_event(sql: SqlStore) -> None:
    tape = await begin(sql)
    feed = EventFeed(sql)
    async with asyncio.timeout(30):
        waiting = asyncio.create_task(feed.next_page(after=0, limit=10, wait_seconds=25))
        await asyncio.sleep(0)
        await sql.events.apply("s", tape.events)
        await sql.feed.assign()
        page = await waiting
    assert [event.type for event in page.events] == ["sale.put"]


async def test_a_wait_ends_at_its_limit_and_on_shutdown(sql: SqlStore) -> None:
    feed = EventFeed(sql)
    assert (await feed.next_page(after=0, limit=10, wait_seconds=0.01)).events == []
    async with asyncio.timeout(30):
        waiting = asyncio.create_task(feed.next_page(after=0, limit=10, wait_seconds=60))
        await asyncio.sleep(0.05)
        feed.stop_waiting()
        assert (await waiting).events == []


async def test_a_purged_sale_leaves_the_feed(sql: SqlStore) -> None:
    for sale_id in ("s", "t"):
        tape = await begin(sql, sale_id)
        await sql.events.apply(sale_id, tape.events)
    await assign_all(sql)
    head = (await sql.sales.heads(["s"]))["s"]
    assert await sql.sales.retire("s", head, now_ms=1)
    obstacle = await sql.purges.begin(
        "s", retired_before_ms=2, operator="op", reason="old", now_ms=3
    )
    assert obstacle is None
    await sql.purges.finish("s", 4)
    await assign_all(sql)
    assert [(event.id, event.sale_id) for event in await read_all(sql)] == [(2, "t")]
