# ruff: noqa: E501 - one sentence per line, as everywhere in the docs
"""docs/reference/settings.md is generated from the settings, so that neither can drift."""

from pathlib import Path

import msgspec.inspect

from reservation.config.settings import PREFIX, Settings

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "settings.md"


def test_the_page_lists_every_setting_with_its_default() -> None:
    """`python -m tests.unit.config.test_settings_page` writes the table anew from the settings."""
    assert PAGE.read_text() == page()


def page() -> str:
    """The expected page."""
    found = msgspec.inspect.type_info(Settings)
    assert isinstance(found, msgspec.inspect.StructType)
    rows: list[str] = []
    for field in found.fields:
        meta = field.type
        assert isinstance(meta, msgspec.inspect.Metadata), field.name
        schema, extra = meta.extra_json_schema or {}, meta.extra or {}
        name = f"`{PREFIX}{field.name.upper()}`"
        rows.append(f"| {name} | {extra['default']} | {schema['description']} |")
    return _HEAD + "\n".join(rows) + "\n"


_HEAD = """# Settings

Environment variables, or lines `NAME=value` in a `.env` file where the service is started; the environment wins.
A name that is not a setting, or a value that cannot be used, ends the start with one line and exit status 78.
What is marked *a secret* is generated at first start and kept in the data directory, readable by its owner alone; in production it must be given.
The variables that Kubernetes sets for a Service are ignored, also where a Service is named `reservation` or `reservation-redis`: `..._SERVICE_HOST`, `..._SERVICE_PORT...`, `..._PORT=tcp://...` and `..._PORT_N_TCP...`. The CPUs of a container are those of its quota, at least one.

| name | default | what |
|---|---|---|
"""

if __name__ == "__main__":
    PAGE.write_text(page())
