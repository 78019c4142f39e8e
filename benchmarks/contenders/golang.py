"""Go programs of the comparison: built offline, from Debian's packages."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["build", "missing"]

#: Where Debian installs the source of its Go packages.
_GOCODE: Final = Path("/usr/share/gocode")
#: The first build compiles gin and what it needs, on a busy machine.
_BUILD_SECONDS: Final = 600.0


def missing(packages: Sequence[str]) -> list[str]:
    """Debian's packages that are not installed.

    Args:
        packages: import paths, such as `github.com/gin-gonic/gin`.
    """
    absent = [] if shutil.which("go") else ["golang-go"]
    for package in packages:
        if not (_GOCODE / "src" / package).is_dir():
            absent.append(f"golang-{package.replace('.com', '').replace('/', '-')}-dev")
    return absent


def build(source: Path, program: Path) -> Path:
    """Compile a folder to a program; Go's own cache makes a second time short.

    Args:
        source: the folder.
        program: the file to write.
    """
    program.parent.mkdir(parents=True, exist_ok=True)
    # GOPATH mode: Debian's packages are not modules, and nothing is fetched.
    environ = os.environ | {"GO111MODULE": "off", "GOPATH": str(_GOCODE), "GOFLAGS": ""}
    ended = subprocess.run(
        ["go", "build", "-o", str(program), "."],
        cwd=source,
        env=environ,
        capture_output=True,
        text=True,
        timeout=_BUILD_SECONDS,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"go build: {ended.stderr[-2000:]}")
    return program
