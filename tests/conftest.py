"""Registers the fixtures of tests/support and selects the event loops of each test."""

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
    """Use asyncio's own loop; for tests of event-loop behaviour also uvloop, the service's loop."""
    if item.get_closest_marker("both_loops"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
