"""`reservation migrate`: pending migrations of SQL, and the level of the installation."""

import asyncio
import json
import os
import re
from typing import Any, Final

import click
from rich_click import RichCommand
from sqlalchemy.exc import SQLAlchemyError

from api.cli.errors import BAD_SETTING, UNREACHABLE, CommandError
from api.cli.local import run_locally
from reservation.adapters.redis.running_processes import RunningProcesses
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.errors import DatabaseUnfit
from reservation.adapters.sql.schema_version import PendingMigration
from reservation.application.readiness.level import OlderProcesses, raise_level
from reservation.bootstrap import Service, sqlite_url
from reservation.config.settings import Settings, SettingsError
from reservation.domain.levels import HIGHEST_LEVEL

__all__ = ["locks_of", "migrate"]

_NEW_TABLE: Final = "nothing: {} is new"
#: The locks of each kind of statement in PostgreSQL, by its first words.
_LOCKS: Final = (
    (r"CREATE TABLE (\S+)", _NEW_TABLE),
    (r"CREATE (?:UNIQUE )?INDEX \S+ ON (\S+)", "writes of {} until the index is built"),
    (r"ALTER TABLE (\S+) ADD COLUMN", "reads and writes of {} for a moment"),
    (r"ALTER TABLE (\S+)", "reads and writes of {} until the end"),
    (r"DROP TABLE (\S+)", "reads and writes of {} until the end"),
    (r"DROP INDEX (\S+)", "reads and writes of the table of {} until the end"),
    (r"(?:INSERT INTO|UPDATE|DELETE FROM) (\S+)", "the changed rows of {} until the end"),
)

#: A foreign key of a new table locks the table that it refers to.
_REFERENCE: Final = r"REFERENCES ([\w.]+)"

_LOCKS_OF_SQLITE: Final = "all writes until the end of the transaction"


def locks_of(statement: str) -> str:
    """The operations that this statement blocks in PostgreSQL."""
    for pattern, locks in _LOCKS:
        if found := re.match(pattern, statement, re.IGNORECASE):
            referred = {*re.findall(_REFERENCE, statement, re.IGNORECASE)} - {found[1]}
            if locks == _NEW_TABLE and referred:
                return f"writes of {', '.join(sorted(referred))} until the end"
            return locks.format(found[1])
    return "not known: read the statement"


@click.command(cls=RichCommand)
@click.option("--dry-run", is_flag=True, help="Print pending migrations and change nothing.")
@click.option(
    "--level", "raises", is_flag=True, help="Raise the level to the highest of this version."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def migrate(*, dry_run: bool, raises: bool, as_json: bool) -> int:
    """Apply pending migrations of SQL, and raise the level.

    The service also applies migrations when it starts. Only this command raises the level. After
    that, the previous release no longer starts on this installation.
    """
    pending, level, is_sqlite = _inspected()
    found: dict[str, Any] = {
        "pending": [_described(one, is_sqlite=is_sqlite) for one in pending],
        "level": level,
        "highestLevel": HIGHEST_LEVEL,
    }
    if not as_json:
        _show(found, is_sqlite=is_sqlite)
    if not dry_run:

        async def work(service: Service) -> int:
            found["schema"] = await service.sql.database.schema_version()
            found["level"] = await _raised(service) if raises else level
            return 0

        run_locally(work)
        if not as_json:
            click.echo(f"The schema is at {found['schema']}, the level is {found['level']}.")
    if as_json:
        click.echo(json.dumps(found))
    return 0


def _inspected() -> tuple[list[PendingMigration], int, bool]:
    """The pending migrations, the level, and whether the database is SQLite."""
    try:
        settings = Settings.load(os.environ)
        database = Database(settings.database_url or sqlite_url(settings))
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        pending, level = asyncio.run(database.inspect())
    except SettingsError as error:
        raise CommandError(error, BAD_SETTING) from error
    except DatabaseUnfit as error:
        raise CommandError(f"RESERVATION_DATABASE_URL: {error}", BAD_SETTING) from error
    except (SQLAlchemyError, OSError) as error:
        raise CommandError(f"SQL does not answer: {type(error).__name__}", UNREACHABLE) from error
    return pending, level, database.is_sqlite


def _described(migration: PendingMigration, *, is_sqlite: bool) -> dict[str, Any]:
    return {
        "number": migration.number,
        "sentence": migration.sentence,
        "statements": [
            {"sql": sql, "locks": _LOCKS_OF_SQLITE if is_sqlite else locks_of(sql)}
            for sql in migration.statements
        ],
    }


def _show(found: dict[str, Any], *, is_sqlite: bool) -> None:
    pending = found["pending"]
    if not pending:
        click.echo("No migration is pending.")
    else:
        click.echo(f"Pending migrations: {len(pending)}, in one transaction.")
        if is_sqlite:
            click.echo(f"Each locks {_LOCKS_OF_SQLITE}.")
    for migration in pending:
        click.echo(f"\n{migration['number']}  {migration['sentence']}")
        for statement in migration["statements"]:
            click.echo(f"{statement['sql']};")
            if not is_sqlite:
                click.echo(f"  -- locks {statement['locks']}")
    click.echo(f"Level {found['level']}; the highest of this version is {found['highestLevel']}.")


async def _raised(service: Service) -> int:
    """The level, raised to the highest of this version."""
    level = await service.sql.installation.level()
    if level >= HIGHEST_LEVEL:
        return level
    running = RunningProcesses(service.connections.unguarded(), service.keys)
    try:
        await raise_level(service.sql.installation, running)
    except OlderProcesses as error:
        raise CommandError(error) from error
    return HIGHEST_LEVEL
