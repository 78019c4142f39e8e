"""A temporary service for one command: started on its own port, stopped with the command."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import httpx

from reservation.config.settings import Settings

__all__ = ["TemporaryServiceFailed", "is_reachable", "temporary_service"]

#: Started, and migrated, on a busy machine.
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 15.0
POLL_SECONDS: Final = 0.2


class TemporaryServiceFailed(Exception):
    """The service ended, or was not ready in time."""


def is_reachable(address: str) -> bool:
    """Whether a service answers at this address."""
    try:
        return httpx.get(f"{address}/health/live", trust_env=False).is_success
    except httpx.HTTPError:
        return False


@contextmanager
def temporary_service(name: str) -> Generator[tuple[Settings, str]]:
    """A service with its own data directory, and its address.

    Args:
        name: of the command, for the folder and for the error.

    Raises:
        TemporaryServiceFailed: it did not start.
    """
    with tempfile.TemporaryDirectory(prefix=f"reservation-{name}-") as folder:
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith("RESERVATION_")
        }
        environ |= {"RESERVATION_DATA_DIR": folder, "RESERVATION_PORT": str(_free_port())}
        settings = Settings.load(environ, dotenv_path=None)
        with Path(folder, "service.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", "serve"],
                cwd=folder,
                env=environ,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is for the command, which still reads the service's data.
                process_group=0,
            )
            try:
                _wait_until_ready(process, settings.public_url, log=Path(log.name), name=name)
                yield settings, settings.public_url
            finally:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_ready(
    process: subprocess.Popen[bytes], address: str, *, log: Path, name: str
) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up_at and process.poll() is None:
        # The port may not be open yet: retry after the pause.
        with suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health/ready", trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    tail = log.read_text(errors="replace").splitlines()[-1:] or ["no output"]
    raise TemporaryServiceFailed(f"the {name}'s temporary service did not start: {tail[0]}")
