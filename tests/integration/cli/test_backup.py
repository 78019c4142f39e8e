"""`reservation backup` and `restore`: all or nothing, and a one-line error for an invalid file."""

import asyncio
import io
import json
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from api.cli import restore
from reservation.adapters.redis.cluster import open_client
from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.adapters.redis.keys import Keys
from reservation.adapters.sql.engine import Database, DatabaseUnfit
from reservation.adapters.sql.tables import metadata
from reservation.domain.clock import SystemClock
from tests.support.in_process import Bench
from tests.support.restores import RestoredShop

pytestmark = pytest.mark.system

#: Rows that a restore sets.
OF_THE_RESTORE = {"restores", "marks", "processes", "losses", "probes"}
REASON = ("--reason", "lost")
#: Delays of SIGKILL after the load has begun.
KILL_AFTER_SECONDS = (0.0, 0.01, 0.03, 0.1, 0.3)
PATIENCE_SECONDS = 60.0


async def fill(here: Bench) -> str:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.finish(order, (await here.claim(order)).fence)
    await here.hold(sale_id, "bob")
    await here.flush(sale_id)
    return sale_id


@pytest.fixture
def shop(restored_shop: RestoredShop) -> RestoredShop:
    """A shop with a backup."""
    restored_shop.run(fill)
    restored_shop.command("backup", str(restored_shop.file))
    return restored_shop


def url_of(shop: RestoredShop) -> str:
    default = f"sqlite:///{shop.folder / 'var' / 'orders.sqlite3'}"
    return shop.environ.get("RESERVATION_DATABASE_URL", default)


def rows_of(shop: RestoredShop) -> dict[str, list[Any]]:
    """All rows that a restore must not change, by table."""

    async def read() -> dict[str, list[Any]]:
        database = await Database.open(url_of(shop))
        found: dict[str, list[Any]] = {}
        async with database.snapshot() as connection:
            for table in metadata.sorted_tables:
                columns = [column for column in table.columns if column.name != "epoch"]
                answer = await connection.execute(select(*columns).order_by(*columns))
                found[table.name] = [tuple(row) for row in answer]
        await database.aclose()
        return {name: rows for name, rows in found.items() if name not in OF_THE_RESTORE}

    return asyncio.run(read())


def refused(shop: RestoredShop, file: Path, status: int, *words: str) -> str:
    """The sentence of a refused restore, which leaves the database as it was."""
    before = is_empty(shop)
    done = shop.command("restore", "load", str(file), *REASON, *words, status=status)
    assert is_empty(shop) is before
    sentence = str(done.exception)
    assert "\n" not in sentence
    return sentence


def is_empty(shop: RestoredShop) -> bool:
    if shop.postgres is None:
        assert not list((shop.folder / "var").glob("*.sqlite3-*"))
        return not (shop.folder / "var" / "orders.sqlite3").exists()

    async def read() -> bool:
        async with Database(url_of(shop)).unmigrated() as connection:
            return not await connection.run_sync(
                lambda synchronous: synchronous.dialect.has_table(synchronous, "sales")
            )

    return asyncio.run(read())


def test_a_restored_database_has_every_row_of_the_backup(shop: RestoredShop) -> None:
    before = rows_of(shop)
    epochs = shop.run(lambda here: here.service.sql.sales.epochs())
    shop.lose_sql()

    manifest = shop.answer("restore", "load", str(shop.file), *REASON)

    assert (manifest["sales"], manifest["orders"]) == (1, 2)
    assert rows_of(shop) == before
    row = shop.run(lambda here: here.service.sql.restores.pending())
    assert row is not None
    assert (row.taken_at_ms, row.reason) == (manifest["takenAtMs"], "lost")
    now = shop.run(lambda here: here.service.sql.sales.epochs())
    assert now.keys() == epochs.keys()
    assert not set(now.values()) & set(epochs.values())


def test_a_backup_is_readable_by_its_owner_alone_and_replaces_no_file(shop: RestoredShop) -> None:
    assert shop.file.stat().st_mode & 0o777 == 0o600
    content = shop.file.read_bytes()
    assert "exists" in str(shop.command("backup", str(shop.file), status=1).exception)
    assert shop.file.read_bytes() == content
    assert not [one for one in shop.folder.iterdir() if one.name.startswith(".")]


