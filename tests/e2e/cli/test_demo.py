"""The demo, as a user runs it: on SQLite with its own service, and on PostgreSQL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.service import Served, running_service


def demo(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`reservation demo --json` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "api.cli", "demo", "--json", *arguments],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def demo_against(served: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same against a service that runs."""
    return demo(
        *arguments,
        "--url",
        served.url,
        RESERVATION_DATA_DIR=str(served.settings.data_dir),
        RESERVATION_PORT=str(served.settings.port),
    )


@pytest.mark.slow
def test_a_sale_on_postgresql_is_clean(tmp_path: Path, postgres_url: str) -> None:
    """Intents, orders and events go to PostgreSQL; the books agree."""
    with running_service(
        tmp_path / "data", RESERVATION_WORKERS="1", RESERVATION_DATABASE_URL=postgres_url
    ) as served:
        done = demo_against(served, "--buyers", "150", "--stock", "30", "--hold-seconds", "3")
        assert not (tmp_path / "data" / "orders.sqlite3").exists()
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["problems"] == []
    assert verdict["charged"] == verdict["confirmedAmount"] > 0


@pytest.mark.slow
def test_a_demo_with_its_own_service_leaves_nothing_behind(tmp_path: Path) -> None:
    """It starts one, sells, ends it, and exits with 0."""
    done = demo(
        "--own",
        "--buyers",
        "60",
        "--stock",
        "20",
        "--hold-seconds",
        "3",
        HOME=str(tmp_path),
        RESERVATION_DATA_DIR=str(tmp_path / "data"),
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["sold"] > 0
    assert not list(tmp_path.glob("reservation-demo-*"))


def test_a_demo_without_a_service_reports_it_in_one_line(tmp_path: Path) -> None:
    """Exit status 69, and no traceback."""
    done = demo("--url", "http://127.0.0.1:9", RESERVATION_DATA_DIR=str(tmp_path / "data"))
    assert done.returncode == 69, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
