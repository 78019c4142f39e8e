"""Rebuilds in SQL: the epoch decides between two of them, and between one and a flusher."""

import asyncio

import msgspec
import pytest

from reservation.adapters.sql.event_writer import ApplyKind
from reservation.adapters.sql.rebuilds import RebuildRow
from reservation.adapters.sql.store import SqlStore
from reservation.domain.errors import SaleRecovering
from tests.support.outbox import Tape

#: Epochs.
A, B, C = (letter * 16 for letter in "abc")


def rebuild_to(epoch: str, from_epoch: str = "", **changes: object) -> RebuildRow:
    row = RebuildRow(
        sale_id="s",
        epoch=epoch,
        from_epoch=from_epoch,
        reason="lost",
        beat=0,
        acknowledged_seq=0,
        saved_seq=None,
        began_at_ms=1,
        ended_at_ms=None,
    )
    return msgspec.structs.replace(row, **changes)


async def test_a_rebuild_gives_a_sale_a_new_epoch(sql: SqlStore) -> None:
    first, _ = await sql.sales.register("s", "{}", 1)
    await sql.sales.register("t", "{}", 1)
    await sql.rebuilds.begin(rebuild_to("f" * 16), instead_of=first, continues=True)
    known = await sql.sales.epochs()
    assert known["s"] == "f" * 16 != first
    assert known["t"] != known["s"]
    with pytest.raises(SaleRecovering):
        await sql.rebuilds.begin(rebuild_to(A), instead_of=first, continues=True)
    assert await sql.sales.epochs() == known
    assert (await sql.rebuilds.list_unfinished())["s"].epoch == known["s"]


async def test_one_of_two_rebuilds_at_once_begins(sql: SqlStore) -> None:
    first, _ = await sql.sales.register("s", "{}", 1)
    ends = await asyncio.gather(
        *(
            sql.rebuilds.begin(rebuild_to(letter * 16), instead_of=first, continues=True)
            for letter in "abcd"
        ),
        return_exceptions=True,
    )
    begun = [end for end in ends if isinstance(end, RebuildRow)]
    assert len(begun) == 1
    assert sum(isinstance(end, SaleRecovering) for end in ends) == 3
    assert await sql.sales.epoch("s") == begun[0].epoch


async def test_the_next_rebuild_keeps_the_evidence_of_an_unfinished_one(sql: SqlStore) -> None:
    first, _ = await sql.sales.register("s", "{}", 1)
    died = rebuild_to(A, first, reason="Redis lacks event 9", acknowledged_seq=9)
    await sql.rebuilds.begin(died, instead_of=first, continues=True)
    await sql.rebuilds.note_saved("s", A, 4)
    second = await sql.rebuilds.begin(
        rebuild_to(B, A, reason="another epoch", began_at_ms=2), instead_of=A, continues=True
    )
    assert second == rebuild_to(
        B,
        first,
        reason="Redis lacks event 9",
        acknowledged_seq=9,
        saved_seq=4,
        began_at_ms=2,
    )
    await sql.rebuilds.end("s", B, 3)
    assert await sql.rebuilds.list_unfinished() == {}
    third = await sql.rebuilds.begin(rebuild_to(C, B), instead_of=B, continues=True)
    assert third == rebuild_to(C, B)


async def test_the_beat_of_a_rebuild_ends_with_the_next_one(sql: SqlStore) -> None:
    first, _ = await sql.sales.register("s", "{}", 1)
    await sql.rebuilds.begin(rebuild_to(A, first), instead_of=first, continues=True)
    assert await sql.rebuilds.renew("s", A)
    assert (await sql.rebuilds.list_unfinished())["s"].beat == 1
    await sql.rebuilds.begin(rebuild_to(B, A), instead_of=A, continues=True)
    assert not await sql.rebuilds.renew("s", A)


async def test_events_read_before_a_rebuild_are_not_written(sql: SqlStore) -> None:
    first, _ = await sql.sales.register("s", "{}", 1)
    tape = Tape("s")
    tape.put(a=10)
    tape.sell("o", a=1)
    assert (await sql.events.apply("s", tape.events[:1], epoch=first)).written == 1
    await sql.rebuilds.begin(rebuild_to(B), instead_of=first, continues=True)
    late = await sql.events.apply("s", tape.events, epoch=first)
    assert (late.kind, late.written, late.flushed_seq) == (ApplyKind.OTHER_EPOCH, 0, 1)
    assert await sql.events.cursor("s") == (1, tape.events[0].chain)


async def test_a_flush_is_committed_before_a_rebuild_or_refused(sql: SqlStore) -> None:
    """Whichever takes the lock first: no batch of the old epoch follows the new epoch."""
    for attempt in range(10):
        sale_id = f"s{attempt}"
        first, _ = await sql.sales.register(sale_id, "{}", 1)
        tape = Tape(sale_id)
        tape.put(a=10)
        tape.sell("o", a=1)

        async def flush(sale_id: str = sale_id, tape: Tape = tape, first: str = first) -> int:
            return (await sql.events.apply(sale_id, tape.events, epoch=first)).written

        async def begin(sale_id: str = sale_id, first: str = first) -> int:
            row = rebuild_to(B, first, sale_id=sale_id)
            await sql.rebuilds.begin(row, instead_of=first, continues=True)
            return (await sql.events.cursor(sale_id))[0]

        written, seen = await asyncio.gather(flush(), begin())
        assert written == seen
