"""Copies of a whole database: a consistent dump of a live one, and its load into an empty one.

SQLite's online backup copies the file while others read and write it. PostgreSQL is dumped and
loaded by its own `pg_dump` and `psql`, which support every version of the server and its types.

    SQLite       load into a file beside the database, migrate, mark, rename
    PostgreSQL   load in one transaction, which leaves the schema number with a prefix that no
                 process accepts; migrate and mark in a second one, which removes the prefix

So a load that is killed leaves no database that a process would use. A repeat continues.
"""

import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Final
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import msgspec
from sqlalchemy import Connection, func, inspect, select, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection

from reservation.adapters.sql import schema_version
from reservation.adapters.sql.backup_file import BackupFile, Manifest, sync_folder, write_backup
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.tables import orders, sales

__all__ = ["DumpFailed", "TargetNotEmpty", "back_up", "load", "mark_in_place"]

#: The longest part of a program's complaint in our message.
_COMPLAINT_CHARS: Final = 300
_CONNECT_SECONDS: Final = "5"
_SQLITE_SUFFIXES: Final = ("-wal", "-shm", "-journal")

Mark = Callable[[AsyncConnection], Awaitable[None]]


class DumpFailed(Exception):
    """The database could not be copied; the message is one sentence."""


class TargetNotEmpty(Exception):
    """The database for a restore has tables, or a restore of another backup is incomplete."""


class _Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that a manifest records about its database."""

    schema: str
    level: int
    sales: int
    orders: int
    namespace: str


async def back_up(url: str, path: Path, manifest: Manifest) -> Manifest:
    """Write a backup of the database; return its manifest.

    Args:
        url: of the database. It may be in use.
        path: of the new file.
        manifest: with the facts that are not the database's.

    Raises:
        DumpFailed: the database could not be copied, or is damaged.
        FileExistsError: a file of this name exists.
        SQLAlchemyError, OSError: the database does not answer, or the disk is full.
    """
    database = Database(url)
    if not database.is_sqlite:
        manifest = _with(manifest, await _facts_of(database))
        with _dump_of(url) as stream:
            write_backup(path, manifest, lambda target: shutil.copyfileobj(stream, target))
        return manifest
    source = Path(make_url(url).database or "")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".backup-") as folder:
        copy = Path(folder) / "copy.sqlite3"
        _copy_sqlite(source, copy)
        manifest = _with(manifest, await _facts_of(Database(f"sqlite:///{copy}")))
        with copy.open("rb") as stream:
            write_backup(path, manifest, lambda target: shutil.copyfileobj(stream, target))
    return manifest


async def load(url: str, backup: BackupFile, mark: Mark) -> None:
    """Restore a backup into an empty database: all of it with the mark, or nothing that is used.

    Args:
        url: of the database.
        backup: the open backup, of the same kind of database.
        mark: sets the mark of the restore, in the last transaction.

    Raises:
        TargetNotEmpty: the database has tables.
        DumpFailed: the data could not be loaded.
        SQLAlchemyError, OSError: the database does not answer, or the disk is full.
    """
    if Database(url).is_sqlite:
        await _load_sqlite(Path(make_url(url).database or ""), backup, mark)
    else:
        await _load_postgresql(url, backup, mark)


async def mark_in_place(url: str, mark: Mark) -> None:
    """Set the mark in a database that was restored by other means."""
    await Database(url).complete_restore(mark)


def _with(manifest: Manifest, facts: _Facts) -> Manifest:
    return msgspec.structs.replace(manifest, **msgspec.structs.asdict(facts))


async def _facts_of(database: Database) -> _Facts:
    async with database.unmigrated() as connection:
        schema = await connection.run_sync(schema_version.applied)
        if not schema:
            raise DumpFailed("the database has no tables: start the service once, or migrate")
        namespace = await connection.run_sync(_namespace)
        counts = [
            (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for table in (sales, orders)
        ]
        level = await schema_version.level_of(connection)
    return _Facts(
        schema=schema, level=level, sales=counts[0], orders=counts[1], namespace=namespace
    )


def _namespace(connection: Connection) -> str:
    """PostgreSQL's schema of our tables; empty for SQLite."""
    if connection.dialect.name == "sqlite":
        return ""
    return str(connection.execute(text("SELECT current_schema()")).scalar_one())


