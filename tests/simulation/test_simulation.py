"""A whole sale in one loop and in virtual time, decided by one number: run, judged, run again."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.__main__ import told
from tests.simulation.plans import Plan
from tests.simulation.run import Ground, ground

# A process that is killed closes nothing: the collector finds the streams of its requests open.
pytestmark = pytest.mark.filterwarnings("ignore:.*MemoryObject.*Stream")
ROOT = Path(__file__).resolve().parents[2]
#: The digest of the trace and the end of the chain, on the line of a run.
_DIGESTS = re.compile(r"[0-9a-f]{12} [0-9a-f]{12}$", re.MULTILINE)


@pytest.fixture(scope="module")
def here() -> Iterator[Ground]:
    """One server for all seeds."""
    with ground() as made:
        yield made


def test_a_sale_in_fair_weather_sells_and_every_answer_is_true(here: Ground) -> None:
    outcome = here.run(Plan.of(3, faults=False))
    assert not outcome.problems, told(outcome)
    assert outcome.judgement is not None
    assert outcome.judgement.operations > 50
    assert outcome.orders > 10


def test_the_same_seed_is_the_same_run(here: Ground) -> None:
    first, second = here.run(Plan.of(2)), here.run(Plan.of(2))
    assert (first.digest, first.chain) == (second.digest, second.chain)
    assert first.chain != here.run(Plan.of(9)).chain


@pytest.mark.slow
def test_the_same_seed_is_the_same_run_in_another_process(here: Ground) -> None:
    def digests(hash_seed: str) -> list[str]:
        command = [sys.executable, "-m", "tests.simulation", "--seed", "4", "--runs", "3"]
        environ = os.environ | {"PYTHONHASHSEED": hash_seed}
        ran = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=50
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return _DIGESTS.findall(ran.stdout)

    here_too = [here.run(Plan.of(seed)) for seed in (4, 5, 6)]
    expected = [f"{outcome.digest[:12]} {outcome.chain[:12]}" for outcome in here_too]
    assert digests("1") == digests("2") == expected
