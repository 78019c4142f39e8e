"""Runs the simulation by hand: `python -m tests.simulation --seed N [--runs K]`."""

import argparse
import sys

from tests.simulation.plans import Plan
from tests.simulation.run import Outcome, ground

__all__ = ["main", "told"]


def main() -> int:
    """Run seeds; 1 if something is wrong with one of them."""
    given = argparse.ArgumentParser(prog="python -m tests.simulation")
    given.add_argument("--seed", type=int, default=1, help="the first one")
    given.add_argument("--runs", type=int, default=1, help="so many seeds from there on")
    given.add_argument("--fair", action="store_true", help="nothing goes wrong")
    given.add_argument("--trace", action="store_true", help="tell every message")
    wish = given.parse_args()
    bad = 0
    with ground() as here:
        for seed in range(wish.seed, wish.seed + wish.runs):
            outcome = here.run(
                Plan.of(seed, faults=not wish.fair), tell=_tell if wish.trace else None
            )
            sys.stdout.write(told(outcome) + "\n")
            sys.stdout.flush()
            bad += bool(outcome.problems)
    return 1 if bad else 0


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")


def told(outcome: Outcome) -> str:
    """One run on a line; more where something is wrong."""
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
    """How to see the same again."""
    return f"replay: .venv/bin/python -m tests.simulation --seed {seed}"


if __name__ == "__main__":
    sys.exit(main())
