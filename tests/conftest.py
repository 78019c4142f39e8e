"""Makes the fixtures of tests/fixtures known to every test."""

from importlib.util import find_spec

pytest_plugins = [
    f"tests.fixtures.{name}"
    for name in ("valkey", "lua_sale", "databases", "sandbox", "service", "browser", "pages")
    if find_spec(f"tests.fixtures.{name}")
]
