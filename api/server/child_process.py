"""Building blocks of the supervisor: child processes, and a lock on the data directory."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import structlog

from api.server.sockets import CannotServe
from reservation.config.settings import SettingsError

__all__ = ["AlreadyRunning", "ChildProcess", "Part", "alone_in"]

log = structlog.get_logger(__name__)


class AlreadyRunning(Exception):
    """Another supervisor works on the same data directory."""


class Part(Protocol):
    """A supervised process: a Python process of ours, or the embedded server."""

    async def start(self) -> None: ...

    async def wait(self) -> int: ...

    async def stop(self, grace_seconds: float) -> None: ...

    @property
    def pid(self) -> int | None: ...


class ChildProcess:
    """One process of `api.server.entrypoints`; its socket stays open here and so outlives it."""

    def __init__(
        self,
        role: str,
        *,
        entry: str,
        environ: Mapping[str, str],
        sockets: Mapping[str, socket.socket] = MappingProxyType({}),
    ) -> None:
        self._command = [
            sys.executable,
            "-P",
            "-m",
            "api.server.entrypoints",
            role,
            "--entry",
            entry,
        ]
        self._command += ["--parent", str(os.getpid())]
        # Kept as objects: an unreferenced socket is closed by the garbage collector.
        self._sockets = dict(sockets)
        for option, one in sockets.items():
            self._command += [option, str(one.fileno())]
        self._environ = dict(environ)
        self._process: asyncio.subprocess.Process | None = None
        #: Whether another process has replaced it; it is then not restarted.
        self.retired = False
        # A start in progress at shutdown is completed first, and then stopped.
        self._changing = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self, *more: str, descriptors: Sequence[int] = ()) -> None:
        """Start it with additional arguments and inherited descriptors."""
        async with self._changing:
            sockets = [one.fileno() for one in self._sockets.values()]
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                *more,
                stdin=subprocess.DEVNULL,
                env=self._environ,
                pass_fds=[*sockets, *descriptors],
                # Its own process group: Ctrl-C reaches only the supervisor, which keeps the order.
                process_group=0,
            )

    async def start_until_ready(self) -> bool:
        """Start it and wait until it reports its readiness; False if it ends first."""
        loop = asyncio.get_running_loop()
        noticed: asyncio.Future[bytes] = loop.create_future()
        reading, writing = os.pipe()

        def read() -> None:
            # The pipe closes with its last writer, so that a failed start is detected, too.
            if not noticed.done():
                noticed.set_result(os.read(reading, 1))

        loop.add_reader(reading, read)
        try:
            try:
                await self.start("--notice-fd", str(writing), descriptors=[writing])
            finally:
                os.close(writing)
            return bool(await noticed)
        finally:
            loop.remove_reader(reading)
            os.close(reading)

    async def wait(self) -> int:
        if self._process is None:
            raise CannotServe("a process was waited for before it was started")
        return await self._process.wait()

    async def drain(self) -> None:
        """Make it not ready; it continues to serve, and closes each connection after its answer."""
        await self._signal(signal.SIGUSR1)

    async def retire(self) -> None:
        """Make an HTTP process accept no connections, and close each one after its response."""
        await self._signal(signal.SIGUSR2)

    async def _signal(self, number: signal.Signals) -> None:
        async with self._changing:
            if self._process is not None and self._process.returncode is None:
                self._process.send_signal(number)

    async def stop(self, grace_seconds: float) -> None:
        async with self._changing:
            process = self._process
            if process is None or process.returncode is not None:
                return
            process.terminate()
            try:
                async with asyncio.timeout(max(grace_seconds, 0)):
                    await process.wait()
            except TimeoutError:
                log.warning("process_killed", pid=process.pid, reason="it did not stop in time")
                process.kill()
                await process.wait()


@contextlib.contextmanager
def alone_in(data_dir: Path, name: str) -> Generator[None]:
    """Lock the data directory; the kernel releases the lock however this process ends."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(data_dir / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"RESERVATION_DATA_DIR cannot be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 16, 0).decode(errors="replace").strip()
            raise AlreadyRunning(
                f"another `reservation serve` (process {holder}) uses {data_dir}"
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
