"""What a supervisor is built from: child processes, a lock on the data directory, sockets."""

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Final, Protocol

import structlog

from api.processes import BACKLOG
from reservation.settings import SettingsError

__all__ = [
    "AlreadyRunning",
    "CannotServe",
    "ChildProcess",
    "Part",
    "address_of",
    "alone_in",
    "listen",
    "local",
]

log = structlog.get_logger(__name__)

#: How long a port may still be held by processes of a supervisor that was killed.
_BIND_SECONDS_MAX: Final = 3.0
_BIND_LOOK_SECONDS: Final = 0.05

#: Where a wildcard is listened on, this is where it is reached from the same machine.
_LOCAL: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not listened on


class AlreadyRunning(Exception):
    """Another supervisor works on the same data directory."""


class CannotServe(Exception):
    """The service cannot start: one sentence that says why."""


class Part(Protocol):
    """Something that is kept running: a Python process of ours, or the embedded server."""

    async def start(self) -> None: ...

    async def wait(self) -> int: ...

    async def stop(self, grace_seconds: float) -> None: ...

    @property
    def pid(self) -> int | None: ...


class ChildProcess:
    """One process of `api.processes`; its socket stays open here and so outlives it."""

    def __init__(
        self,
        role: str,
        *,
        entry: str,
        environ: Mapping[str, str],
        listening: socket.socket | None = None,
    ) -> None:
        self._command = [sys.executable, "-P", "-m", "api.processes", role, "--entry", entry]
        self._command += ["--parent", str(os.getpid())]
        # Kept as an object: a socket that nobody refers to is closed.
        self._listening = listening
        if listening is not None:
            self._command += ["--fd", str(listening.fileno())]
        self._environ = dict(environ)
        self._process: asyncio.subprocess.Process | None = None
        # A start that is under way when all is stopped is finished first, and then stopped.
        self._changing = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        async with self._changing:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=subprocess.DEVNULL,
                env=self._environ,
                pass_fds=[self._listening.fileno()] if self._listening else [],
                # Of its own, so that Ctrl-C reaches the supervisor alone and it can keep the order.
                process_group=0,
            )

    async def wait(self) -> int:
        if self._process is None:
            raise CannotServe("a process was waited for before it was started")
        return await self._process.wait()

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
                log.warning("process_killed", pid=process.pid, why="it did not end in time")
                process.kill()
                await process.wait()


@contextlib.contextmanager
def alone_in(data_dir: Path, name: str) -> Generator[None]:
    """Hold the data directory; the kernel lets go of it when this process ends, however it does."""
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
                f"another `reservation serve` (process {holder}) works on {data_dir}"
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


async def listen(host: str, port: int) -> socket.socket:
    """A listening socket, inherited by nobody who is not given it."""
    end = time.monotonic() + _BIND_SECONDS_MAX
    while True:
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise CannotServe(
                    f"cannot listen on {host} port {port}: {_reason(error)}"
                ) from error
            await asyncio.sleep(_BIND_LOOK_SECONDS)
        else:
            listening.setblocking(False)
            return listening


def _reason(error: OSError) -> str:
    # The text of a failed bind repeats the address; of a failed look-up only the text says more.
    if isinstance(error, socket.gaierror) or error.errno is None:
        return str(error)
    return os.strerror(error.errno)


def address_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def local(host: str) -> str:
    """Where what listens on `host` is reached from this machine."""
    return _LOCAL.get(host, host)
