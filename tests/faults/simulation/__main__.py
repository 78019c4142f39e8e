"""Command line of the simulation: `python -m tests.faults.simulation --seed N [--runs K]`."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tests.faults.simulation.plans import Plan
from tests.faults.simulation.run import Outcome, ground

__all__ = ["Total", "main", "summary_of"]


def main() -> int:
    """Run seeds; 1 if one of them fails."""
    given = argparse.ArgumentParser(prog="python -m tests.faults.simulation")
    given.add_argument("--seed", type=int, default=1, help="the first one")
    given.add_argument("--runs", type=int, default=1, help="so many seeds from there on")
    given.add_argument("--fair", action="store_true", help="nothing goes wrong")
    given.add_argument("--trace", action="store_true", help="print every message")
    options = given.parse_args()
    bad, total = 0, Total()
    with ground() as here:
        for seed in range(options.seed, options.seed + options.runs):
            outcome = here.run(
                Plan.of(seed, faults=not options.fair),
                on_line=_print_line if options.trace else None,
            )
            sys.stdout.write(summary_of(outcome) + "\n")
            sys.stdout.flush()
            total.add(outcome)
            bad += bool(outcome.problems)
    sys.stdout.write(f"{total}\n")
    return 1 if bad else 0


class Total:
    """The totals of a series of runs."""

    def __init__(self) -> None:
        self.runs = self.orders = self.operations = self.faults = 0
        self.virtual_seconds = self.real_seconds = 0.0

    def add(self, outcome: Outcome) -> None:
        """Add one outcome."""
        self.runs += 1
        self.orders += outcome.orders
        self.operations += outcome.judgement.operations if outcome.judgement else 0
        self.faults += outcome.counts.get("fault", 0)
        self.virtual_seconds += outcome.virtual_seconds
        self.real_seconds += outcome.real_seconds

    def __str__(self) -> str:
        return (
            f"{self.runs} runs: {self.orders} orders, {self.operations} operations judged,"
            f" {self.faults} faults, {self.virtual_seconds:.0f} virtual seconds"
            f" in {self.real_seconds:.0f} s"
        )


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")


def summary_of(outcome: Outcome) -> str:
    """One run on a line; more where it failed."""
    judgement = outcome.judgement
    counts = outcome.counts
    line = (
        f"seed {outcome.plan.seed}: {'WRONG' if outcome.problems else 'ok'},"
        f" {outcome.orders} orders, {judgement.operations if judgement else 0} operations judged,"
        f" {counts.get('fault', 0)} faults, {outcome.virtual_seconds:.0f} virtual seconds"
        f" in {outcome.real_seconds:.2f} s, {outcome.digest[:12]} {outcome.chain[:12]}"
    )
    if not outcome.problems:
        return line
    wrong = [f"  {problem}"[:2000] for problem in outcome.problems]
    return "\n".join([line, *wrong, replay(outcome.plan.seed)])


def replay(seed: int) -> str:
    """The command that replays a run, on the same commit."""
    commit = ""
    if shutil.which("git"):
        asked = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = f" (commit {asked.stdout.strip()})" if asked.returncode == 0 else ""
    return f"replay: .venv/bin/python -m tests.faults.simulation --seed {seed}{commit}"


if __name__ == "__main__":
    sys.exit(main())
