"""Simulation of a whole sale in virtual time, from one seed: run, judged, run again."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.simulation.__main__ import Total, summary_of
from tests.faults.simulation.plans import Plan
from tests.faults.simulation.run import Ground, ground

# A process that is killed closes nothing: the collector finds the streams of its requests open.
pytestmark = pytest.mark.filterwarnings("ignore:.*MemoryObject.*Stream")
ROOT = Path(__file__).resolve().parents[3]
#: The digest of the trace and the end of the chain, on the line of a run.
_DIGESTS = re.compile(r"[0-9a-f]{12} [0-9a-f]{12}$", re.MULTILINE)


@pytest.fixture(scope="module")
def here() -> Iterator[Ground]:
    """One server for all seeds."""
    with ground() as made:
        yield made


@pytest.mark.slow
def test_a_sale_in_fair_weather_sells_and_every_answer_is_true(here: Ground) -> None:
    outcome = here.run(Plan.of(3, faults=False))
    assert not outcome.problems, summary_of(outcome)
    assert outcome.judgement is not None
    assert outcome.judgement.operations > 50
    assert outcome.orders > 10
    assert outcome.counts["buyer pay"] > 5


def _run_for(here: Ground, seconds: float, runs_min: int = 1) -> Total:
    """Run new seeds for so long; each that fails is reported with its replay command.

    Args:
        runs_min: go on until this many have run, on a busy machine.
    """
    draw, total = random.Random(), Total()
    until = time.monotonic() + seconds
    while time.monotonic() < until or total.runs < runs_min:
        outcome = here.run(Plan.of(draw.randrange(1_000, 1_000_000_000)))
        assert not outcome.problems, summary_of(outcome)
        total.add(outcome)
    sys.stdout.write(f"{total}\n")
    return total


@pytest.mark.slow
def test_an_untried_seed_passes(here: Ground) -> None:
    assert _run_for(here, 0.5).operations > 0


@pytest.mark.slow
def test_a_minute_of_seeds_goes_well(here: Ground) -> None:
    total = _run_for(here, 60.0, runs_min=5)
    assert total.faults > 3 * total.runs


@pytest.mark.soak
@pytest.mark.timeout(3_900)
def test_an_hour_of_seeds_goes_well(here: Ground) -> None:
    assert _run_for(here, 3_600.0).runs > 500


def test_the_same_seed_is_the_same_run(here: Ground) -> None:
    first, second = here.run(Plan.of(22)), here.run(Plan.of(22))
    assert (first.digest, first.chain) == (second.digest, second.chain)
    assert first.chain != here.run(Plan.of(9)).chain


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_same_seed_is_the_same_run_in_another_process(here: Ground) -> None:
    def digests(hash_seed: str) -> list[str]:
        command = [sys.executable, "-m", "tests.faults.simulation", "--seed", "4", "--runs", "2"]
        environ = os.environ | {"PYTHONHASHSEED": hash_seed}
        ran = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=250
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return _DIGESTS.findall(ran.stdout)

    here_too = [here.run(Plan.of(seed)) for seed in (4, 5)]
    expected = [f"{outcome.digest[:12]} {outcome.chain[:12]}" for outcome in here_too]
    assert digests("1") == digests("2") == expected
