"""reopen.lua: begins the outbox right after the last event in SQL, once."""

from pathlib import Path
from typing import Any

from reservation.adapters.redis.script_results import ReopenWord
from reservation.adapters.redis.scripts import load
from tests.support.in_process import Bench, bench


async def reopen(here: Bench, sale_id: str, *, epoch: str, late: int = 0) -> Any:
    connections = here.service.connections
    names = here.service.keys.of(sale_id)
    return await connections.call(
        load("reopen"),
        [names.sale, names.outbox],
        [connections.not_after_ms("s") - late, epoch, "rebuilt", "{}"],
    )


async def test_a_reopened_outbox_continues_from_the_head(tmp_path: Path, valkey_url: str) -> None:
    async with bench(tmp_path, valkey_url) as here:
        sale_id = await here.sale()
        await here.hold(sale_id)
        await here.flush(sale_id)
        names = here.service.keys.of(sale_id)
        epoch = (await here.service.catalog.fresh(sale_id)).epoch
        await here.service.connections.command("UNLINK", names.outbox)
        for _ in range(2):
            assert await reopen(here, sale_id, epoch=epoch) == [ReopenWord.DONE]
        counters = await here.service.sale_store.counters(sale_id)
        assert counters is not None
        assert (counters.seq, counters.last_outbox_id) == (3, "3-0")
        # The consumer group was lost with the stream; a rebuild creates it after SQL's last event.
        await here.service.outbox.ensure_group(sale_id, 2)
        await here.flush(sale_id)
        assert (await here.service.sql.events.cursor(sale_id)) == (3, counters.chain)


async def test_an_outdated_or_late_reopen_appends_nothing(tmp_path: Path, valkey_url: str) -> None:
    async with bench(tmp_path, valkey_url) as here:
        sale_id = await here.sale()
        names = here.service.keys.of(sale_id)
        epoch = (await here.service.catalog.fresh(sale_id)).epoch
        await here.service.connections.command("UNLINK", names.outbox)
        assert await reopen(here, sale_id, epoch="other") == [ReopenWord.RECOVERING]
        assert await reopen(here, sale_id, epoch=epoch, late=60_000) == [ReopenWord.TOO_LATE]
        assert await here.service.connections.command("EXISTS", names.outbox) == 0
