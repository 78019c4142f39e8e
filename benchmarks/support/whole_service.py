"""The whole service with its own Valkey: API, worker, sandbox and SQL, and their CPU time."""

import asyncio
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psutil
import redis

from benchmarks.contenders.launcher import ADMIN_API_KEY, free_port, own_environ, served
from benchmarks.support import sale
from benchmarks.support.cpu import ServiceCpu
from reservation.adapters.redis.embedded.server import EmbeddedServer
from reservation.adapters.redis.keys import Keys
from tests.support.databases import PostgresServer

__all__ = ["DATABASES", "WholeService", "whole_service"]

DATABASES: Final = ("sqlite", "postgresql")

#: After a load of some seconds; the flusher of an early commit writes 4,000 events a second.
_DRAIN_SECONDS: Final = 120.0
_DRAIN_POLL_SECONDS: Final = 0.1


class WholeService:
    """A running service with an open sale."""

    def __init__(self, url: str, client: "redis.Redis", cpu: ServiceCpu) -> None:
        self.url = url
        self._client = client
        self._cpu = cpu

    def cpu(self) -> Mapping[str, float]:
        """Seconds of CPU time by part."""
        return self._cpu.seconds()

    def cpu_us_since(self, before: Mapping[str, float], operations: int) -> dict[str, float]:
        """CPU microseconds of one operation since an earlier reading, by part."""
        return {
            part: (now - before[part]) / operations * 1e6
            for part, now in self._cpu.seconds().items()
        }

    def held(self) -> int:
        """Units that are held, by Redis' own count."""
        held = self._client.hget(Keys().of(sale.SALE_ID).stock(sale.SKU), "held")
        return int(str(held or 0))

    def drain(self) -> None:
        """Wait until SQL has every event of the sale."""
        give_up_at = time.monotonic() + _DRAIN_SECONDS
        outbox = Keys().of(sale.SALE_ID).outbox
        while time.monotonic() < give_up_at:
            last = self._client.xinfo_stream(outbox)["last-generated-id"]
            groups: Any = self._client.xinfo_groups(outbox)
            if all(
                group["pending"] == 0 and group["last-delivered-id"] == last for group in groups
            ):
                return
            time.sleep(_DRAIN_POLL_SECONDS)
        raise RuntimeError("the worker did not write the sale's events to SQL in time")


@contextmanager
def whole_service(
    home: Path,
    command: Sequence[str],
    *,
    stock: int,
    folder: Path,
    postgres: PostgresServer | None = None,
) -> Generator[WholeService]:
    """Start a service on an empty data directory, and remove it afterwards.

    Args:
        home: a folder that it may fill.
        command: starts the service.
        stock: units of the sale.
        folder: the working directory of the command.
        postgres: the server of its database; SQLite without one.
    """
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    valkey = EmbeddedServer(home / "redis")
    asyncio.run(valkey.start())
    try:
        port = free_port()
        environ = own_environ(home / "service", port) | {"RESERVATION_REDIS_URL": valkey.url}
        if postgres is not None:
            environ["RESERVATION_DATABASE_URL"] = postgres.make_database()
        with (
            served(list(command), environ, home, port, folder=folder) as process,
            redis.Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as client,
        ):
            url = f"http://127.0.0.1:{port}"
            sale.put_over_http(url, ADMIN_API_KEY, stock)
            sql = None if postgres is None else psutil.Process(postgres.pid)
            yield WholeService(url, client, ServiceCpu(psutil.Process(process.pid), valkey, sql))
    finally:
        asyncio.run(valkey.stop())
        shutil.rmtree(home, ignore_errors=True)
