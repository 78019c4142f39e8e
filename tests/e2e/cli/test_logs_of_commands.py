"""A command's log lines go to stderr: its output can be a history or JSON."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.service import NOT_INHERITED

COMMAND = """
import sys
import structlog
from api.cli.local import run_locally

async def work(service):
    structlog.get_logger().warning("a_line")
    sys.stdout.write("the output\\n")
    return 0

sys.exit(run_locally(work))
"""


def test_log_lines_are_no_part_of_the_output(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env={k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
        | {"RESERVATION_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "the output\n"), done.stderr
    assert "a_line" in done.stderr