def _copy_sqlite(source: Path, copy: Path) -> None:
    if not source.is_file():
        raise DumpFailed(f"there is no database at {source}")
    os.close(os.open(copy, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    try:
        with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(copy)) as target:
            # One step, and so one snapshot: writers continue in the write-ahead log.
            live.backup(target, pages=-1)
            # The copy is one file then.
            target.execute("PRAGMA journal_mode = DELETE")
            _check_sqlite(target, source)
    except sqlite3.Error as error:
        raise DumpFailed(f"{source} cannot be copied: {error}") from error


def _check_sqlite(connection: sqlite3.Connection, path: Path) -> None:
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise DumpFailed(f"{path} is damaged: {' '.join(str(found).split())[:_COMPLAINT_CHARS]}")


async def _load_sqlite(target: Path, backup: BackupFile, mark: Mark) -> None:
    beside = [target.with_name(target.name + suffix) for suffix in _SQLITE_SUFFIXES]
    existing = [one for one in (target, *beside) if one.exists() and one.stat().st_size]
    if existing:
        raise TargetNotEmpty(
            f"a restore needs an empty database, and {existing[0]} exists: move it away"
        )
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.restoring")
    _remove_sqlite(draft)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file, backup.data() as stream:
        shutil.copyfileobj(stream, file)
    try:
        with closing(sqlite3.connect(draft)) as connection:
            _check_sqlite(connection, draft)
    except sqlite3.Error as error:
        raise DumpFailed(f"the backup has a damaged database: {error}") from error
    await Database(f"sqlite:///{draft}").complete_restore(mark)
    with closing(sqlite3.connect(draft)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    descriptor = os.open(draft, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    for one in beside:
        one.unlink(missing_ok=True)
    draft.replace(target)
    sync_folder(target.parent)


def _remove_sqlite(path: Path) -> None:
    for suffix in ("", *_SQLITE_SUFFIXES):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


async def _load_postgresql(url: str, backup: BackupFile, mark: Mark) -> None:
    database = Database(url)
    prefix = f"{schema_version.RESTORING}{backup.manifest.taken_at_ms}:"
    async with database.unmigrated() as connection:
        tables = await connection.run_sync(_tables)
        stored = await connection.run_sync(schema_version.stored)
    if tables and not stored.startswith(prefix):
        if stored.startswith(schema_version.RESTORING):
            raise TargetNotEmpty("a restore of another backup is incomplete: recreate the database")
        raise TargetNotEmpty(
            f"a restore needs an empty database, and this one has the table {tables[0]}"
        )
    if not tables:
        _load_dump(url, backup, prefix)
    await database.complete_restore(mark)


def _tables(connection: Connection) -> list[str]:
    found = inspect(connection)
    names = [name for name in found.get_schema_names() if name != "information_schema"]
    return [table for name in names for table in sorted(found.get_table_names(schema=name))]


def _load_dump(url: str, backup: BackupFile, prefix: str) -> None:
    """Load a dump in one transaction.

    The transaction is part of the input: where this process is killed, psql reads the end of its
    input, and the server rolls the transaction back.
    """
    where, environ = _libpq(url)
    command = [
        _program("psql"), "--no-psqlrc", "--quiet", "--no-password",
        "--set=ON_ERROR_STOP=1", f"--dbname={where}",
    ]  # fmt: skip
    namespace = backup.manifest.namespace.replace('"', '""')
    number = (
        f"UPDATE \"{namespace}\".alembic_version SET version_num = '{prefix}' || "  # noqa: S608 - our own numbers
        "ltrim(version_num, '+')"
    )
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=complaints,
            env=environ,
        ) as process,
    ):
        stream = process.stdin
        assert stream is not None  # noqa: S101 - it is a pipe
        try:
            with backup.data() as data, stream:
                stream.write(b"BEGIN;\n")
                shutil.copyfileobj(data, stream)
                stream.write(f"\n{number};\nCOMMIT;\n".encode())
        except BrokenPipeError:
            pass  # Its complaint says why.
        if process.wait():
            raise DumpFailed(f"psql could not load the backup: {_complaint(complaints)}")


@contextmanager
def _dump_of(url: str) -> Generator["_Checked"]:
    where, environ = _libpq(url)
    command = [
        _program("pg_dump"), "--format=plain", "--no-owner", "--no-privileges", "--encoding=UTF8",
        "--no-password", f"--dbname={where}",
    ]  # fmt: skip
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=environ,
        ) as process,
    ):
        stream = process.stdout
        assert stream is not None  # noqa: S101 - it is a pipe
        yield _Checked(stream, process, complaints)


class _Checked:
    """The output of a program, whose end is an error if the program failed."""

    def __init__(
        self, stream: IO[bytes], process: subprocess.Popen[bytes], complaints: IO[bytes]
    ) -> None:
        self._stream = stream
        self._process = process
        self._complaints = complaints

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        if not content and self._process.wait():
            raise DumpFailed(f"pg_dump failed: {_complaint(self._complaints)}")
        return content


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise DumpFailed(f"{name} is not installed: install PostgreSQL's client programs")
    return found


def _complaint(stream: IO[bytes]) -> str:
    stream.seek(0)
    return " ".join(stream.read(4096).decode(errors="replace").split())[:_COMPLAINT_CHARS]


def _libpq(url: str) -> tuple[str, dict[str, str]]:
    """The URL without its password, and the environment with it: others can read arguments."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    query = parse_qsl(parts.query, keep_blank_values=True)
    password = dict(query).get("password", unquote(password))
    kept = urlencode([one for one in query if one[0] != "password"])
    where = urlunsplit(("postgresql", f"{name}{at}{host}", parts.path, kept, ""))
    environ = {"PGCONNECT_TIMEOUT": _CONNECT_SECONDS, **os.environ}
    return where, environ | ({"PGPASSWORD": password} if password else {})
