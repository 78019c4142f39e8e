"""A whole sale while every part of the service is killed: the books must still agree."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kills import VICTIMS, kill_parts
from tests.support.service import Served, running_service

KILLS_EACH = 3
#: The demo itself waits up to three minutes for the last lease to end.
DEMO_SECONDS = 400


@pytest.mark.slow
@pytest.mark.timeout(DEMO_SECONDS + 120)
def test_a_sale_stays_clean_while_each_process_is_killed_three_times(tmp_path: Path) -> None:
    """Kill -9 at random moments while orders are CONFIRMING; the verdict compares all books."""
    seed = random.SystemRandom().randrange(1 << 32)
    with running_service(tmp_path / "data", RESERVATION_WORKERS="2") as served:
        demo = subprocess.Popen(
            [
                *(sys.executable, "-m", "api.cli", "demo", "--json"),
                *("--buyers", "2000", "--stock", "300"),
                *("--url", served.url, "--seed", str(seed)),
            ],
            env=_environ(served),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            killed = kill_parts(served, demo, random.Random(seed), each=KILLS_EACH)
            output, errors = demo.communicate(timeout=DEMO_SECONDS)
        finally:
            if demo.poll() is None:
                demo.kill()
                demo.wait()
    report = f"seed {seed}, killed {killed}\n{errors.decode()[-2000:]}"
    assert output, report
    verdict = json.loads(output)
    assert verdict["problems"] == [], report
    assert verdict["sold"] <= 300, report
    assert demo.returncode == 0, report
    assert killed == dict.fromkeys(VICTIMS, KILLS_EACH), report


def _environ(served: Served) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "RESERVATION_DATA_DIR": str(served.settings.data_dir),
        "RESERVATION_PORT": str(served.settings.port),
    }
