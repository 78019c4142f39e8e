"""A shop whose SQL is backed up, lost and restored by the commands, with a sandbox PG."""

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from click import ClickException
from click.testing import CliRunner, Result

from api.cli import app as cli
from api.cli.errors import CommandError
from reservation.bootstrap import opened
from reservation.config.settings import Settings
from tests.faults.payments.shop import LIMITS
from tests.support.databases import PostgresServer
from tests.support.in_process import Bench, place_database
from tests.support.sandbox import RunningSandbox, running_sandbox

__all__ = ["RestoredShop", "restored_shop"]

_T = TypeVar("_T")


class RestoredShop:
    """Settings in the environment, the sandbox, and the commands."""

    def __init__(
        self,
        folder: Path,
        redis_url: str,
        sandbox: RunningSandbox,
        postgres: PostgresServer | None,
        patch: pytest.MonkeyPatch,
    ) -> None:
        self.folder = folder
        self.sandbox = sandbox
        self.postgres = postgres
        self.file = folder / "backup.zip"
        self.environ = {
            "RESERVATION_DATA_DIR": str(folder / "var"),
            "RESERVATION_REDIS_URL": redis_url,
            "RESERVATION_KEY_PREFIX": f"t{secrets.token_hex(4)}",
            "RESERVATION_TOSS_API_URL": sandbox.url,
        }
        if postgres is not None:
            self.environ["RESERVATION_DATABASE_URL"] = postgres.make_migrated_database()
            # pg_dump must not be older than the server.
            patch.setenv("PATH", f"{postgres.programs}:/usr/bin:/bin")
        place_database(Settings.load(self.environ, None))
        patch.chdir(folder)
        self._patch = patch
        self._export()

    def _export(self) -> None:
        for name, value in self.environ.items():
            self._patch.setenv(name, value)

    def use(self, environ: dict[str, str]) -> None:
        """Change the settings."""
        self.environ = environ
        self._export()

    def invoke(self, *words: str) -> Result:
        """Run a command; its error is in the result."""
        return CliRunner().invoke(cli.cli, list(words), standalone_mode=False)

    def command(self, *words: str, status: int | None = 0) -> Result:
        """Run a command, which must end with this status, if one is given."""
        done = self.invoke(*words)
        error = done.exception
        if not isinstance(error, CommandError | ClickException | None):
            raise error
        returned = done.return_value if isinstance(done.return_value, int) else done.exit_code
        returned = error.exit_code if isinstance(error, ClickException) else returned
        found = getattr(error, "status", returned)
        assert status in (None, found), (done.output, error)
        return done

    def answer(self, *words: str, status: int | None = 0) -> dict[str, Any]:
        return json.loads(self.command(*words, "--json", status=status).stdout)

    def run(self, steps: Callable[[Bench], Awaitable[_T]]) -> _T:
        """Run these steps with an open service."""

        async def run() -> _T:
            async with self._service() as bench:
                return await steps(bench)

        return asyncio.run(run())

    @asynccontextmanager
    async def _service(self) -> AsyncGenerator[Bench]:
        async with opened(Settings.load(self.environ, None), limits=LIMITS) as service:
            bench = Bench(service)
            await bench.until_connected()
            yield bench

    def lose_sql(self) -> None:
        """The database is gone; PostgreSQL has a new, empty one."""
        if self.postgres is not None:
            self.environ["RESERVATION_DATABASE_URL"] = self.postgres.make_database()
            self._export()
            return
        for file in (self.folder / "var").glob("orders.sqlite3*"):
            file.unlink()

    def lose_redis(self) -> None:
        """Every key of the service is gone."""

        async def lose(bench: Bench) -> None:
            prefix = self.environ["RESERVATION_KEY_PREFIX"]
            command = bench.service.connections.command
            await command("UNLINK", *await command("KEYS", f"{prefix}:*"))

        self.run(lose)

    def restore(self) -> None:
        """Load the backup and compare."""
        self.command("restore", "load", str(self.file), "--reason", "lost")
        self.invoke("restore", "compare")


@pytest.fixture(params=["sqlite", "postgresql"])
def restored_shop(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    valkey_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RestoredShop]:
    """The shop on each database."""
    postgres = None if request.param == "sqlite" else request.getfixturevalue("postgres")
    with running_sandbox(tmp_path) as sandbox:
        yield RestoredShop(tmp_path, valkey_url, sandbox, postgres, monkeypatch)
