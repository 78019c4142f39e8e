"""Draw of test files: `--draw 6` runs a sixth of them, others for each content."""

import hashlib
import math
import subprocess
from pathlib import Path

import pytest

__all__ = ["content", "drawn"]

ROOT = Path(__file__).resolve().parents[2]


def content() -> str:
    """The seed of the draws, by the content; outside of a checkout it is always the same.

    A commit that is rebased or merged without changes keeps its draw.
    """
    finished = subprocess.run(
        ["git", "rev-parse", "HEAD^{tree}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return finished.stdout.strip()


def drawn(files: set[str], share: int, seed: str) -> set[str]:
    """One in `share` of these files, by the seed; at least one."""
    order = sorted(files, key=lambda file: hashlib.sha256(f"{seed} {file}".encode()).digest())
    return set(order[: math.ceil(len(order) / share)])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--draw", type=int, default=1, metavar="N", help="run one file in N, drawn by the content"
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the files that are not drawn, once the markers have deselected theirs."""
    share = int(config.getoption("draw") or 1)
    if share == 1:
        return
    names = {str(item.path.relative_to(ROOT)) for item in items}
    kept = drawn(names, share, content())
    others = [item for item in items if str(item.path.relative_to(ROOT)) not in kept]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if str(item.path.relative_to(ROOT)) in kept]
