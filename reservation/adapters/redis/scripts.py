"""Loads the Lua scripts that ship with the package and resolves their includes."""

import hashlib
import re
from functools import cache
from pathlib import Path

import msgspec

__all__ = ["Script", "all_scripts", "load", "script_folder"]

_INCLUDE = re.compile(r"^--@include (?P<path>lib/[a-z_]+\.lua)\n", re.MULTILINE)


class Script(msgspec.Struct, frozen=True):
    """One script with its includes resolved."""

    name: str
    source: str
    #: Its digest for EVALSHA.
    sha: str


def script_folder() -> Path:
    """The folder of the scripts: next to this module in a wheel, `scripts/lua` in a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "lua"
    return packaged if packaged.is_dir() else here.parents[2] / "scripts" / "lua"


@cache
def load(name: str) -> Script:
    """The script of this name, its `--@include lib/NAME.lua` lines replaced by those files.

    Raises:
        FileNotFoundError: no such script, or an include that does not exist.
    """
    folder = script_folder()
    text = (folder / f"{name}.lua").read_text()
    source = _INCLUDE.sub(lambda found: (folder / found["path"]).read_text(), text)
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@cache
def all_scripts() -> tuple[Script, ...]:
    """Every script of this release, by name."""
    return tuple(load(path.stem) for path in sorted(script_folder().glob("*.lua")))
