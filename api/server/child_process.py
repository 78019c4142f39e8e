"""Building blocks of the supervisor: child processes, a lock on the data directory, sockets."""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Final, Protocol

import structlog

from api.server.entrypoints import BACKLOG
from reservation.config.settings import SettingsError

__all__ = [
    "AlreadyRunning",
    "CannotServe",
    "ChildProcess",
    "Listener",
    "Part",
    "address_of",
    "alone_in",
    "listen",
    "local",
    "loopback",
]

log = structlog.get_logger(__name__)

#: How long processes of a killed supervisor may still hold a port.
_BIND_SECONDS_MAX: Final = 3.0
_BIND_LOOK_SECONDS: Final = 0.05

#: The address that reaches a wildcard listener from the same machine.
_LOCAL: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not listened on


class AlreadyRunning(Exception):
    """Another supervisor works on the same data directory."""


class CannotServe(Exception):
    """The service cannot start: one sentence with the reason."""


#: Before a listening socket closes: a round trip for clients in the TCP handshake, and the time
#: that busy processes may take to accept its queue.
_HANDSHAKE_SECONDS: Final = 0.1
_ACCEPT_LOOKS_MAX: Final = 100
_ACCEPT_LOOK_SECONDS: Final = 0.01

#: From <asm-generic/socket.h>; Python has no name for it.
_SO_ATTACH_FILTER: Final = 26
#: A socket filter that drops the first segment of a new connection and passes all else:
#: ldb [13]; and #(SYN|ACK); jeq #SYN; ret #0; ret #-1 (tcp(7), struct sock_filter).
_DROP_NEW: Final = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),
        (0x54, 0, 0, 0x12),
        (0x15, 0, 1, 0x02),
        (0x06, 0, 0, 0),
        (0x06, 0, 0, 0xFFFFFFFF),
    )
)
#: `tcpi_unacked` in struct tcp_info: for a listening socket, the length of its accept queue.
_QUEUE_IN_TCP_INFO: Final = slice(24, 28)


class Part(Protocol):
    """A supervised process: a Python process of ours, or the embedded server."""

    async def start(self) -> None: ...

    async def wait(self) -> int: ...

    async def stop(self, grace_seconds: float) -> None: ...

    @property
    def pid(self) -> int | None: ...


class Listener:
    """A listening socket that several processes accept from, and that outlives each of them."""

    def __init__(self, listening: socket.socket) -> None:
        self.socket = listening
        self._linux = sys.platform == "linux"

    async def close(self) -> None:
        """Refuse new connections in every process at once; earlier ones are accepted first.

        A socket that closes resets the connections in its queue and those in the handshake. So the
        first segment of a new connection is dropped for a moment: its client sends it again a
        second later and is refused. Meanwhile the processes, which still serve, empty the queue.

            client    SYN ->                 ACK, request ->              SYN ->     SYN ->
            listener         <- SYN ACK              accepted, answered   dropped    <- RST
        """
        if self.socket.fileno() < 0:
            return
        self._drop_new()
        await asyncio.sleep(_HANDSHAKE_SECONDS)
        for _ in range(_ACCEPT_LOOKS_MAX):
            if not self._queued():
                break
            await asyncio.sleep(_ACCEPT_LOOK_SECONDS)
        # close() alone would leave the socket open in the processes that inherited it; where a
        # system cannot shut a listening socket down, theirs close right after.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _drop_new(self) -> None:
        if not self._linux:
            return
        program = ctypes.create_string_buffer(_DROP_NEW, len(_DROP_NEW))
        filtering = struct.pack("HP", len(_DROP_NEW) // 8, ctypes.addressof(program))
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filtering)
        except OSError as error:
            # Some sandboxes have no filters: the queue is still accepted before the end.
            log.info("socket_filter_refused", reason=os.strerror(error.errno or 0))

    def _queued(self) -> int:
        """Length of the accept queue."""
        if not self._linux:
            return 0
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _QUEUE_IN_TCP_INFO.stop)
        return int.from_bytes(info[_QUEUE_IN_TCP_INFO], sys.byteorder)


class ChildProcess:
    """One process of `api.server.entrypoints`; its socket stays open here and so outlives it."""

    def __init__(
        self,
        role: str,
        *,
        entry: str,
        environ: Mapping[str, str],
        listening: socket.socket | None = None,
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
        # Kept as an object: an unreferenced socket is closed by the garbage collector.
        self._listening = listening
        if listening is not None:
            self._command += ["--fd", str(listening.fileno())]
        self._environ = dict(environ)
        self._process: asyncio.subprocess.Process | None = None
        # A start in progress at shutdown is completed first, and then stopped.
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
                # A group of its own: Ctrl-C reaches only the supervisor, which keeps the order.
                process_group=0,
            )

    async def wait(self) -> int:
        if self._process is None:
            raise CannotServe("a process was waited for before it was started")
        return await self._process.wait()

    async def drain(self) -> None:
        """Make it not ready; it continues to serve, and closes each connection after its answer."""
        async with self._changing:
            if self._process is not None and self._process.returncode is None:
                self._process.send_signal(signal.SIGUSR1)

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
                f"another `reservation serve` (process {holder}) works on {data_dir}"
            ) from error
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


async def listen(host: str, port: int) -> socket.socket:
    """A listening socket that is not inherited (CLOEXEC)."""
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
    # The text of a failed bind repeats the address; for a failed DNS query it is the only detail.
    if isinstance(error, socket.gaierror) or error.errno is None:
        return str(error)
    return os.strerror(error.errno)


def address_of(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def loopback(host: str) -> str:
    """The loopback address of the same family as `host`."""
    return "::1" if ":" in host else "127.0.0.1"


def local(host: str) -> str:
    """The address that reaches a listener on `host` from this machine."""
    return _LOCAL.get(host, host)
