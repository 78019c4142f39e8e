"""The README's commands do what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from api.demo_sale import open_demo_sale
from tests.fixtures.service import Served

README = Path(__file__).resolve().parents[2] / "README.md"
_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def block_with(text: str) -> str:
    """The README's shell block that holds this text."""
    return next(block for block in _BLOCK.findall(README.read_text()) if text in block)


def shell(script: str, served: Served) -> str:
    """What the script prints, run as a user of this service would."""
    for tool in ("bash", "curl", "jq"):
        if shutil.which(tool) is None:
            if os.environ.get("CI") == "true":
                pytest.fail(f"{tool} is not installed")
            pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RESERVATION_DATA_DIR": str(served.settings.data_dir),
            "RESERVATION_PORT": str(served.settings.port),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_curl_lines_buy_a_piece_and_say_so_again(served: Served) -> None:
    """From a guest's token to CONFIRMED; the last line repeated gives the same answer."""
    open_demo_sale(served.url, served.settings.admin_api_key)
    script = block_with("BASE=").replace("http://127.0.0.1:8000", served.url)
    last = script[script.rindex("curl ") :]
    printed = shell(script + last, served)
    assert '"status": "HELD"' in printed
    assert printed.count('"status": "CONFIRMED"') == 2


def test_the_operators_lines_work(served: Served) -> None:
    """`sale list` and `audit` as the README shows them; redis-cli where it is installed."""
    open_demo_sale(served.url, served.settings.admin_api_key)
    script = block_with("reservation audit demo").replace(".venv/bin/", "")
    script = script.replace("var/valkey.sock", str(served.settings.data_dir / "valkey.sock"))
    if shutil.which("redis-cli") is None:
        script = "\n".join(line for line in script.splitlines() if "redis-cli" not in line)
    printed = shell(script, served)
    assert "demo" in printed
    assert "all agrees" in printed
