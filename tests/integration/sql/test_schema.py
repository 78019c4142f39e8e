"""The schema: migrated by the first process to start, the same on both databases, guarded."""

import asyncio
import stat
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from reservation.adapters.sql import engine as database_module
from reservation.adapters.sql import postgresql
from reservation.adapters.sql.engine import SCHEMA_VERSION, Database, DatabaseUnfit
from reservation.adapters.sql.schema_version import unbar
from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.tables import metadata

MIGRATIONS = Path(database_module.__file__).parent / "migrations"

SALE = """
    INSERT INTO sales
    VALUES ('s', '0123456789abcdef', '{}', 1, 'S', 'KRW', NULL, 0, 'open', NULL)
"""
ORDER = (
    "INSERT INTO orders (order_id, sale_id, buyer_id, status, amount, currency, order_name, digest,"
    " created_at_ms, updated_at_ms, expires_at_ms, seq, fence)"
    " VALUES ('o', 's', 'b', 'HELD', 1, 'KRW', 'n', 'd', 1, 1, 1, 1, 0)"
)
INTENT = "INSERT INTO payment_intents VALUES ('o', 1, 's', {}, 1, NULL, NULL, NULL)"
EVENT = "INSERT INTO events VALUES ('s', {seq}, '{event}', 'o', 1, '{{}}', '" + "0" * 40 + "')"


