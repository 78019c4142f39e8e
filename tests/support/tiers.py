"""Tiers of the tests: marks as `system` the tests that `make test` leaves to `make system`.

They take seconds each: whole services under faults or in a browser, and the second kind of
database for a test that is not about SQL.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_WHOLE_SERVICES = (ROOT / "e2e", ROOT / "faults", ROOT / "http/connection")
_ABOUT_SQL = ROOT / "integration/sql"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests before `-m` selects."""
    for item in items:
        if _is_of_a_system(item):
            item.add_marker(pytest.mark.system)


def _is_of_a_system(item: pytest.Item) -> bool:
    if any(item.path.is_relative_to(folder) for folder in _WHOLE_SERVICES):
        return True
    case = getattr(item, "callspec", None)
    second = case is not None and "postgresql" in case.params.values()
    return second and not item.path.is_relative_to(_ABOUT_SQL)
