"""The file of a backup: a zip archive with a manifest and the data of one database.

The archive's own checksums detect damage and truncation. The file is published under its name only
when it is complete, and never replaces another file.
"""

import os
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import msgspec

from reservation.adapters.sql.engine import SCHEMA_VERSION
from reservation.domain.levels import HIGHEST_LEVEL

__all__ = ["BackupDamaged", "BackupFile", "Manifest", "open_backup", "sync_folder", "write_backup"]

#: The format of the archive; a later version may add members.
FORMAT: Final = 1
_MANIFEST: Final = "manifest.json"
_DATABASE: Final = "database"
_MANIFEST_BYTES_MAX: Final = 64 * 1024
#: The fastest level of compression: a third of the size, at 50 to 100 MB/s on one core.
_COMPRESSION: Final = 1


class BackupDamaged(Exception):
    """The file is not a backup, is damaged, or needs a newer version."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The facts by which a restore accepts or refuses a file."""

    format: int = FORMAT
    #: The release that wrote it.
    version: str
    #: `sqlite` or `postgresql`.
    kind: str
    #: The newest migration, and the level.
    schema: str
    level: int
    #: The instant before the first row was read: later changes may be missing.
    taken_at_ms: int
    #: Identifies the key from which order ids are derived, without revealing it.
    order_id_key: str
    sales: int
    orders: int
    #: PostgreSQL's schema of the tables.
    namespace: str = ""


class BackupFile:
    """An open backup whose checksums were verified."""

    def __init__(self, archive: zipfile.ZipFile, manifest: Manifest) -> None:
        self._archive = archive
        self.manifest = manifest

    def data(self) -> IO[bytes]:
        """The data of the database; the caller closes it."""
        return self._archive.open(_DATABASE)


def write_backup(path: Path, manifest: Manifest, write_data: Callable[[IO[bytes]], object]) -> None:
    """Write a backup, and publish it under its name once it is complete and on the disk.

    Args:
        path: of the new file.
        manifest: its facts.
        write_data: writes the data to the given stream; its errors leave no file.

    Raises:
        FileExistsError: a file of this name exists.
        OSError: the disk is full, or the folder is missing.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with zipfile.ZipFile(
                file, "w", zipfile.ZIP_DEFLATED, compresslevel=_COMPRESSION
            ) as archive:
                archive.writestr(_MANIFEST, msgspec.json.encode(manifest))
                with archive.open(_DATABASE, "w", force_zip64=True) as stream:
                    write_data(stream)
            file.flush()
            os.fsync(descriptor)
        os.link(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def open_backup(path: Path) -> Generator[BackupFile]:
    """Open a backup and verify all of it.

    Raises:
        BackupDamaged: it is not a backup, is damaged, or needs a newer version.
        OSError: it cannot be read.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise BackupDamaged(f"{path} is not a backup, or it is incomplete: {error}") from error
    with archive:
        yield BackupFile(archive, _verified(path, archive))


def _verified(path: Path, archive: zipfile.ZipFile) -> Manifest:
    try:
        if (broken := archive.testzip()) is not None:
            raise BackupDamaged(f"{path} is damaged: {broken} has another checksum")
        with archive.open(_MANIFEST) as stream:
            manifest = msgspec.json.decode(stream.read(_MANIFEST_BYTES_MAX), type=Manifest)
        archive.getinfo(_DATABASE)
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, NotImplementedError) as error:
        raise BackupDamaged(f"{path} is not a backup, or it is damaged: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BackupDamaged(f"{path} is not a backup: its manifest is unreadable") from error
    except zlib.error as error:
        raise BackupDamaged(f"{path} is damaged: {error}") from error
    if (
        manifest.format > FORMAT
        or manifest.schema > SCHEMA_VERSION
        or manifest.level > HIGHEST_LEVEL
    ):
        raise BackupDamaged(
            f"{path} has schema {manifest.schema} and level {manifest.level}, this version "
            f"supports {SCHEMA_VERSION} and {HIGHEST_LEVEL}: restore it with version "
            f"{manifest.version} or later"
        )
    return manifest


def sync_folder(folder: Path) -> None:
    """Make a new name in the folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
