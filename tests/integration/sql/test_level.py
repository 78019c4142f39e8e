"""Level of an installation: kept in SQL and Redis, raised once no older process runs."""

import asyncio
import re
import secrets
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.heartbeat import Heartbeat
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.running_processes import RunningProcesses
from reservation.adapters.sql import schema_version
from reservation.adapters.sql.engine import SCHEMA_VERSION, Database
from reservation.adapters.sql.store import SqlStore
from reservation.application.readiness.level import (
    OlderProcesses,
    raise_level,
    refuse_higher_level,
)
from reservation.config.settings import Settings, SettingsError
from reservation.domain.clock import SystemClock
from reservation.domain.levels import HIGHEST_LEVEL, LEVEL_OF_0_1_0

ROOT = Path(__file__).resolve().parents[3]
#: The newest migration of the release before.
RELEASED: str = tomllib.loads((ROOT / "releases.toml").read_text())["release"][-1]["schema"]
#: Statements that a process of the release before does not notice.
ADDS = re.compile(
    r"CREATE TABLE |CREATE (UNIQUE )?INDEX "
    r"|ALTER TABLE \w+ ADD COLUMN \w+ (?!.*NOT NULL(?!.*DEFAULT)(?<!DEFAULT))"
    r"|UPDATE alembic_version SET "
)
#: Migrations that only widen a check: the release before writes none of the new values.
WIDENS = {"0012"}


