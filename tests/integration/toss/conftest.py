"""Fixtures of the tests of the PG: a sandbox, and an order id of the test's own."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.support.sandbox import RunningSandbox, running_sandbox


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningSandbox]:
    with running_sandbox(tmp_path_factory.mktemp("sandbox")) as running:
        yield running


@pytest.fixture
def order_id() -> str:
    return f"order-{uuid4().hex}"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RunningSandbox]:
    """A sandbox of the test's own, since its clock is shared by all clients."""
    with running_sandbox(tmp_path) as running:
        yield running