def modes_in(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


async def run(database_url: str, *statements: str) -> None:
    database = await Database.open(database_url)
    try:
        for statement in statements:
            async with database.write() as connection:
                await connection.execute(text(statement))
    finally:
        await database.aclose()


async def test_the_migrations_create_the_tables_of_the_code(empty_database_url: str) -> None:
    def differences(connection: Connection) -> list[Any]:
        return compare_metadata(MigrationContext.configure(connection), metadata)

    database = await Database.open(empty_database_url)
    async with database.read() as connection:
        found = await connection.run_sync(differences)
    await database.aclose()
    assert found == []


def test_the_code_requires_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == SCHEMA_VERSION


async def test_concurrent_starts_migrate_once(empty_database_url: str) -> None:
    stores = await asyncio.gather(*(SqlStore.open(empty_database_url) for _ in range(6)))
    assert {await sql.database.schema_version() for sql in stores} == {SCHEMA_VERSION}
    for sql in stores:
        await sql.database.check()
        await sql.aclose()


async def test_the_migrations_can_be_reverted_completely(database_url: str) -> None:
    def downgrade(connection: Connection) -> None:
        from alembic import command  # noqa: PLC0415

        unbar(connection)
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.downgrade(config, "base")

    database = await Database.open(database_url)
    async with database.write() as connection:
        await connection.run_sync(downgrade)
    assert await database.schema_version() == ""
    await database.aclose()
    again = await SqlStore.open(database_url)
    await again.database.check()
    await again.aclose()


async def test_a_migration_of_the_event_types_keeps_the_events(database_url: str) -> None:
    def migrate(connection: Connection) -> None:
        from alembic import command  # noqa: PLC0415

        unbar(connection)
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.set_main_option("path_separator", "os")
        config.attributes["connection"] = connection
        command.downgrade(config, "0011")
        command.upgrade(config, "head")

    await run(database_url, SALE, EVENT.format(seq=1, event="expired"))
    database = await Database.open(database_url)
    async with database.write() as connection:
        await connection.run_sync(migrate)
    async with database.read() as connection:
        rows = (await connection.execute(text("SELECT seq, event FROM events"))).all()
        differences = await connection.run_sync(
            lambda one: compare_metadata(MigrationContext.configure(one), metadata)
        )
    await database.aclose()
    assert [tuple(row) for row in rows] == [(1, "expired")]
    assert differences == []
    await run(database_url, EVENT.format(seq=2, event="lent"))


@pytest.mark.parametrize(
    "statement",
    [
        ORDER.replace("'HELD', 1", "'HELD', -1"),
        ORDER.replace("'HELD'", "'SOLD'"),
        ORDER.replace("'HELD'", "'CONFIRMED'"),
        ORDER.replace("'s', 'b'", "'another', 'b'"),
        "INSERT INTO items VALUES ('s', 'a', 'A', 1, 1, 5, 6, -1, 0, TRUE)",
        "INSERT INTO items VALUES ('s', 'a', 'A', 1, 1, 5, 5, 1, 0, TRUE)",
        "INSERT INTO items VALUES ('s', 'a', 'A', -1, 1, 5, 5, 0, 0, TRUE)",
        "INSERT INTO order_lines VALUES ('o', 0, 'a', 1, 1)",
        "INSERT INTO stock_movements VALUES ('s', 1, 'a', -1, 1, 1, 0)",
        INTENT.format("'intent', 'k', 1, 'KRW', 'i'"),
        INTENT.format("'void', 'k', NULL, NULL, NULL"),
        "INSERT INTO payments VALUES ('k','o','DONE',-1,0,'KRW',NULL,NULL,NULL,NULL,1,'','','','')",
        "INSERT INTO refunds VALUES ('o','i','d','r',TRUE,'x',NULL,'paid',NULL,1,1,0,FALSE,'[]')",
        EVENT.format(seq=0, event="expired"),
        EVENT.format(seq=1, event="vanished"),
        "INSERT INTO cursors VALUES ('s', -1, '')",
        "INSERT INTO transfers VALUES ('t', 1, 'a', 1, 1, 1, 1, 'o')",
        "INSERT INTO transfers VALUES ('s', 1, 'a', 1, 0, 0, 1, 'o')",
        "INSERT INTO transfers VALUES ('s', 1, 'a', 1, 2, 1, 1, 'o')",
    ],
)
async def test_constraints_refuse_an_impossible_row(database_url: str, statement: str) -> None:
    await run(database_url, SALE)
    with pytest.raises(IntegrityError):
        await run(database_url, statement)


@pytest.mark.parametrize("event", ["prepared", "refunded"])
async def test_an_order_begins_once_and_is_refunded_once(database_url: str, event: str) -> None:
    await run(database_url, SALE, EVENT.format(seq=1, event=event))
    with pytest.raises(IntegrityError):
        await run(database_url, EVENT.format(seq=2, event=event))


async def test_constraints_allow_one_state_and_no_exit_from_refunded(database_url: str) -> None:
    await run(database_url, SALE, ORDER)
    with pytest.raises(IntegrityError):
        await run(database_url, ORDER.replace("'HELD'", "'EXPIRED'"))
    await run(database_url, "UPDATE orders SET status = 'REFUNDED', payment_key = 'k'")
    with pytest.raises(IntegrityError):
        await run(database_url, "UPDATE orders SET status = 'CONFIRMED'")
    await run(database_url, "UPDATE orders SET seq = 2")


async def test_two_lines_of_an_order_with_one_item_are_refused(database_url: str) -> None:
    line = "INSERT INTO order_lines VALUES ('o', 0, 'a', 1, 1)"
    await run(database_url, SALE, ORDER, line)
    with pytest.raises(IntegrityError):
        await run(database_url, line)
    with pytest.raises(IntegrityError):
        await run(database_url, line.replace("'a', 1", "'b', 0"))


async def test_an_sqlite_file_is_private_and_synced_at_each_commit(
    empty_sqlite_url: str, tmp_path: Path
) -> None:
    database = await Database.open(empty_sqlite_url)
    async with database.write() as connection:
        journal = (await connection.execute(text("PRAGMA journal_mode"))).scalar_one()
        synchronous = (await connection.execute(text("PRAGMA synchronous"))).scalar_one()
        foreign_keys = (await connection.execute(text("PRAGMA foreign_keys"))).scalar_one()
        await connection.execute(text(SALE))
    assert (journal, synchronous, foreign_keys) == ("wal", 2, 1)
    modes = modes_in(tmp_path)
    await database.aclose()
    assert set(modes.values()) == {0o600}
    assert "ledger.db-wal" in modes


async def test_an_outdated_schema_is_unfit(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = await SqlStore.open(sqlite_url)
    await sql.database.check()
    monkeypatch.setattr(database_module, "SCHEMA_VERSION", "9999")
    with pytest.raises(DatabaseUnfit):
        await sql.database.check()
    await sql.aclose()


async def test_a_postgres_with_async_commit_or_read_only_is_unfit(postgres_url: str) -> None:
    sql = await SqlStore.open(postgres_url)
    await sql.aclose()
    options = "&options=-c%20synchronous_commit%3Doff"
    forgetful = await SqlStore.open(postgres_url + options)
    with pytest.raises(DatabaseUnfit):
        await forgetful.database.check()
    await forgetful.aclose()
    read_only = await SqlStore.open(
        postgres_url + "&options=-c%20default_transaction_read_only%3Don"
    )
    with pytest.raises(DBAPIError):
        await read_only.database.check()
    await read_only.aclose()


@pytest.mark.parametrize("url", ["", "mysql://h/d", "sqlite://", "sqlite:///:memory:", "ledger.db"])
async def test_a_url_of_another_database_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        await SqlStore.open(url)


async def test_an_unreachable_postgres_is_reported() -> None:
    with pytest.raises(OSError):
        await SqlStore.open("postgresql://postgres:@/postgres?host=/nonexistent")


async def hold_lock(database: Database, lock: TextClause) -> None:
    async with database.write() as connection:
        await connection.execute(lock)
        await asyncio.sleep(3)
        await connection.execute(lock)


async def test_an_idle_transaction_is_ended_by_postgres(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that lost its power in a transaction holds locks that others wait for."""
    monkeypatch.setattr(postgresql, "IDLE_SECONDS", 1)
    gone = await Database.open(postgres_url)
    # A busy machine may pause the waiting transaction for longer than a second.
    monkeypatch.setattr(postgresql, "IDLE_SECONDS", 60)
    other = await Database.open(postgres_url)
    try:
        await run(postgres_url, SALE)
        lock = text("UPDATE sales SET version = version WHERE sale_id = 's'")
        lost = asyncio.create_task(hold_lock(gone, lock))
        async with asyncio.timeout(30):
            await asyncio.sleep(0.2)
            async with other.write() as connection:
                await connection.execute(lock)
        with pytest.raises(DBAPIError):
            await lost
    finally:
        await gone.aclose()
        await other.aclose()
