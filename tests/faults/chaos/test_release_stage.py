"""The files of a release come from the history; without it a run fails and is not skipped."""

from pathlib import Path
from typing import Any

import pytest

from tests.faults.chaos.release_stage import checked_out, commit_of
from tests.unit.tools.test_releases import RELEASES, has_history


def test_the_latest_release_is_the_last_of_the_list() -> None:
    assert commit_of("latest") == RELEASES[-1]["commit"] == commit_of(RELEASES[-1]["version"])


def test_a_commit_that_the_clone_lacks_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="needs the full history"):
        checked_out("0" * 40, tmp_path)


@pytest.mark.parametrize(
    "release", RELEASES if has_history() else [], ids=lambda one: one["version"]
)
def test_a_release_is_checked_out_with_its_version(release: dict[str, Any], tmp_path: Path) -> None:
    folder = checked_out(release["commit"], tmp_path)
    package = (folder / "reservation" / "__init__.py").read_text()
    assert f'__version__ = "{release["version"]}"' in package
