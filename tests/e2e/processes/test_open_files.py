"""The server takes more connections than the soft limit of open files allows, often 1,024."""

import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.programs import missing
from tests.support.service import running_service

pytestmark = pytest.mark.e2e

SOFT = 1_024
CONNECTIONS = 1_100


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    """Processes that start here inherit this soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_beyond_the_soft_limit_do_not_affect_others(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * CONNECTIONS:
        missing(f"the hard limit of open files is {hard}")
    with ExitStack() as stack:
        with soft_limit(SOFT):
            service = stack.enter_context(
                running_service(tmp_path / "var", RESERVATION_WORKERS="1")
            )
        stack.enter_context(soft_limit(hard))
        for _ in range(CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", service.settings.port)))
        held = service.prepare(service.sale(), service.buyer())
        assert held.status_code == 201
        children = psutil.Process(service.process.pid).children(recursive=True)
        api = [
            child for child in children if "api.server.entrypoints api" in " ".join(child.cmdline())
        ]
        assert [child.rlimit(psutil.RLIMIT_NOFILE) for child in api] == [(hard, hard)]


@pytest.mark.parametrize(("hard", "warnings"), [(1_024, "['file-limit-low']"), (9_000, "[]")])
def test_a_low_hard_limit_is_a_warning(hard: int, warnings: str) -> None:
    program = (
        "from api.http import open_files as o; o.raise_limit(); print(o.limit(), o.warnings())"
    )
    shown = subprocess.run(
        [
            "sh",
            "-c",
            f'ulimit -Sn 512 && ulimit -Hn {hard} && exec "$0" -c "$1"',
            sys.executable,
            program,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == f"{hard} {warnings}"
