"""`reservation migrate`: a dry run changes nothing, a run applies the pending migrations."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from api.cli import app as cli
from api.cli.migrate import locks_of
from reservation.adapters.sql.engine import SCHEMA_VERSION
from reservation.domain.levels import HIGHEST_LEVEL


@pytest.fixture
def data_dir(tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESERVATION_DATA_DIR", str(tmp_path / "var"))
    monkeypatch.setenv("RESERVATION_REDIS_URL", valkey_url)
    monkeypatch.setenv("RESERVATION_KEY_PREFIX", "migrate")
    return tmp_path / "var"


def migrate(*options: str) -> Result:
    done = CliRunner().invoke(cli.cli, ["migrate", *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def tables(data_dir: Path) -> set[str]:
    with closing(sqlite3.connect(data_dir / "orders.sqlite3")) as connection:
        found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {name for (name,) in found}


def test_a_dry_run_shows_the_statements_and_changes_nothing(data_dir: Path) -> None:
    shown = migrate("--dry-run").output
    assert "CREATE TABLE sales (" in shown
    assert "all writes until the end of the transaction" in shown
    assert f"the highest of this version is {HIGHEST_LEVEL}" in shown
    assert tables(data_dir) == set()

    found = json.loads(migrate("--dry-run", "--level", "--json").output)
    assert [one["number"] for one in found["pending"]][-1] == SCHEMA_VERSION
    assert tables(data_dir) == set()


def test_pending_migrations_are_applied_once(data_dir: Path) -> None:
    assert f"The schema is at {SCHEMA_VERSION}" in migrate().output
    assert "installation" in tables(data_dir)
    found = json.loads(migrate("--level", "--json").output)
    assert found == {
        "pending": [],
        "level": HIGHEST_LEVEL,
        "highestLevel": HIGHEST_LEVEL,
        "schema": SCHEMA_VERSION,
    }
    assert "No migration is pending." in migrate("--dry-run").output


@pytest.mark.parametrize(
    ("statement", "locks"),
    [
        ("CREATE TABLE a (b TEXT)", "nothing: a is new"),
        ("CREATE TABLE a (b TEXT REFERENCES a (b))", "nothing: a is new"),
        (
            "CREATE TABLE a (\n\tFOREIGN KEY(b) REFERENCES d (b), \n\tc TEXT REFERENCES c (b)\n)",
            "writes of c, d until the end",
        ),
        ("CREATE UNIQUE INDEX i ON a (b)", "writes of a until the index is built"),
        ("ALTER TABLE a ADD COLUMN c BIGINT", "reads and writes of a for a moment"),
        ("ALTER TABLE a DROP COLUMN c", "reads and writes of a until the end"),
        ("UPDATE a SET b = 1", "the changed rows of a until the end"),
        ("VACUUM", "not known: read the statement"),
    ],
)
def test_the_locks_of_a_statement_are_named(statement: str, locks: str) -> None:
    assert locks_of(statement) == locks
