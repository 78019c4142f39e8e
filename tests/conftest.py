"""Registers the fixtures of tests/support and selects the event loops of each test."""

import asyncio
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from tests.support.hangups import pass_on_hangups
from tests.support.memory_files import keep_temporary_files_in_memory

pytest_plugins = [
    f"tests.support.{name}"
    for name in (
        "valkey",
        "lua_sale",
        "lua_partition",
        "databases",
        "sandbox",
        "service",
        "browser",
        "pages",
        "restores",
        "draw",
        "tiers",
    )
    if find_spec(f"tests.support.{name}")
]

pass_on_hangups()
keep_temporary_files_in_memory()

# On a busy machine an example may take any time.
settings.register_profile(
    "busy", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, LoopFactory]:
    """Use asyncio's own loop; for tests of event-loop behaviour also uvloop, the service's loop."""
    if item.get_closest_marker("both_loops"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return {"asyncio": asyncio.new_event_loop}
