"""Makes the fixtures of tests/support known to every test, and says on which loop each runs."""

import asyncio
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import pytest
import uvloop

pytest_plugins = [
    f"tests.support.{name}"
    for name in ("valkey", "lua_sale", "databases", "sandbox", "service", "browser", "pages")
    if find_spec(f"tests.support.{name}")
]

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, LoopFactory]:
    """On asyncio's own; on the service's as well where a test is about what a loop does."""
    if item.get_closest_marker("both_loops"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
