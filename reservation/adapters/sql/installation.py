"""The level of the installation, and the mark against releases that do not support levels."""

from typing import Final

from sqlalchemy import text

from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.schema_version import bar, level_of, unbar

__all__ = ["InstallationRepository"]

_RAISE: Final = text(
    "INSERT INTO installation (name, value) VALUES ('level', :level)"
    " ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    " WHERE installation.value < excluded.value"
)


class InstallationRepository:
    """Reads and raises the level, which is one row."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def level(self) -> int:
        """The level of the installation."""
        async with self._database.read() as connection:
            return await level_of(connection)

    async def bar_older(self) -> None:
        """Keep releases without levels from starting; running processes are not affected."""
        async with self._database.write() as connection:
            await connection.run_sync(bar)

    async def admit_older(self) -> None:
        """Undo `bar_older`."""
        async with self._database.write() as connection:
            await connection.run_sync(unbar)

    async def raise_level(self, level: int) -> None:
        """Raise the level; a lower value has no effect."""
        async with self._database.write() as connection:
            await connection.run_sync(bar)
            await connection.execute(_RAISE, {"level": level})