def data_of(content: bytes) -> bytes | None:
    """The data in a backup, whatever its checksum says; None if they cannot be decompressed."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        member = archive.getinfo("database")
    name, extra = struct.unpack_from("<HH", content, member.header_offset + 26)
    start = member.header_offset + 30 + name + extra
    try:
        return zlib.decompress(content[start : start + member.compress_size], -zlib.MAX_WBITS)
    except zlib.error:
        return None


def with_one_bit_flipped(content: bytes) -> bytes:
    """The backup with other data.

    Many bits of a compressed file have no effect, such as the distance between two zeros.
    """
    for at in range(len(content) // 2, len(content)):
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        if data_of(flipped) != data_of(content):
            return flipped
    raise AssertionError("no bit of the second half changes the data")


def test_a_damaged_backup_is_refused(shop: RestoredShop) -> None:
    content = shop.file.read_bytes()
    shop.lose_sql()
    flipped, short, text = (shop.folder / name for name in ("flipped", "short", "text"))
    flipped.write_bytes(with_one_bit_flipped(content))
    short.write_bytes(content[:-100])
    text.write_text("no backup")
    for file in (flipped, short, text):
        assert str(file) in refused(shop, file, 1)


def changed(shop: RestoredShop, **members: Any) -> Path:
    """The backup with other members in its manifest."""
    file = shop.folder / f"changed-{len(list(shop.folder.iterdir()))}.zip"
    with zipfile.ZipFile(shop.file) as old, zipfile.ZipFile(file, "w") as new:
        manifest = json.loads(old.read("manifest.json"))
        new.writestr("manifest.json", json.dumps(manifest | members))
        new.writestr("database", old.read("database"))
    return file


def test_a_backup_of_a_newer_version_or_another_installation_is_refused(
    shop: RestoredShop,
) -> None:
    shop.lose_sql()
    other = "sqlite" if shop.postgres else "postgresql"
    assert "version 9.9 or later" in refused(shop, changed(shop, schema="9999", version="9.9"), 1)
    assert "level 99" in refused(shop, changed(shop, level=99), 1)
    assert other in refused(shop, changed(shop, kind=other), 78)
    foreign = changed(shop, orderIdKey="0" * 16)
    assert "another installation" in refused(shop, foreign, 78)
    shop.command("restore", "load", str(foreign), *REASON, "--accept-other-key")


def test_a_database_with_tables_is_refused(shop: RestoredShop) -> None:
    rows = rows_of(shop)
    assert "empty database" in refused(shop, shop.file, 1)
    assert rows_of(shop) == rows


def test_a_running_process_is_named(shop: RestoredShop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore, "EXPIRED_SECONDS", 1.0)
    shop.lose_sql()

    async def beat() -> None:
        keys = Keys(shop.environ["RESERVATION_KEY_PREFIX"])
        client = open_client(shop.environ["RESERVATION_REDIS_URL"], clock=SystemClock())
        await Heartbeat(client, keys, name="host-1", role="worker").beat()
        await client.aclose()

    asyncio.run(beat())
    assert "worker" in refused(shop, shop.file, 75)


def test_a_database_restored_by_other_means_is_marked(shop: RestoredShop) -> None:
    at = "2026-11-30T21:00:00+09:00"
    shop.command("restore", "mark", "--taken-at", "yesterday", *REASON, status=2)
    shop.command("restore", "mark", "--taken-at", at.removesuffix("+09:00"), *REASON, status=2)
    shop.answer("restore", "mark", "--taken-at", "2020-11-30T21:00:00+09:00", *REASON)
    row = shop.run(lambda here: here.service.sql.restores.pending())
    assert row is not None
    assert row.taken_at_ms == 1606737600000


def test_a_load_killed_at_any_moment_leaves_nothing_that_a_process_uses(
    shop: RestoredShop,
) -> None:
    before = rows_of(shop)
    shop.lose_sql()
    for delay in KILL_AFTER_SECONDS:
        kill_while_loading(shop, delay)
        if is_restored(shop):
            break
    else:
        shop.command("restore", "load", str(shop.file), *REASON)
    assert is_restored(shop)
    assert rows_of(shop) == before


def kill_while_loading(shop: RestoredShop, delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "api.cli", "restore", "load", str(shop.file), *REASON],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[3],
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    draft = shop.folder / "var" / "orders.sqlite3.restoring"
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and time.monotonic() < give_up_at:
        if draft.exists() if shop.postgres is None else children.read_text().strip():
            break
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


def is_restored(shop: RestoredShop) -> bool:
    """Whether the database has its mark; without it no process uses it."""
    if shop.postgres is None:
        target = shop.folder / "var" / "orders.sqlite3"
        if not target.exists():
            return False
    elif is_empty(shop):
        return False

    async def read() -> str:
        try:
            database = await Database.open(url_of(shop))
        except DatabaseUnfit as error:
            return str(error)
        await database.aclose()
        return ""

    if refusal := asyncio.run(read()):
        assert "restore is incomplete" in refusal
        return False
    assert shop.run(lambda here: here.service.sql.restores.pending()) is not None
    return True
