"""Each release of the CHANGELOG is a commit of the history, with that version in its package."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from reservation import __version__

ROOT = Path(__file__).resolve().parents[3]
RELEASES: list[dict[str, Any]] = tomllib.loads((ROOT / "releases.toml").read_text())["release"]
SECTIONS = re.findall(
    r"^## \[(\d\S*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
)


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True, timeout=150
    )
    return done.stdout.strip()


def test_each_section_of_the_changelog_is_a_release() -> None:
    assert [(one["version"], one["date"].isoformat()) for one in RELEASES] == SECTIONS


def test_the_package_version_is_at_least_the_newest_release() -> None:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)[:3]]

    assert numbers(__version__) >= max(numbers(one["version"]) for one in RELEASES)


def has_history() -> bool:
    """Whether this is a full clone: an archive has no history, a shallow clone only its end."""
    return (ROOT / ".git").exists() and git("rev-parse", "--is-shallow-repository") == "false"


@pytest.mark.parametrize(
    "release", RELEASES if has_history() else [], ids=lambda release: release["version"]
)
def test_each_release_commit_exists_and_has_its_version(
    release: dict[str, Any],
) -> None:
    git("merge-base", "--is-ancestor", release["commit"], "HEAD")
    package = git("show", f"{release['commit']}:reservation/__init__.py")
    assert f'__version__ = "{release["version"]}"' in package
    changelog = git("show", f"{release['commit']}:CHANGELOG.md")
    assert f"## [{release['version']}] - {release['date'].isoformat()}" in changelog
