"""touch.lua: one write that changes nothing, and none where the sale is gone."""

from pathlib import Path

from reservation.adapters.redis.script_results import TouchWord
from reservation.adapters.redis.scripts import load
from tests.support.in_process import bench


async def test_a_touch_is_a_write_that_changes_nothing(tmp_path: Path, valkey_url: str) -> None:
    async with bench(tmp_path, valkey_url) as here:
        sale_id = await here.sale()
        connections, names = here.service.connections, here.service.keys.of(sale_id)
        before = await here.remembered(sale_id)
        [changes] = await connections.pipeline([("INFO", "persistence")])
        assert await connections.call(load("touch"), [names.sale], []) == [TouchWord.DONE]
        [later] = await connections.pipeline([("INFO", "persistence")])
        assert _changes(later) == _changes(changes) + 1
        assert await here.remembered(sale_id) == before


async def test_a_touch_creates_no_key_of_a_sale_that_is_gone(
    tmp_path: Path, valkey_url: str
) -> None:
    async with bench(tmp_path, valkey_url) as here:
        sale_id = await here.sale()
        await here.lose(sale_id)
        connections, names = here.service.connections, here.service.keys.of(sale_id)
        await connections.command("UNLINK", names.sale)
        assert await connections.call(load("touch"), [names.sale], []) == [TouchWord.NOT_FOUND]
        assert await connections.command("EXISTS", names.sale) == 0


def _changes(info: str) -> int:
    """Writes since the last snapshot: each of them is sent to the replicas."""
    [found] = [line for line in info.splitlines() if line.startswith("rdb_changes_since_last_save")]
    return int(found.partition(":")[2])
