"""The schema number, pending migrations, and the mark that keeps release 0.1.0 from starting.

The schema number is that of the newest applied migration. Release 0.1.0 does not support levels. It
compares the number as text and accepts every higher one, so above level 1 the number has a prefix
that sorts before all digits. 0.1.0 then treats the schema as older than its own, does not find the
number among its migrations, and does not start.

While a restore is incomplete the number has another prefix, and no process uses the database.
"""

from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from sqlalchemy import Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.domain.levels import HIGHEST_LEVEL, LEVEL_OF_0_1_0

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = [
    "RESTORING",
    "PendingMigration",
    "applied",
    "bar",
    "complete_restore",
    "config_of",
    "is_restoring",
    "level_of",
    "pending",
    "stored",
    "unbar",
    "upgrade",
]

_BAR: Final = "+"
#: Sorts before all digits too, so that release 0.1.0 does not start either.
RESTORING: Final = "!"
_READ: Final = text("SELECT version_num FROM alembic_version")
_LEVEL: Final = text("SELECT value FROM installation WHERE name = 'level'")
_WRITE: Final = text("UPDATE alembic_version SET version_num = :number")


class PendingMigration(NamedTuple):
    """A migration that is not applied: its number, its description and its statements."""

    number: str
    sentence: str
    statements: tuple[str, ...]


def applied(connection: Connection) -> str:
    """The number of the newest applied migration; empty if there is none."""
    return stored(connection).removeprefix(_BAR)


def stored(connection: Connection) -> str:
    """The same with its prefix."""
    if not inspect(connection).has_table("alembic_version"):
        return ""
    return str(connection.execute(_READ).scalar() or "")


def bar(connection: Connection) -> None:
    """Mark the schema number, so that release 0.1.0 does not start on this database."""
    connection.execute(_WRITE, {"number": _BAR + applied(connection)})


def is_restoring(connection: Connection) -> bool:
    """Whether a restore has loaded the tables and has not set its mark yet."""
    return stored(connection).startswith(RESTORING)


def complete_restore(connection: Connection) -> None:
    """Remove the prefix of an incomplete restore, and keep release 0.1.0 from starting."""
    number = stored(connection).rpartition(":")[2].removeprefix(_BAR)
    connection.execute(_WRITE, {"number": _BAR + number})


def unbar(connection: Connection) -> None:
    """Remove the mark, so that release 0.1.0 starts on this database."""
    connection.execute(_WRITE, {"number": applied(connection)})


def upgrade(connection: Connection) -> None:
    """Apply all migrations in this transaction; the mark is kept."""
    from alembic import command  # noqa: PLC0415 - it takes 0.2 s, and most starts have none to apply

    is_barred = stored(connection).startswith(_BAR)
    if is_barred:
        unbar(connection)
    config = config_of()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    if is_barred:
        bar(connection)


def pending(connection: Connection) -> list[PendingMigration]:
    """The migrations that `upgrade` would apply, oldest first; changes nothing."""
    from alembic import command  # noqa: PLC0415 - see `upgrade`
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    now = applied(connection)
    scripts = ScriptDirectory.from_config(config_of()).walk_revisions("base", "head")
    found: list[PendingMigration] = []
    for each in reversed([one for one in scripts if one.revision > now]):
        written = StringIO()
        config = config_of(written)
        config.attributes["dialect"] = connection.dialect.name
        before = each.down_revision or "base"
        command.upgrade(config, f"{before}:{each.revision}", sql=True)
        found.append(PendingMigration(each.revision, each.doc, _statements(written.getvalue())))
    return found


async def level_of(connection: AsyncConnection) -> int:
    """The level in this database, even before the migration that adds its table."""
    if not await connection.run_sync(applied):
        return HIGHEST_LEVEL  # A new installation.
    if not await connection.run_sync(_has_table):
        return LEVEL_OF_0_1_0
    return (await connection.execute(_LEVEL)).scalar() or LEVEL_OF_0_1_0


def _has_table(connection: Connection) -> bool:
    return inspect(connection).has_table("installation")


def _statements(script: str) -> tuple[str, ...]:
    lines = [line for line in script.splitlines() if not line.startswith("--")]
    parts = "\n".join(lines).split(";\n")
    return tuple(part.strip().rstrip(";") for part in parts if part.strip())


def config_of(output: StringIO | None = None) -> "Config":
    """Alembic's configuration; statements are written to `output`, if given, and not executed."""
    from alembic.config import Config  # noqa: PLC0415 - see `upgrade`

    config = Config(output_buffer=output) if output else Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config
