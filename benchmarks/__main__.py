"""`python -m benchmarks`: measures, prints one table for each part, keeps JSON and a picture."""

import argparse
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console

from api.server import log_config as logs
from benchmarks.contenders.launcher import BUYERS_SECRET, CONTENDERS
from benchmarks.parts import (
    between,
    beyond,
    compare,
    disk,
    edges,
    flusher,
    growth,
    memory,
    overload,
    purchase,
    rebuild,
    sales,
    script,
    verify,
    whole,
)
from benchmarks.support.load import CONNECTIONS, WrkMissing
from benchmarks.support.report import keep, results_of, show
from benchmarks.support.run import Part, Run, Section
from benchmarks.support.sale import write_buyers

__all__ = ["main"]

PARTS: Final[dict[str, Part]] = {
    "compare": compare.measure,
    "crowd": compare.measure_crowd,
    "whole": whole.measure,
    "edges": edges.measure,
    "script": script.measure,
    "memory": memory.measure,
    "growth": growth.measure,
    "overload": overload.measure,
    "disk": disk.measure,
    "behind": flusher.measure,
    "sales": sales.measure,
    "purchase": purchase.measure,
    "rebuild": rebuild.measure,
    "verify": verify.measure,
    "beyond": beyond.measure,
}
#: Each request of a load has another buyer, the warm-up's too: a second hold costs Redis more, and
#: a round of `overload` sends a million.
_BUYERS: Final = 1_500_000
_BUYERS_QUICK: Final = 60_000
#: `between COMMIT`.
_BETWEEN_WORDS: Final = 2
#: A table's width without a terminal.
_COLUMNS: Final = 110


def main() -> int:
    """Measure; 1 where a part failed, never for a missed goal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parts = f"{', '.join(PARTS)}; all of them; or `between COMMIT`: CPU time since that commit"
    parser.add_argument("parts", nargs="*", metavar="PART", help=parts)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    names = [one.name for one in CONTENDERS]
    parser.add_argument("--contenders", nargs="+", choices=names, help="only these; all of them")
    crowd = f"of the load, where nothing else is said; {CONNECTIONS}"
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help=crowd)
    parser.add_argument("--home", type=Path, default=Path("var/benchmarks"), help="for its files")
    parser.add_argument("--save", type=Path, help="where the JSON and the picture go; in --home")
    options = parser.parse_args()
    parts = _parts(options.parts, parser)
    # The log of the service's own modules belongs in none of the tables.
    logs.configure(production=False)
    console = Console(width=None if sys.stdout.isatty() else _COLUMNS, highlight=False)
    home = options.home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    buyers = home / "buyers.txt"
    count = _BUYERS_QUICK if options.quick else _BUYERS
    write_buyers(buyers, secret=BUYERS_SECRET, count=count)
    run = Run(
        home=home,
        buyers=buyers,
        quick=options.quick,
        contenders=options.contenders,
        connections=options.connections,
        say=lambda text: console.print(text, style="dim"),
    )
    # Ending the benchmark must end its servers: they are in their own process groups.
    signal.signal(signal.SIGTERM, _end)
    try:
        _measure(run, parts, console, options.save or home)
    except WrkMissing as missing:
        print(f"benchmarks: {missing}", file=sys.stderr)
        return 1
    return 0


def _parts(names: list[str], parser: argparse.ArgumentParser) -> dict[str, Part]:
    """The parts that the command line names."""
    if names[:1] == ["between"]:
        if len(names) != _BETWEEN_WORDS:
            parser.error("`between` takes one commit, and no other part beside it")
        return {"between": partial(between.measure, commit=names[1])}
    if unknown := set(names) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    return {name: PARTS[name] for name in names or PARTS}


def _measure(run: Run, parts: dict[str, Part], console: Console, folder: Path) -> None:
    load = os.getloadavg()[0]
    sections: dict[str, Section] = {}
    for name, part in parts.items():
        sections[name] = part(run)
        # Saved after each part, so that an interrupted run keeps its results.
        keep(results_of(sections, quick=run.quick, load=load), folder)
    show(results_of(sections, quick=run.quick, load=load), console)
    console.print(f"kept in {folder}")


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
