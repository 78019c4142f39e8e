"""Mutation run: the scripts' tests against mutants of the scripts.

    python -m tests.faults.mutation.run --draw 60

Each mutant runs in its own process, forked after all imports, whose loader returns the changed
scripts. The tests of the changed script run first. If the mutant survives, all tests of the scripts
and the random histories follow. Prints one JSON object per mutant.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

# Imported once, before the processes are forked: half the cost of a run of one file.
from api.http import app  # noqa: F401
from reservation.adapters.redis import scripts
from tests.faults.mutation.mutants import Mutant, all_mutants

ROOT = Path(__file__).resolve().parents[3]
#: Processes at once, each with its own server.
AT_ONCE = 2
#: A mutant that loops counts as killed.
SECONDS_MAX = 180.0
#: Exit status of a process in which not even pytest ran.
BROKE = 70
EVERYTHING = (
    "tests/lua",
    "tests/property/test_scripts.py",
    "tests/property/test_partition_replay.py",
)


class Result(msgspec.Struct, frozen=True):
    """The result of one mutant."""

    name: str
    lives: bool
    seconds: float


def main() -> int:
    """Run the mutants; 1 if the unchanged scripts fail their own tests."""
    given = argparse.ArgumentParser()
    given.add_argument("--draw", type=int, default=0, help="how many, 0 is all")
    given.add_argument("--seed", default="", help="draws others")
    given.add_argument("--only", default="", help="those whose name has this part")
    given.add_argument(
        "--known", type=Path, help="output of an earlier hunt, whose mutants are skipped"
    )
    wish = given.parse_args()
    known = dead_in(wish.known) if wish.known else frozenset[str]()
    mutants = [one for one in drawn(wish.draw, wish.seed, wish.only) if one.name not in known]
    with tempfile.TemporaryDirectory() as work:
        if wait_for(begin(None, EVERYTHING, Path(work) / "as-they-are"), SECONDS_MAX):
            sys.stderr.write("the scripts as they are fail their tests\n")
            return 1
        for result in hunt(mutants, Path(work)):
            sys.stdout.write(f"{msgspec.json.encode(result).decode()}\n")
            sys.stdout.flush()
    return 0


def dead_in(printed: Path) -> frozenset[str]:
    """The mutants that an earlier run killed; survivors are run again."""
    results = [msgspec.json.decode(line, type=Result) for line in printed.read_text().splitlines()]
    return frozenset(one.name for one in results if not one.lives)


def drawn(count: int, seed: str = "", only: str = "") -> list[Mutant]:
    """Draw this many mutants, different ones for another seed."""
    mutants = [one for one in all_mutants(ROOT / "scripts" / "lua") if only in one.name]
    mutants.sort(key=lambda one: msgspec.structs.replace(one, what=one.what + seed).draw)
    return mutants[: count or None]


def hunt(mutants: list[Mutant], work: Path) -> Iterator[Result]:
    """The result of each mutant, as they come."""
    waiting = [(one, first_tests(one)) for one in reversed(mutants)]
    running: dict[int, tuple[Mutant, tuple[str, ...], float, Path]] = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            mutant, tests = waiting.pop()
            folder = work / f"{mutant.draw}-{len(tests)}"
            running[begin(mutant, tests, folder)] = (mutant, tests, time.monotonic(), folder)
        pid, died = next_end(running)
        mutant, tests, began, folder = running.pop(pid)
        shutil.rmtree(folder, ignore_errors=True)
        if not died and tests != EVERYTHING:
            waiting.append((mutant, EVERYTHING))
            continue
        yield Result(mutant.name, not died, round(time.monotonic() - began, 1))


def first_tests(mutant: Mutant) -> tuple[str, ...]:
    """The tests that are likeliest to fail: those of the script, or of a step's scripts."""
    scripts_of = [Path(mutant.file).stem]
    if mutant.file.startswith("lib/"):
        folder, include = ROOT / "scripts" / "lua", f"--@include {mutant.file}\n"
        scripts_of = [one.stem for one in folder.glob("*.lua") if include in one.read_text()]
    own = [one for name in scripts_of for one in ROOT.glob(f"tests/lua/test_{name}*.py")]
    return tuple(str(one.relative_to(ROOT)) for one in sorted(own)) or EVERYTHING


def begin(mutant: Mutant | None, tests: tuple[str, ...], folder: Path) -> int:
    """Start a process that runs these tests; its id."""
    shutil.copytree(ROOT / "scripts" / "lua", folder / "lua")
    if mutant is not None:
        (folder / "lua" / mutant.file).write_text(mutant.text)
    pid = os.fork()
    if pid:
        return pid
    status = BROKE
    try:
        status = run_tests(folder, tests)
    finally:
        # In any case this process must not continue as its parent would.
        if status == BROKE:
            traceback.print_exc()
        os._exit(status)


def run_tests(folder: Path, tests: tuple[str, ...]) -> int:
    """In the forked process: pytest's exit status."""
    os.setpgid(0, 0)
    with (folder / "told").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    scripts.script_folder = lambda: folder / "lua"
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
    quick = ["-x", "-q", "-p", "no:cacheprovider", "-k", "not redis-server"]
    # A module imported already cannot show the values of a failed assertion: they are unused here.
    quick += ["--assert=plain", "-m", "not soak"]
    return int(pytest.main([*quick, f"--basetemp={folder / 'tmp'}", *tests]))


def next_end(running: dict[int, tuple[Mutant, tuple[str, ...], float, Path]]) -> tuple[int, bool]:
    """The next process that ends, and whether its mutant was killed."""
    while True:
        for pid, (_, _, began, _) in running.items():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                end_group(pid)
                return pid, os.waitstatus_to_exitcode(status) != 0
            if time.monotonic() - began > SECONDS_MAX:
                end_group(pid)
                os.waitpid(pid, 0)
                return pid, True
        time.sleep(0.05)


def wait_for(pid: int, seconds: float) -> int:
    """The exit status of one process."""
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            end_group(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    end_group(pid)
    os.waitpid(pid, 0)
    return 1


def end_group(pid: int) -> None:
    """Kill all processes that the process has started and not ended itself."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main())
