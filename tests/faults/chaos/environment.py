"""Service under attack: its processes, its Redis behind a faulty network, its PG."""

import asyncio
import os
import secrets
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import httpx
import msgspec
import psutil
import redis.asyncio
from redis.exceptions import RedisError

from loadtests.recording import Heads
from reservation.adapters.redis.embedded.server import EmbeddedServerError
from reservation.config.settings import Settings
from reservation.verification.model.history_format import Head
from tests.faults.chaos.network import Link
from tests.faults.processes.bad_machine import Machine, ServerOn, build, last_sync
from tests.faults.processes.recorded_sale import appended_file
from tests.support.service import Served, free_port, running_service

__all__ = ["Observer", "Stage", "staged"]

#: Tries for the start of a killed server, until the last one's lock is gone.
START_TRIES = 20
REDIS_SECONDS = 5.0
HTTP_SECONDS = 20.0
WORKERS = "2"
#: Room for all sales of an hour; a fault takes it away for some moments.
MAXMEMORY_BYTES = 4 << 30


class Observer(Protocol):
    """Reads the head of one sale."""

    def observe(self) -> Head: ...

    def close(self) -> None: ...


class Stage:
    """Starts, kills and restarts the parts; each of them by its own process id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = ServerOn(folder / "redis", maxmemory_bytes=MAXMEMORY_BYTES)
        self.link = Link(self.server.socket_path, folder / "way.sock")
        self._port = str(free_port())
        self._service: AbstractContextManager[Served] | None = None
        self._served: Served | None = None
        #: The crowd's sale; its faults hit its newest sale.
        self.sale_id = ""
        self.pg_url = ""

    @property
    def machine(self) -> Machine | None:
        """Below Redis; absent without a C compiler."""
        return self.server.machine

    @property
    def served(self) -> Served:
        assert self._served is not None
        return self._served

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of the service; any of them may get any request."""
        return (self.served.url,)

    @property
    def settings(self) -> Settings:
        """The service's own, with Redis reached past the faulty network."""
        return msgspec.structs.replace(self.served.settings, redis_url=self.server.url)

    @property
    def environ(self) -> dict[str, str]:
        """The same, for a process that reads its settings itself."""
        return {
            "RESERVATION_DATA_DIR": str(self.folder / "service"),
            "RESERVATION_PORT": self._port,
            "RESERVATION_REDIS_URL": self.server.url,
        }

    async def start(self) -> None:
        """Everything, until it is ready."""
        # Under CI a compiler that is missing is a failure, not a run without power cuts.
        has_compiler = shutil.which("cc") or os.environ.get("CI") == "true"
        if sys.platform == "linux" and has_compiler:
            self.server.machine = Machine(build(self.folder), self.folder / "syncs")
        await self.start_redis()
        await self.link.start()
        await self.start_service()

    async def stop(self) -> None:
        await self.stop_service()
        await self.link.stop()
        await self.server.stop()

    async def start_redis(self) -> None:
        """Start it; the last one's lock may exist for some moments."""
        for attempt in range(1, START_TRIES + 1):
            try:
                await self.server.start()
            except EmbeddedServerError:
                if attempt == START_TRIES:
                    raise
                await asyncio.sleep(0.2)
            else:
                return

    async def kill_redis(self) -> None:
        """SIGKILL, and wait until it is gone: until then its file may grow."""
        self.server.kill()
        await self.server.wait()

    async def cut_power(self, machine: Machine) -> int:
        """Kill Redis and cut the bytes from its file that no sync had made durable; how many."""
        await self.kill_redis()
        file = appended_file(self.folder / "redis")
        size, synced = file.stat().st_size, last_sync(machine.log, file)
        if synced >= size:
            return 0
        with file.open("r+b") as opened:
            opened.truncate(synced)
        return size - synced

    async def start_service(self) -> str:
        """Start it; a few words about it."""
        self._service = running_service(
            self.folder / "service",
            RESERVATION_PORT=self._port,
            RESERVATION_REDIS_URL=self.link.url,
            RESERVATION_WORKERS=WORKERS,
        )
        # It waits until the service is ready, which needs the network that this loop serves.
        self._served = await asyncio.to_thread(self._service.__enter__)
        self.pg_url = self._find_pg()
        return "started"

    async def stop_service(self, *, kill: bool = False) -> None:
        """End it by SIGTERM, or by SIGKILL of the supervisor alone."""
        if self._service is None:
            return
        service, self._service = self._service, None
        if kill:
            self.served.process.kill()
        await asyncio.to_thread(service.__exit__, None, None, None)

    def _find_pg(self) -> str:
        """The sandbox's current address: the one port that its process listens on."""
        for process in self.parts("sandbox"):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    return f"http://127.0.0.1:{connection.laddr.port}"
        raise AssertionError("the sandbox does not listen")

    def parts(self, role: str) -> list[psutil.Process]:
        """The supervisor's children of this role."""
        with suppress(psutil.NoSuchProcess):
            return [
                child
                for child in psutil.Process(self.served.process.pid).children()
                if f"api.server.entrypoints {role}" in " ".join(child.cmdline())
            ]
        return []

    def heads(self, sale_id: str, skus: Iterable[str]) -> "Observer":
        """Polls of a sale past the faulty network."""
        return Heads(self.settings, sale_id, skus)

    @property
    def observed_after_seconds(self) -> float:
        """How long a sale is observed after its crowd has left."""
        return 0.0

    def trusted(self, sale_id: str, heads: list[Head]) -> list[Head]:
        """The heads that are evidence: all, where there is one server."""
        del sale_id
        return heads

    async def heal(self) -> None:
        """A fault that was cut short by another one may have left something wrong: restore it."""
        with suppress(RedisError):
            async with self.redis() as client:
                await client.config_set("appendfsync", "always")
                await client.config_set("maxmemory-policy", "noeviction")

    @asynccontextmanager
    async def redis(self) -> AsyncIterator[Any]:
        """An operator's own connection, past the faulty network."""
        client = redis.asyncio.Redis.from_url(
            self.server.url, decode_responses=True, socket_timeout=REDIS_SECONDS
        )
        try:
            yield client
        finally:
            with suppress(RedisError):
                await client.aclose()

    async def ask_pg(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        """A call to the sandbox's control API."""
        async with httpx.AsyncClient(timeout=HTTP_SECONDS, trust_env=False) as client:
            answer = await client.request(method, f"{self.pg_url}{path}", **more)
            return answer.raise_for_status().json()

    async def operate(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A call with the operator's key."""
        headers = self.served.admin | more.pop("headers", {})
        async with httpx.AsyncClient(
            base_url=self.served.url, timeout=HTTP_SECONDS, trust_env=False
        ) as client:
            return await client.request(method, path, headers=headers, **more)


@asynccontextmanager
async def staged(stage: Stage) -> AsyncIterator[Stage]:
    """The stage for the duration of the block."""
    try:
        await stage.start()
        yield stage
    finally:
        await stage.stop()


def signal_all(processes: list[psutil.Process], number: signal.Signals) -> int:
    """Send it to those that are still alive; how many got it."""
    reached = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            reached += 1
    return reached


def new_key() -> str:
    """An idempotency key for an operator's call."""
    return secrets.token_hex(8)
