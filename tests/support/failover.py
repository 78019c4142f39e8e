"""A service on several Redis servers, and the commands of its operators."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.service import NOT_INHERITED, Served, running_service

__all__ = ["ADMIN_KEY", "ALLOWED", "UNITS", "command", "service_on"]

ADMIN_KEY = "failover-" + "a" * 40
#: More than the buyers take.
UNITS = 100_000
#: Answers that a buyer may get while a sale's master is replaced.
ALLOWED = {
    (201, ""),
    (503, "unavailable"),
    (503, "outcome_unknown"),
    (503, "sale_recovering"),
}


@contextmanager
def service_on(url: str, folder: Path, **environ: str) -> Iterator[Served]:
    """A service with two API processes on these servers."""
    settings = {
        "RESERVATION_REDIS_URL": url,
        "RESERVATION_ADMIN_API_KEY": ADMIN_KEY,
        "RESERVATION_WORKERS": "2",
    }
    with running_service(folder, settings=settings | environ) as started:
        yield started


def command(served: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of `reservation` next to the service."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
    return subprocess.run(
        [sys.executable, "-m", "api.cli", *arguments],
        env=environ
        | {
            "RESERVATION_DATA_DIR": str(served.settings.data_dir),
            "RESERVATION_REDIS_URL": served.settings.redis_url,
            "RESERVATION_ADMIN_API_KEY": ADMIN_KEY,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
