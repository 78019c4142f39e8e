"""Static files: each module's imports exist and stay in their folder, and no file is unused."""

import re
from pathlib import Path

import pytest

from api.http.routes.pages import STATIC

MODULES = sorted(STATIC.rglob("*.js"))
SOURCES = [path for path in STATIC.rglob("*") if path.suffix in {".js", ".html", ".css"}]
IMPORT = re.compile(r'^import (?:[^;]* from )?"(\.[^"]+)";$', re.MULTILINE)
ADDRESS = re.compile(r'"/static/([^"]+)"')
#: The client is one file that shops load or copy.
CLIENT = STATIC / "reservation.js"


def imports(module: Path) -> list[Path]:
    return [(module.parent / name).resolve() for name in IMPORT.findall(module.read_text())]


def addressed(source: Path) -> list[Path]:
    return [STATIC / name for name in ADDRESS.findall(source.read_text())]


def names(paths: set[Path]) -> list[str]:
    return sorted(str(path.relative_to(STATIC)) for path in paths)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(STATIC)))
def test_a_module_imports_only_its_folder_the_shared_files_and_the_client(module: Path) -> None:
    allowed = {path for path in MODULES if path.parent in {module.parent, STATIC / "common"}}
    if module.parent != STATIC / "common":
        allowed.add(CLIENT)
    assert names(set(imports(module)) - (set() if module == CLIENT else allowed)) == []


def test_each_static_file_is_used_by_a_page() -> None:
    used = {path for source in SOURCES for path in addressed(source)}
    used |= {path for module in MODULES for path in imports(module)}
    files = {path for path in STATIC.rglob("*") if path.is_file() and path.suffix != ".html"}
    assert names(files - used) == []
    assert names(used - files) == []
