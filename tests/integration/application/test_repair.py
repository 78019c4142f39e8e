"""A repair fixes every problem that the audit reports, loses nothing, and needs confirmation."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.adapters.redis.keys import SaleKeys
from reservation.application.recovery.repair import NotDrained
from reservation.domain.errors import SaleRecovering
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.support.in_process import Bench, bench

Damage = Callable[[SaleKeys, Reservation], tuple[Any, ...]]

#: Far above the needs of a busy machine.
PATIENCE_SECONDS = 30.0

DAMAGES: dict[str, Damage] = {
    "one unit too many": lambda k, _: ("HINCRBY", k.stock("a"), "available", 1),
    "one held too few": lambda k, _: ("HINCRBY", k.stock("a"), "held", -1),
    "a buyer's count": lambda k, _: ("HINCRBY", k.buyer("ann"), "a", 1),
    "an order without its deadline": lambda k, o: ("ZREM", k.deadlines, o.order_id),
    "an order that is gone": lambda k, o: ("DEL", k.order(o.order_id)),
    "an order at another price": lambda k, o: ("HSET", k.order(o.order_id), "amount", "1"),
    "an order that cannot be read": lambda k, o: ("HDEL", k.order(o.order_id), "buyer"),
    "a member that is not an order": lambda k, _: ("ZADD", k.deadlines, 1, "nobody"),
}


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path, valkey_url) as made:
        yield made


async def busy(here: Bench) -> tuple[str, Reservation]:
    """A sale with an order in each state; SQL has half of it. The order is held."""
    sale_id = await here.sale()
    sold = await here.hold(sale_id, "bob")
    await here.finish(sold, (await here.claim(sold)).fence)
    order = await here.hold(sale_id, "ann")
    await here.flush(sale_id)
    await here.claim(await here.hold(sale_id, "cat"))
    await here.service.releases.release(await here.hold(sale_id, "dan"), reason=Reason(Cause.BUYER))
    return sale_id, order


async def damage(here: Bench, sale_id: str, order: Reservation, what: str) -> None:
    command = DAMAGES[what](here.service.keys.of(sale_id), order)
    await here.service.connections.command(*command)


@pytest.mark.parametrize("what", DAMAGES)
async def test_a_repair_fixes_the_findings_and_loses_no_data(here: Bench, what: str) -> None:
    sale_id, order = await busy(here)
    seq = (await here.service.sale_store.counters(sale_id)).seq  # type: ignore[union-attr]
    await damage(here, sale_id, order, what)
    report = await here.service.repair.run(sale_id, operator="kim", drain=here.flush)
    assert report.repaired
    assert report.problems
    assert report.left == ()
    assert await here.audited(sale_id) == ()
    await here.flush(sale_id)
    head = (await here.service.sql.sales.heads())[sale_id]
    assert head.seq == seq + 1, "each event is kept, and one tells of the repair"
    found = await here.service.store.read(order.order_id)
    assert found is not None
    assert (found.status, found.amount) == (Status.HELD, order.amount)
    await opened_again(here, sale_id)


async def opened_again(here: Bench, sale_id: str) -> None:
    """A hold succeeds, at the latest once the catalog has read the new epoch from SQL."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            await here.service.redis_monitor.check_redis()
            try:
                await here.hold(sale_id, "eve")
            except SaleRecovering:
                await asyncio.sleep(0.05)
            else:
                return


async def test_a_repair_without_confirmation_changes_nothing(here: Bench) -> None:
    sale_id, order = await busy(here)
    await damage(here, sale_id, order, "one unit too many")
    before = await here.remembered(sale_id)
    report = await here.service.repair.run(sale_id, operator="kim", drain=None)
    assert not report.repaired
    assert report.left == report.problems != ()
    assert await here.remembered(sale_id) == before


async def test_a_sound_sale_is_left_unchanged_by_a_repair(here: Bench) -> None:
    sale_id, _ = await busy(here)
    before = await here.remembered(sale_id)
    report = await here.service.repair.run(sale_id, operator="kim", drain=here.flush)
    assert (report.repaired, report.problems) == (False, ())
    assert await here.remembered(sale_id) == before


async def test_events_refused_by_sql_are_not_discarded(here: Bench) -> None:
    sale_id, order = await busy(here)
    await damage(here, sale_id, order, "a buyer's count")

    async def broken(_: str) -> None:
        """SQL is down, or refuses an event."""

    with pytest.raises(NotDrained):
        await here.service.repair.run(sale_id, operator="kim", drain=broken)
    # Still damaged, and still open.
    await here.service.redis_monitor.check_redis()
    await here.hold(sale_id, "eve")


async def test_a_lost_sale_is_not_repaired(here: Bench) -> None:
    sale_id, _ = await busy(here)
    await here.flush(sale_id)
    await here.lose(sale_id)
    with pytest.raises(SaleRecovering):
        await here.service.repair.run(sale_id, operator="kim", drain=here.flush)


async def output_of(folder: Path, redis_url: str, *arguments: str) -> tuple[int, str]:
    """The output of a command and its exit status."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "api.cli",
        *arguments,
        env={
            "PATH": os.environ["PATH"],
            "RESERVATION_DATA_DIR": str(folder),
            "RESERVATION_REDIS_URL": redis_url,
        },
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.system
async def test_the_repair_command_acts_only_after_yes(
    here: Bench, tmp_path: Path, valkey_url: str
) -> None:
    sale_id, order = await busy(here)
    await damage(here, sale_id, order, "one unit too many")
    status, shown = await output_of(tmp_path, valkey_url, "audit", sale_id, "--repair")
    assert status == 1
    assert "a: available is 98" in shown
    assert "add --yes" in shown
    assert await here.audited(sale_id) != ()
    status, done = await output_of(tmp_path, valkey_url, "audit", sale_id, "--repair", "--yes")
    assert (status, "open again" in done) == (0, True), done
    assert await here.audited(sale_id) == ()
    again = await output_of(tmp_path, valkey_url, "audit", sale_id, "--repair", "--yes", "--json")
    assert again[0] == 0
    assert msgspec.json.decode(again[1])["repaired"] is False
