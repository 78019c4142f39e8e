"""The sandbox's journal: one JSON line per change, written to the OS before the answer leaves."""

import fcntl
import os
from pathlib import Path

import msgspec

from reservation.sandbox.state_records import Change

__all__ = ["Journal", "JournalDamagedError"]

_FILE_NAME = "journal.jsonl"


class JournalDamagedError(Exception):
    """A line inside the journal cannot be read, or the lines do not follow each other."""


class Journal:
    """Appends changes and reads them back.

    A line is one `write` to the OS, so a killed process leaves whole lines and at most one torn
    line at the end, which no client got an answer for and which is cut off. Nothing is fsynced: the
    sandbox promises to survive its own death, not the machine's.

    Raises:
        BlockingIOError: another sandbox uses this directory.
        JournalDamagedError: see there.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / _FILE_NAME
        # Unbuffered: `write` is the system call itself.
        self._file = self._path.open("ab", buffering=0)
        self._encode = msgspec.json.Encoder().encode
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise

    def replay(self) -> list[Change]:
        """All changes so far, oldest first."""
        decode = msgspec.json.Decoder(Change).decode
        changes: list[Change] = []
        whole = 0
        with self._path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                try:
                    change = decode(line)
                except msgspec.MsgspecError as error:
                    raise JournalDamagedError(f"{self._path} line {len(changes) + 1}") from error
                if change.number != len(changes) + 1:
                    raise JournalDamagedError(f"{self._path} line {len(changes) + 1}: out of order")
                changes.append(change)
                whole += len(line)
        os.ftruncate(self._file.fileno(), whole)
        return changes

    def append(self, change: Change) -> None:
        """Write one change; after an error here nothing happened."""
        line = self._encode(change) + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
        except OSError:
            os.ftruncate(self._file.fileno(), before)
            raise
        if written != len(line):  # The disk is full.
            os.ftruncate(self._file.fileno(), before)
            raise OSError(f"{self._path} took {written} of {len(line)} bytes")

    def close(self) -> None:
        self._file.close()
