"""The reference pages and the state diagram are those that `make reference` generates."""

import re
from pathlib import Path

import pytest

from docs.reference.generate import GENERATED, ROOT, between_markers, setting_rows
from reservation.config.settings import PREFIX, Settings

LITERAL = re.compile(r"`([^`]+)`")


@pytest.mark.parametrize("name", GENERATED)
def test_a_page_is_the_generated_one(name: str) -> None:
    committed = (ROOT / name).read_text()
    assert committed == GENERATED[name](committed), "run `make reference` and commit the page"


def test_a_page_without_markers_is_not_generated() -> None:
    with pytest.raises(ValueError, match="markers"):
        between_markers("# Architecture\n", "text")


def literal_defaults() -> dict[str, str]:
    """The defaults that the page gives as a literal value."""
    return {
        name: found[1]
        for name, (_, default) in setting_rows().items()
        if (found := LITERAL.fullmatch(default)) and "HOST:PORT" not in default
    }


@pytest.mark.parametrize("name", literal_defaults())
def test_a_literal_default_is_the_default_in_use(name: str, tmp_path: Path) -> None:
    given = {} if name == "data_dir" else {f"{PREFIX}DATA_DIR": str(tmp_path)}
    by_default = Settings.load(given, None)
    explicit = Settings.load({**given, f"{PREFIX}{name.upper()}": literal_defaults()[name]}, None)
    assert getattr(explicit, name) == getattr(by_default, name)
