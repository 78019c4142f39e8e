"""Report: shows the results as tables, and keeps them as JSON and as a picture."""

import os
import platform
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.support.run import Goal, Section

__all__ = ["Results", "keep", "results_of", "show"]

_REACHED: Final = {True: "yes", False: "no"}


class Machine(msgspec.Struct, frozen=True):
    """The machine of a run: numbers of two machines are not comparable."""

    cores: int
    system: str
    python: str
    #: Other work on the machine right before: the load average of the last minute.
    load: float


class Results(msgspec.Struct, frozen=True, rename="camel"):
    """Everything of one run."""

    finished_at: str
    quick: bool
    machine: Machine
    goals: list[Goal]
    sections: dict[str, Section]


def results_of(sections: dict[str, Section], *, quick: bool, load: float) -> Results:
    """The results of a run that are kept."""
    return Results(
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        quick=quick,
        machine=Machine(
            cores=os.cpu_count() or 1,
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            load=load,
        ),
        goals=[goal for section in sections.values() for goal in section.goals],
        sections=sections,
    )


def show(results: Results, console: Console) -> None:
    """Print every section, and the goals at the end."""
    for section in results.sections.values():
        _print(console, section.title, section.columns, section.rows)
        for note in section.notes:
            console.print(note)
    goals = [[goal.name, goal.value, goal.wanted, _REACHED[goal.reached]] for goal in results.goals]
    if goals:
        _print(console, "Goals", ["", "measured", "wanted", "reached"], goals)
    if results.quick:
        console.print("A quick run is a smoke test: its figures are not representative.")


def _print(console: Console, title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def keep(results: Results, folder: Path) -> None:
    """Write the JSON, and the picture where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "results.json"
    data.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n")
    if "compare" not in results.sections or find_spec("matplotlib") is None:
        return
    from benchmarks.support.plot import draw  # noqa: PLC0415 - matplotlib may be missing

    draw(results.sections["compare"], folder / "results.png")
