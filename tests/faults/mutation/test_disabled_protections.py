"""Disabled protections: a test fails without each of them, so no proof is one that cannot fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.mutation.disabled_protections import BREAKERS, Breaker, copied, off

ROOT = Path(__file__).resolve().parents[3]
#: A run of one test, on a busy machine.
SECONDS_MAX = 120


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("broken"))


def ran(folder: Path, *tests: str, seconds: float = SECONDS_MAX) -> tuple[int, str]:
    """The exit status of these tests there, and their output."""
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return finished.returncode, finished.stdout + finished.stderr


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS_MAX)
@pytest.mark.parametrize("breaker", BREAKERS, ids=lambda one: one.name)
def test_each_disabled_protection_fails_its_test(copy: Path, breaker: Breaker) -> None:
    with off(copy, breaker):
        status, finished = ran(copy, breaker.test)
    # 1 is a test that failed; anything else would be a break of another kind.
    assert status == 1, finished
    assert breaker.says in finished
    assert "SyntaxError" not in finished


@pytest.mark.slow
@pytest.mark.timeout(5 * SECONDS_MAX)
def test_the_same_tests_pass_with_each_protection_on(copy: Path) -> None:
    tests = sorted({breaker.test for breaker in BREAKERS})
    status, finished = ran(copy, *tests, seconds=4 * SECONDS_MAX)
    assert status == 0, finished


@pytest.mark.parametrize("breaker", BREAKERS, ids=lambda one: one.name)
def test_each_pinned_source_text_occurs_once(breaker: Breaker) -> None:
    assert (ROOT / breaker.file).read_text().count(breaker.old) == 1
    file, _, test = breaker.test.partition("::")
    assert f"def {test}" in (ROOT / file).read_text()
