"""restore.lua: writes only for the rebuild that owns the sale."""

from pathlib import Path
from typing import Any

from reservation.adapters.redis.keys import SaleKeys
from reservation.adapters.redis.sale_writer import Writes
from reservation.adapters.redis.script_results import RestoreWord
from reservation.adapters.redis.scripts import load
from tests.support.in_process import Bench, bench


async def restore(here: Bench, sale_id: str, writes: Writes, *, epoch: str, late: int = 0) -> Any:
    connections = here.service.connections
    names = here.service.keys.of(sale_id)
    return await connections.call(
        load("restore"),
        [names.sale, *writes.keys],
        [connections.not_after_ms("s") - late, epoch, writes.text()],
    )


async def live_sale(here: Bench) -> tuple[str, SaleKeys, str]:
    """Create a sale; return its id, its keys and its epoch."""
    sale_id = await here.sale()
    epoch = (await here.service.catalog.fresh(sale_id)).epoch
    return sale_id, here.service.keys.of(sale_id), epoch


async def test_a_rebuilt_sale_is_unchanged_by_a_second_rebuild(
    tmp_path: Path, valkey_url: str
) -> None:
    async with bench(tmp_path, valkey_url) as here:
        sale_id, names, epoch = await live_sale(here)
        writes = Writes()
        writes.hset(names.order("o"), {"status": "HELD", "amount": 9_999_999_999_999, "fence": 3})
        writes.hdel(names.order("o"), "fence")
        writes.zadd(names.deadlines, "o", 1_790_000_000_123)
        writes.zadd(names.deposits, "old", 1)
        writes.unlink(names.deposits)
        for _ in range(2):
            assert await restore(here, sale_id, writes, epoch=epoch) == [RestoreWord.DONE]
        command = here.service.connections.command
        assert await command("HGET", names.order("o"), "amount") == "9999999999999"
        assert await command("HEXISTS", names.order("o"), "fence") == 0
        assert await command("ZSCORE", names.deadlines, "o") == "1790000000123"
        assert await command("EXISTS", names.deposits) == 0


async def test_only_the_first_rebuild_of_a_lost_sale_can_write(
    tmp_path: Path, valkey_url: str
) -> None:
    async with bench(tmp_path, valkey_url) as here:
        sale_id = await here.sale()
        await here.lose(sale_id)
        sale = here.service.keys.of(sale_id).sale
        first, second = Writes(), Writes()
        first.hset(sale, {"epoch": "first"})
        second.hset(sale, {"epoch": "second"})
        assert await restore(here, sale_id, first, epoch="") == [RestoreWord.DONE]
        assert await restore(here, sale_id, second, epoch="") == [RestoreWord.RECOVERING]
        assert await here.service.connections.command("HGET", sale, "epoch") == "first"


async def test_an_outdated_or_late_restore_writes_nothing(tmp_path: Path, valkey_url: str) -> None:
    async with bench(tmp_path, valkey_url) as here:
        sale_id, names, epoch = await live_sale(here)
        writes = Writes()
        writes.hset(names.order("o"), {"status": "HELD"})
        assert await restore(here, sale_id, writes, epoch="other") == [RestoreWord.RECOVERING]
        assert await restore(here, sale_id, writes, epoch=epoch, late=60_000) == [
            RestoreWord.TOO_LATE
        ]
        assert await here.service.connections.command("EXISTS", names.order("o")) == 0
