"""A recorded crowd while every part of the service is killed: the witness must find nothing."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kills import VICTIMS, kill_parts
from tests.support.service import running_service

KILLS_EACH = 2
RUN_SECONDS = 25
#: The leases of payments that were cut off must end before there is a verdict.
VERDICT_SECONDS = 300


@pytest.mark.slow
@pytest.mark.timeout(RUN_SECONDS + VERDICT_SECONDS + 90)
def test_no_response_is_wrong_while_each_process_is_killed_twice(tmp_path: Path) -> None:
    """Whatever was acknowledged is there, and every refusal was true when it was given."""
    seed = random.SystemRandom().randrange(1 << 32)
    with running_service(tmp_path / "data", RESERVATION_WORKERS="2") as served:
        crowd = subprocess.Popen(
            [
                *(sys.executable, "-m", "loadtests", "--url", served.url, "--record"),
                *("--headless", "--only-summary", "--scenario", "steady", "--users", "40"),
                *("--run-time", f"{RUN_SECONDS}s", "--stock", "150", "--hold-seconds", "3"),
                *("--report-dir", str(tmp_path)),
            ],
            env={
                "PATH": os.environ["PATH"],
                "RESERVATION_DATA_DIR": str(served.settings.data_dir),
                "RESERVATION_PORT": str(served.settings.port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            killed = kill_parts(served, crowd, random.Random(seed), each=KILLS_EACH)
            output, _ = crowd.communicate(timeout=VERDICT_SECONDS)
        finally:
            if crowd.poll() is None:
                crowd.kill()
                crowd.wait()
    report = f"seed {seed}, killed {killed}\n{output.decode()[-4000:]}"
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["problems"] == [], report
    assert crowd.returncode == 0, report
    history = verdict["history"]
    assert history["answers"] > 100, report
    assert history["ordersCompared"] == verdict["orders"] > 0, report
    assert killed == dict.fromkeys(VICTIMS, KILLS_EACH), report