class Shared:
    """A part of the shared Redis, under a prefix of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys = Keys(f"level-{secrets.token_hex(4)}")
        self.client = RedisClient(url, clock=SystemClock()).unguarded()
        self.processes = RunningProcesses(self.client, self.keys)

    async def old_process(self) -> str:
        """A heartbeat as 0.1.0 writes it; its key."""
        key = self.keys.process("old-1")
        await self.client.command("HSET", key, "role", "worker", "version", "0.1.0", "beat", "1")
        return key


@pytest.fixture
async def shared(valkey_url: str) -> AsyncIterator[Shared]:
    made = Shared(valkey_url)
    yield made
    await made.client.aclose()


async def at_the_release(url: str) -> None:
    """A database as the release before leaves it."""

    def back(connection: Connection) -> None:
        from alembic import command  # noqa: PLC0415

        schema_version.unbar(connection)
        config = schema_version.config_of()
        config.attributes["connection"] = connection
        command.downgrade(config, RELEASED)

    database = await Database.open(url)
    async with database.write() as connection:
        await connection.run_sync(back)
    await database.aclose()


async def stored_number(sql: SqlStore) -> str:
    async with sql.database.read() as connection:
        found = await connection.execute(text("SELECT version_num FROM alembic_version"))
        return str(found.scalar_one())


async def test_a_new_installation_starts_at_the_highest_level(empty_database_url: str) -> None:
    pending, level = await Database(empty_database_url).inspect()
    assert (pending[-1].number, level) == (SCHEMA_VERSION, HIGHEST_LEVEL)
    sql = await SqlStore.open(empty_database_url)
    assert await sql.installation.level() == HIGHEST_LEVEL
    assert await sql.database.schema_version() == SCHEMA_VERSION
    await sql.database.check()
    await sql.aclose()


async def test_an_upgraded_installation_keeps_its_level(empty_database_url: str) -> None:
    await at_the_release(empty_database_url)
    pending, level = await Database(empty_database_url).inspect()
    assert level == LEVEL_OF_0_1_0
    assert [one.number for one in pending][-1] == SCHEMA_VERSION
    assert all(one.statements for one in pending)
    again, _ = await Database(empty_database_url).inspect()
    assert again == pending, "an inspection changed the schema"
    sql = await SqlStore.open(empty_database_url)
    assert await sql.installation.level() == LEVEL_OF_0_1_0
    # As 0.1.0 compares it.
    assert await stored_number(sql) >= RELEASED
    await sql.aclose()
    assert (await Database(empty_database_url).inspect())[0] == []


async def test_migrations_beside_the_release_before_only_add(empty_database_url: str) -> None:
    await at_the_release(empty_database_url)
    pending, _ = await Database(empty_database_url).inspect()
    statements = [
        statement for one in pending if one.number not in WIDENS for statement in one.statements
    ]
    assert statements
    assert not [one for one in statements if not ADDS.match(" ".join(one.split()))]


async def test_a_process_that_runs_during_a_wider_check_continues(
    empty_database_url: str,
) -> None:
    """It has used the table before, and with SQLite the migration replaces the table."""
    insert = (
        "INSERT INTO events (sale_id, seq, event, order_id, at_ms, data, chain)"
        " VALUES ('s', {}, 'restocked', '', 1, '{{}}', '" + "0" * 40 + "')"
    )
    older = await Database.open(empty_database_url)

    async def write(statement: str) -> None:
        async with older.write() as connection:
            await connection.execute(text(statement))

    await write(
        "INSERT INTO sales VALUES ('s', '0123456789abcdef', '{}', 1, 'S', 'KRW', NULL, 0,"
        " 'open', NULL)"
    )
    await at_the_release(empty_database_url)
    await write(insert.format(1))
    await (await SqlStore.open(empty_database_url)).aclose()
    await write(insert.format(2))
    async with older.read() as connection:
        found = await connection.execute(text("SELECT seq FROM events ORDER BY seq"))
        assert list(found.scalars()) == [1, 2]
    await older.aclose()


async def test_the_level_rises_once_no_older_process_runs(
    empty_database_url: str, shared: Shared
) -> None:
    processes, client = shared.processes, shared.client
    await at_the_release(empty_database_url)
    sql = await SqlStore.open(empty_database_url)
    await Heartbeat(client, shared.keys, name="new-1", role="api").beat()
    old = await shared.old_process()

    with pytest.raises(OlderProcesses, match=r"old-1 \(worker, version 0\.1\.0\)"):
        await raise_level(sql.installation, processes, first_beat_seconds=0)
    assert await sql.installation.level() == LEVEL_OF_0_1_0
    assert await stored_number(sql) == SCHEMA_VERSION

    await client.command("DEL", old)
    await raise_level(sql.installation, processes, first_beat_seconds=0)
    assert await sql.installation.level() == await processes.level() == HIGHEST_LEVEL
    # 0.1.0 takes the schema for older than its own, and does not start.
    assert await stored_number(sql) < RELEASED
    await sql.database.check()
    await sql.aclose()
    again = await SqlStore.open(empty_database_url)
    assert await again.installation.level() == HIGHEST_LEVEL
    await again.aclose()


async def test_a_process_that_starts_during_the_raise_ends_it(
    empty_database_url: str, shared: Shared
) -> None:
    await at_the_release(empty_database_url)
    sql = await SqlStore.open(empty_database_url)
    raising = asyncio.create_task(
        raise_level(sql.installation, shared.processes, first_beat_seconds=3600)
    )
    while await stored_number(sql) == SCHEMA_VERSION:
        assert not raising.done()
    await shared.old_process()
    with pytest.raises(OlderProcesses):
        await raising
    assert await sql.installation.level() == LEVEL_OF_0_1_0
    assert await stored_number(sql) == SCHEMA_VERSION
    await sql.aclose()


@pytest.mark.parametrize("store", ["sql", "redis"])
async def test_a_version_below_the_level_does_not_start(
    empty_database_url: str,
    tmp_path: Path,
    shared: Shared,
    store: str,
) -> None:
    processes = shared.processes
    settings = Settings.load(
        {
            "RESERVATION_DATA_DIR": str(tmp_path / "var"),
            "RESERVATION_REDIS_URL": shared.url,
            "RESERVATION_KEY_PREFIX": shared.keys.process("").removesuffix(":proc:"),
        },
        None,
    )
    sql = await SqlStore.open(empty_database_url)
    await refuse_higher_level(settings, empty_database_url)
    assert await processes.level() == HIGHEST_LEVEL, "an empty Redis gets the level from SQL"
    if store == "sql":
        await sql.installation.raise_level(HIGHEST_LEVEL + 1)
    else:
        await processes.write_level(HIGHEST_LEVEL + 1)
    with pytest.raises(SettingsError, match=f"level {HIGHEST_LEVEL + 1} and this version"):
        await refuse_higher_level(settings, empty_database_url)
    await sql.aclose()
