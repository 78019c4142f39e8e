"""Chaos runs detect a missing protection: the verdict can be red."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.faults.mutation.disabled_protections import BREAKERS, copied, off

#: A run, the settling after it, and the judgement.
SECONDS_MAX = 420


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("broken"))


def attacked(folder: Path, only: str) -> tuple[int, str]:
    """The exit status of a short run there, and its findings."""
    report = folder / "report"
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    wish = ["--minutes", "0.3", "--sale-seconds", "10", "--settle-seconds", "15", "--only", only]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.faults.chaos", *wish, "--report", str(report)],
        cwd=folder,
        env={**environ, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert (report / "chaos.json").exists(), ran.stdout + ran.stderr
    return ran.returncode, "\n".join(
        msgspec.json.decode((report / "chaos.json").read_bytes())["violations"]
    )


@pytest.mark.slow
@pytest.mark.timeout(SECONDS_MAX + 30)
@pytest.mark.parametrize(
    ("name", "only", "says"),
    [
        ("the stock check of a hold is off", "nothing", "oversold"),
        ("a repeated key takes a second hold", "nothing", "is prepared twice"),
        ("an unlisted code releases the stock", "error_after_commit", "the PG's balance is"),
    ],
)
def test_a_protection_that_is_off_is_found(copy: Path, name: str, only: str, says: str) -> None:
    (breaker,) = (one for one in BREAKERS if one.name == name)
    with off(copy, breaker):
        status, found = attacked(copy, only)
    assert status == 1
    assert says in found
