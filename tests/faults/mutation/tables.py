"""Tables for docs/explanation/verification.md.

    python -m tests.faults.mutation.tables breakers|mutants [RUN ...]

`breakers` turns each protection off and prints the test that went red and its message; `mutants`
reads the output of runs, in which the last line about a mutant counts.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tests.faults.mutation.disabled_protections import BREAKERS, copied, off
from tests.faults.mutation.mutants import all_mutants
from tests.faults.mutation.run import ROOT, Result
from tests.faults.mutation.survivors import reason_to_live
from tests.faults.mutation.test_disabled_protections import ran

#: Escaped for a table's cell.
_BAR = "\\|"


def breakers() -> Iterator[str]:
    """One row each; the last column is the message seen just now."""
    yield "| disabled protection | failing test | with |"
    yield "|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        for breaker in BREAKERS:
            with off(copy, breaker):
                status, output = ran(copy, breaker.test)
            red = status == 1 and breaker.says in output
            seen = f"`{breaker.says}`" if red else f"NOT FAILING ({status})"
            yield f"| {breaker.name} | `{breaker.test}` | {seen} |"


def mutants(files: list[Path]) -> Iterator[str]:
    """How many of each script were killed, then the survivors, with the reason."""
    results: dict[str, Result] = {}
    for file in files:
        for line in file.read_text().splitlines():
            result = msgspec.json.decode(line, type=Result)
            results[result.name] = result
    names = [one.name for one in all_mutants(ROOT / "scripts" / "lua")]
    missing = sum(name not in results for name in names)
    made, died = Counter[str](), Counter[str]()
    for name in names:
        script = name.partition(":")[0]
        made[script] += 1
        died[script] += name in results and not results[name].lives
    yield "| script | mutants | killed |"
    yield "|---|---|---|"
    yield from (f"| `{script}` | {count} | {died[script]} |" for script, count in made.items())
    yield f"| all | {made.total()} | {died.total()} |"
    yield f"\n{died.total() / made.total():.1%} are killed, {missing} were not tested.\n"
    yield "| surviving mutant | why it is equivalent |"
    yield "|---|---|"
    for name in names:
        if name in results and results[name].lives:
            reason = reason_to_live(name) or "NOT LISTED"
            yield f"| `{name.replace('|', _BAR)}` | {reason} |"


def main() -> int:
    """Print one of them."""
    what, *files = sys.argv[1:]
    rows = breakers() if what == "breakers" else mutants([Path(file) for file in files])
    for row in rows:
        sys.stdout.write(f"{row}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
