"""Service under test at its edge: once with the fast path of a prepare, once without."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.service import Served, running_service

#: Of a proxy whose forwarding header is believed.
PROXY = "127.0.0.1"


@pytest.fixture(scope="session")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running service for each mode, started on first use."""
    running: dict[str, Served] = {}
    with ExitStack() as stack:

        def edge(fast_path: str) -> Served:
            if fast_path not in running:
                running[fast_path] = stack.enter_context(
                    running_service(
                        tmp_path_factory.mktemp(f"edge-{fast_path}"),
                        RESERVATION_WORKERS="1",
                        RESERVATION_FAST_PATH=fast_path,
                        RESERVATION_TRUSTED_PROXIES=PROXY,
                        RESERVATION_GUEST_RATE="5/min",
                    )
                )
            return running[fast_path]

        yield edge


@pytest.fixture(params=["on", "off"])
def edge(edges: Any, request: pytest.FixtureRequest) -> Served:
    """The service with `RESERVATION_FAST_PATH` on, then off."""
    return edges(request.param)
