"""Input and output of every part of the benchmark."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

__all__ = ["Goal", "Part", "Run", "Section"]


class Run(msgspec.Struct, frozen=True):
    """One call of the benchmark."""

    #: A folder on a real disk: `appendfsync always` is measured, so not in memory.
    home: Path
    #: The buyers of every load (`sale.write_buyers`), made once.
    buyers: Path
    #: Seconds in all instead of minutes: a smoke test.
    quick: bool
    #: The contenders by name; None is all of them.
    contenders: Sequence[str] | None
    #: Connections of a closed loop, each with one request in progress.
    connections: int
    #: Reports progress.
    say: Callable[[str], None]


class Goal(msgspec.Struct, frozen=True, rename="camel"):
    """A target of the service, and the measured value."""

    name: str
    #: As a person reads it: `3.1 x`.
    value: str
    wanted: str
    reached: bool


class Section(msgspec.Struct, frozen=True):
    """A part's result: a table, the numbers in it and their goals."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    goals: list[Goal]
    #: The machine-readable result: plain numbers by name.
    data: object
    notes: list[str] = []


#: Measures, in a folder that it may fill.
Part = Callable[[Run], Section]
