"""Chaos on several hosts, in full: each layout for an hour. `.ci/run` runs a minute of each."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.chaos.hosts_stage import LAYOUTS
from tests.support.hosts import needs_hosts

MINUTES = 60
#: The attack, the settling after it, and the judgement.
SECONDS_MAX = 2 * 3600


@pytest.mark.soak
@pytest.mark.timeout(SECONDS_MAX + 60)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_hour_on_several_hosts_breaks_no_promise(layout: str, tmp_path: Path) -> None:
    needs_hosts()
    report = tmp_path / "report"
    ran = subprocess.run(
        [
            sys.executable, "-m", "tests.faults.chaos", "--hosts", layout,
            "--minutes", str(MINUTES), "--report", str(report),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )  # fmt: skip
    sys.stdout.write((report / "chaos.md").read_text() if report.exists() else ran.stderr)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
