"""A rebuild of a partition restores its transfers, and compares it with its peers."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update

from reservation.adapters.sql import tables
from reservation.application.recovery.survivors import Uncertain
from tests.support.in_process import Bench, bench
from tests.support.partition_sale import PartitionSale


@pytest.fixture
async def here(tmp_path: Path, each_server_url: str, database_url: str) -> AsyncIterator[Bench]:
    """A service on each server and each database."""
    address = "" if database_url.startswith("sqlite") else database_url
    async with bench(tmp_path, each_server_url, RESERVATION_DATABASE_URL=address) as made:
        yield made


@pytest.fixture
async def sale(here: Bench) -> AsyncIterator[PartitionSale]:
    """Three partitions with five units of `a` each; no unit is created or lost."""
    made = PartitionSale(here, 3)
    await made.open([(5,), (5,), (5,)])
    yield made
    await made.check([15])
    await made.flush()
    assert here.alarms == []


async def test_the_transfers_and_the_mark_of_a_partition_are_restored(
    sale: PartitionSale,
) -> None:
    await sale.transfer(0, 1, 2)
    await sale.transfer(1, 0, 3)
    await sale.transfer(0, 1, 1, number=2)
    lane = sale.lanes[0]
    await sale.flush()
    key = lane.keys.transfers
    before = await lane.connections.command("HGETALL", key)
    await sale.here.lose(lane.id)
    await sale.rebuild(0)
    assert await lane.connections.command("HGETALL", key) == before
    assert await lane.transfers() == {"lent:1:a": "2 3", "received:1:a": "1 3"}
    assert await lane.refills() == 0
    assert await lane.stock() == (5, 5, 0, 0)
    # The restored operation keeps its answer.
    operation = str(dict(zip(before[::2], before[1::2], strict=True))["lent:1:a"]).split(" ")[3]
    again = await lane.lend(1, units=1, after=1, operation=operation)
    assert again == ["lent", "2", "1", "3"]


async def test_a_lost_borrow_is_repeated(sale: PartitionSale) -> None:
    """One borrow stands for all lends that SQL has; a lend that only the donor has waits."""
    lane, donor = sale.lanes[0], sale.lanes[1]
    memory = await sale.here.remembered(lane.id)
    await sale.transfer(1, 0, 2)
    await sale.transfer(1, 0, 1, number=2)
    assert (await donor.lend(0, units=1, after=2))[0] == "lent"
    await sale.here.put_back(lane.id, memory)
    await sale.rebuild(0, force=True)
    assert await lane.transfers() == {"received:1:a": "2 3"}
    assert await lane.stock() == (8, 8, 0, 0)
    assert await sale.in_transit("a") == 1
    # The collector's own borrow arrives late.
    assert await lane.borrow(1, number=2, up_to=3) == ["done"]


async def restored(sale: PartitionSale, place: int, memory: dict[str, bytes], seq: int) -> None:
    """Let a partition and its rows in SQL go back to a backup."""
    lane = sale.lanes[place]
    async with sale.here.service.sql.database.write() as connection:
        chain = await connection.execute(
            select(tables.events.c.chain).where(
                tables.events.c.sale_id == lane.id, tables.events.c.seq == seq
            )
        )
        value = chain.scalar_one()
        for table in (tables.events, tables.transfers, tables.stock_movements):
            await connection.execute(
                delete(table).where(table.c.sale_id == lane.id, table.c.seq > seq)
            )
        await connection.execute(
            update(tables.items)
            .where(tables.items.c.sale_id == lane.id)
            .values(total=5, available=5, held=0, sold=0)
        )
        await connection.execute(
            update(tables.sales).where(tables.sales.c.sale_id == lane.id).values(version=1)
        )
        await connection.execute(
            update(tables.cursors)
            .where(tables.cursors.c.sale_id == lane.id)
            .values(flushed_seq=seq, flushed_chain=value)
        )
    await sale.here.put_back(lane.id, memory)


async def test_a_lost_lend_that_a_peer_has_is_repeated_once(sale: PartitionSale) -> None:
    lane = sale.lanes[0]
    memory = await sale.here.remembered(lane.id)
    await sale.transfer(0, 1, 2)
    await sale.transfer(0, 1, 1, number=2)
    await restored(sale, 0, memory, 1)
    await sale.rebuild(0, force=True)
    assert await lane.transfers() == {"lent:1:a": "2 3"}
    assert await lane.stock() == (2, 2, 0, 0)
    await sale.flush()
    [row] = await sale.here.service.sql.transfers.list_last([lane.id], 1)
    assert (row.number, row.units, row.up_to, row.operation) == (2, 3, 3, "rebuild")
    assert await sale.lanes[1].borrow(0, number=2, up_to=3) == ["done"]


async def test_a_partition_borrows_again_before_it_repeats_its_lends(sale: PartitionSale) -> None:
    lane = sale.lanes[0]
    memory = await sale.here.remembered(lane.id)
    await sale.transfer(2, 0, 5)
    await sale.transfer(0, 1, 8)
    await restored(sale, 0, memory, 1)
    await sale.rebuild(0, force=True)
    assert await lane.transfers() == {"received:2:a": "1 5", "lent:1:a": "1 8"}
    assert await lane.stock() == (2, 2, 0, 0)


async def test_what_a_closed_peer_has_received_is_read_in_sql(sale: PartitionSale) -> None:
    """The rebuild of the peer has removed its keys, after SQL got its events."""
    memory = await sale.here.remembered(sale.lanes[0].id)
    await sale.transfer(0, 1, 2)
    await sale.flush()
    await sale.here.lose(sale.lanes[1].id)
    await restored(sale, 0, memory, 1)
    await sale.rebuild(0, force=True)
    assert await sale.lanes[0].transfers() == {"lent:1:a": "1 2"}
    await sale.rebuild(1)
    assert await sale.lanes[1].transfers() == {"received:0:a": "1 2"}


async def test_a_partition_that_lacks_the_units_stays_closed(sale: PartitionSale) -> None:
    lane = sale.lanes[0]
    held = await lane.hold("ann", lines={"a": 4})
    await sale.flush()
    memory = await sale.here.remembered(lane.id)
    assert await lane.release(held) == ["released"]
    await sale.transfer(0, 1, 3)
    # Only Redis went back, and SQL has no lend that the peer has: as after a restore of both.
    async with sale.here.service.sql.database.write() as connection:
        of_lane = tables.events.c.sale_id == lane.id
        rows = await connection.execute(
            select(tables.events.c.seq, tables.events.c.chain).where(of_lane)
        )
        by_seq = {row.seq: row.chain for row in rows}
        for table in (tables.events, tables.transfers, tables.stock_movements):
            await connection.execute(
                delete(table).where(table.c.sale_id == lane.id, table.c.seq > 2)
            )
        await connection.execute(
            update(tables.orders)
            .where(tables.orders.c.sale_id == lane.id)
            .values(status="HELD", seq=2)
        )
        await connection.execute(
            update(tables.items)
            .where(tables.items.c.sale_id == lane.id)
            .values(total=5, available=1, held=4, sold=0)
        )
        await connection.execute(
            update(tables.cursors)
            .where(tables.cursors.c.sale_id == lane.id)
            .values(flushed_seq=2, flushed_chain=by_seq[2])
        )
    await sale.here.put_back(lane.id, memory)
    with pytest.raises(Uncertain, match="1 are available"):
        await sale.rebuild(0, force=True)
    lane.epoch = (await sale.here.service.sql.sales.epoch(lane.id)) or ""
    assert await lane.prepare(lane.basket("bob")) == [["recovering"]]
    # The hold ends: then the units are there.
    async with sale.here.service.sql.database.write() as connection:
        await connection.execute(
            delete(tables.order_lines).where(tables.order_lines.c.order_id == held["order"])
        )
        await connection.execute(delete(tables.orders).where(tables.orders.c.sale_id == lane.id))
        await connection.execute(
            update(tables.items)
            .where(tables.items.c.sale_id == lane.id)
            .values(total=5, available=5, held=0, sold=0)
        )
    await sale.rebuild(0, force=True)
    assert await lane.stock() == (2, 2, 0, 0)


@pytest.mark.parametrize("step", ["borrow", "lend_again"])
async def test_an_interrupted_comparison_is_repeated(
    sale: PartitionSale, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = sale.lanes[0]
    memory = await sale.here.remembered(lane.id)
    await sale.transfer(2, 0, 5)
    await sale.transfer(0, 1, 8)
    await restored(sale, 0, memory, 1)
    transfers = sale.here.service.rebuild._peers._transfers
    run = getattr(transfers, step)

    async def die_after(*args: object, **how: object) -> None:
        await run(*args, **how)
        raise ConnectionResetError(step)

    with monkeypatch.context() as patch:
        patch.setattr(transfers, step, die_after)
        with pytest.raises(ConnectionResetError):
            await sale.rebuild(0, force=True)
    await sale.rebuild(0, force=True)
    assert await lane.transfers() == {"received:2:a": "1 5", "lent:1:a": "1 8"}
    assert await lane.stock() == (2, 2, 0, 0)
