"""Verify: a recorded history, read from a file and judged by the model."""

import gc
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from reservation.verification.model.checker import HistoryChecker, NotAHistory
from reservation.verification.model.history_format import DECODER
from reservation.verification.model.report import Judgement

__all__ = ["Unreadable", "verify"]

#: Bytes decoded at once: enough to amortise the calls, few enough to reuse warm memory.
_BLOCK_BYTES: Final = 1 << 18


class Unreadable(Exception):
    """The file is not a history."""


def verify(path: Path) -> Judgement:
    """The judgement on the history in a file.

    Raises:
        Unreadable: it cannot be read, or is not a whole history.
    """
    try:
        with path.open("rb") as file, _no_garbage_collection():
            return _judged(file)
    except (OSError, NotAHistory) as error:
        raise Unreadable(f"{path}: {error}") from error


def _judged(file: BinaryIO) -> Judgement:
    checker, number = HistoryChecker(), 1
    for lines in _blocks(file):
        try:
            records = DECODER.decode_lines(lines)
        except msgspec.MsgspecError as error:
            raise NotAHistory(_where(number, lines, error)) from error
        checker.add_all(number, records)
        number += len(records)
    return checker.finish()


def _where(number: int, lines: bytes, error: Exception) -> str:
    """The number of a line that cannot be decoded; searched only after its block failed."""
    # The decoder skips empty lines, and so does the count.
    for at, line in enumerate(filter(None, lines.split(b"\n")), number):
        try:
            DECODER.decode(line)
        except msgspec.MsgspecError as found:
            return f"line {at}: {found}"
    return f"line {number} or later: {error}"


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Whole lines, many at once."""
    while block := file.read(_BLOCK_BYTES):
        yield block + file.readline()


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    """Nothing here makes a cycle, and the collector would scan millions of orders repeatedly."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
