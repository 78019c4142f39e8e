"""Whole service on its own Valkey, whose disk may be slowed down at any time."""

import asyncio
import shutil
import sys
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import redis
import redis.asyncio

from benchmarks.contenders.launcher import ADMIN_API_KEY, free_port, own_environ, served
from benchmarks.support import aof_rewrites
from benchmarks.support.sale import SALE_ID, SKU, put_over_http
from reservation.adapters.redis.keys import Keys
from tests.faults.processes.bad_machine import Machine, ServerOn, build

__all__ = ["ServiceOnDisk", "can_slow_disks", "service_on_disk"]


class ServiceOnDisk:
    """A running service with one open sale."""

    def __init__(
        self, url: str, client: "redis.asyncio.Redis", machine: Machine | None, stock: int
    ) -> None:
        self.url = url
        self._redis = client
        self._machine = machine
        self._stock = stock

    def delay_syncs(self, seconds: float) -> None:
        """Add this much to each sync of Redis' file from now on."""
        if self._machine is None:
            raise RuntimeError("the service was started on a disk that stays as it is")
        self._machine.be(sync_delay=seconds)

    async def sold(self) -> int:
        """Units taken so far: none is returned here."""
        left: object = await self._redis.hget(Keys().of(SALE_ID).stock(SKU), "available")
        return self._stock - int(str(left))


def can_slow_disks() -> bool:
    """Whether the library of the slow disk can be built."""
    return shutil.which("cc") is not None


@asynccontextmanager
async def service_on_disk(
    home: Path, *, stock: int, slowed: bool, environ: Mapping[str, str] | None = None
) -> AsyncGenerator[ServiceOnDisk]:
    """Start everything on an empty folder, which is removed at the end.

    Args:
        home: the folder.
        stock: units of the sale.
        slowed: whether the syncs will be delayed; needs a C compiler.
        environ: further settings of the service.
    """
    await asyncio.to_thread(_empty, home)
    valkey = ServerOn(home / "redis")
    if slowed:
        valkey.machine = Machine(build(home), home / "syncs")
    await valkey.start()
    port = free_port()
    settings = own_environ(home / "service", port) | {"RESERVATION_REDIS_URL": valkey.url}
    # `-m api.cli serve`: the processes of `make run` without its Redis.
    command = [sys.executable, "-m", "api.cli", "serve"]
    try:
        with served(command, settings | dict(environ or {}), home, port):
            url = f"http://127.0.0.1:{port}"
            put_over_http(url, ADMIN_API_KEY, stock)
            client = redis.asyncio.Redis(
                unix_socket_path=str(valkey.socket_path), decode_responses=True
            )
            try:
                with _no_rewrite(valkey.socket_path):
                    yield ServiceOnDisk(url, client, valkey.machine, stock)
            finally:
                await client.aclose()
    finally:
        await valkey.stop()
        await asyncio.to_thread(shutil.rmtree, home, ignore_errors=True)


@contextmanager
def _no_rewrite(socket_path: Path) -> Generator[None]:
    """It would start in one phase by chance, and takes a third of the holds meanwhile."""
    with (
        redis.Redis(unix_socket_path=str(socket_path), decode_responses=True) as client,
        aof_rewrites.none_meanwhile(client),
    ):
        yield


def _empty(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
