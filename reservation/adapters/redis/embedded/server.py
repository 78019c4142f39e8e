"""The embedded Valkey server: started by the service if no Redis URL is set."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final
from urllib.parse import quote

from reservation.adapters.redis.embedded import launcher
from reservation.adapters.redis.embedded.files import (
    EmbeddedServerError,
    configuration_of,
    find_binary,
    lock_holder,
    own_socket_directory,
    socket_path_of,
)

__all__ = ["DataDirectoryInUse", "EmbeddedServer", "EmbeddedServerError", "find_binary"]

#: Start-up time-out of a silent server; a start takes 0.1 s.
_SILENCE_SECONDS_MAX: Final = 30.0

#: Time-out for loading the file. 200,000 orders take a few seconds; ten minutes covers a slow disk.
_LOADING_SECONDS_MAX: Final = 600.0

#: Grace period after SIGTERM; all acknowledged data is on disk already.
_STOP_SECONDS: Final = 5.0

#: How long a start waits for the previous server on the same data to exit.
_PREVIOUS_SECONDS_MAX: Final = 10.0

#: Polling interval of the waits; a start takes about five polls.
_READY_POLL_SECONDS: Final = 0.02

#: Polling interval of `wait`: the delay until the exit of a server is detected.
_WATCH_SECONDS: Final = 0.05

#: Size at which a start rotates the server's log; one older file is kept.
_LOG_BYTES_MAX: Final = 1024 * 1024

#: How much of the log is searched for the reason of a failed start.
_LOG_TAIL_BYTES: Final = 4096

#: For a server on glibc's allocator, as in the wheel; others ignore it. Redis frees the arguments
#: of a script's commands at the script's end: some thousand small chunks. By default glibc caches
#: seven chunks of a size and merges the others, which took a fourth of Redis' time: 27,000 holds
#: expired per second instead of 36,000.
_ALLOCATOR: Final = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=8000"}

#: The launcher's mode for this platform.
_LAUNCH_MODE = "become" if sys.platform == "linux" else "guard"


class DataDirectoryInUse(EmbeddedServerError):
    """Another server uses the same data; two would destroy it."""


class EmbeddedServer:
    """One Valkey server on one data directory, reached by a Unix socket.

    The server dies with this process. Call `start` from a thread that outlives the server: on
    Linux, PDEATHSIG fires when the thread that forked the child exits. The server may be restarted
    after it ended; the socket stays the same.

    Args:
        data_dir: the directory of its file, log, lock and, where the path is short enough, socket.
        binary: the server program; `find_binary` finds it if absent.
        maxmemory_bytes: 60 % of the machine's or the container's memory if absent.
        debug_commands: allow DEBUG, for tests.
        take_over: end a server that an earlier process left behind on the same data. Only for a
            caller with its own exclusive lock.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        binary: Path | None = None,
        maxmemory_bytes: int | None = None,
        debug_commands: bool = False,
        take_over: bool = False,
    ) -> None:
        self._home = data_dir.absolute()
        self._binary = binary
        self._maxmemory_bytes = maxmemory_bytes
        self._debug_commands = debug_commands
        self._take_over = take_over
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False
        self._log_start = 0
        self.socket_path = socket_path_of(self._home)

    @property
    def url(self) -> str:
        """The URL for a client."""
        return f"unix://{quote(str(self.socket_path))}"

    @property
    def pid(self) -> int | None:
        """The process id of the server, or None if none runs."""
        return lock_holder(self._lock_path)

    @property
    def returncode(self) -> int | None:
        """The server's exit status, as in `subprocess`; None while it runs."""
        return self._process.poll() if self._process else None

    @property
    def _lock_path(self) -> Path:
        return self._home / "valkey.lock"

    @property
    def _log_path(self) -> Path:
        return self._home / "valkey.log"

    async def start(self) -> None:
        """Start the server and wait until it has loaded its data and replies.

        Raises:
            DataDirectoryInUse: another server uses the same data and does not exit.
            EmbeddedServerError: no server program was found, or it did not start.
        """
        process = self._process
        if process is not None and process.poll() is None:
            if not self._killed:
                return
            # It is exiting, which takes a moment: treat it as gone.
            await _wait_until(lambda: process.poll() is not None, within=_PREVIOUS_SECONDS_MAX)
        binary = self._binary or find_binary()
        configuration = self._write_files()
        await self._wait_for_previous()
        self._process, self._killed = self._launch(binary, configuration), False
        try:
            await self._wait_until_ready()
        except BaseException:
            await self.stop()
            raise

    async def stop(self, grace_seconds: float = _STOP_SECONDS) -> None:
        """End the server: SIGTERM, and SIGKILL after the grace. Nothing acknowledged is lost."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        if not await _wait_until(lambda: process.poll() is not None, within=grace_seconds):
            self.kill()
        # SIGKILL cannot be ignored; only hanging disk I/O keeps a process longer.
        await _wait_until(lambda: process.poll() is not None, within=_STOP_SECONDS)

    def kill(self) -> None:
        """Send SIGKILL at once, as in a crash."""
        if self._process is not None and self._process.poll() is None:
            self._killed = True
            _signal(self.pid or self._process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Wait until the server ends, without a time-out; returns its exit status."""
        if self._process is None:
            raise EmbeddedServerError("the embedded server has not been started")
        # Not every event loop and platform reports a child's exit.
        while (returncode := self._process.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(_WATCH_SECONDS)
        return returncode

    def _write_files(self) -> Path:
        data, configuration = self._home / "valkey", self._home / "valkey.conf"
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            data.mkdir(mode=0o700, exist_ok=True)
            own_socket_directory(self.socket_path, self._home)
            text = configuration_of(
                data=data,
                socket_path=self.socket_path,
                maxmemory_bytes=self._maxmemory_bytes,
                debug_commands=self._debug_commands,
            )
            # Replaced in one step: the server of a concurrent start may be reading it.
            written = configuration.with_suffix(f".{os.getpid()}")
            written.write_text(text)
            written.replace(configuration)
        except OSError as error:
            raise EmbeddedServerError(
                f"{self._home} cannot be written: {error.strerror}"
            ) from error
        return configuration

    def _launch(self, binary: Path, configuration: Path) -> subprocess.Popen[bytes]:
        if self._log_path.exists() and self._log_path.stat().st_size > _LOG_BYTES_MAX:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        with (
            resources.as_file(
                resources.files("reservation.adapters.redis.embedded") / "launcher.py"
            ) as program,
            self._log_path.open("ab") as log,
        ):
            self._log_start = log.tell()
            return subprocess.Popen(
                [
                    sys.executable, "-I", "-S", str(program), _LAUNCH_MODE, str(os.getpid()),
                    str(self._lock_path), str(binary), str(configuration),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_ALLOCATOR | os.environ,
                # Its own process group, so that Ctrl-C ends the server's clients first.
                process_group=0,
            )  # fmt: skip

    async def _wait_for_previous(self) -> None:
        """Wait for the previous server on the data, or end it: two on one file would destroy it.

        A server whose parent was killed dies within milliseconds, but the next start may be faster.
        """
        holder = lock_holder(self._lock_path)
        if holder is None:
            return
        if self._take_over:
            _signal(holder, signal.SIGTERM)
        half = _PREVIOUS_SECONDS_MAX / 2
        if await _wait_until(lambda: lock_holder(self._lock_path) is None, within=half):
            return
        if self._take_over and lock_holder(self._lock_path) == holder:
            _signal(holder, signal.SIGKILL)
        if not await _wait_until(lambda: lock_holder(self._lock_path) is None, within=half):
            raise self._in_use()

    def _in_use(self) -> DataDirectoryInUse:
        return DataDirectoryInUse(
            f"another server (process {lock_holder(self._lock_path)}) uses {self._home}"
        )

    async def _wait_until_ready(self) -> None:
        started_at = answered_at = time.monotonic()
        while True:
            answer = await _ping(self.socket_path)
            now = time.monotonic()
            if answer.startswith(b"+PONG") and self._is_lock_held():
                return
            if self.returncode == launcher.BUSY:
                raise self._in_use()
            if self.returncode is not None:
                raise EmbeddedServerError(
                    f"the embedded server exited at start: {self._last_log_line()}"
                )
            if answer:
                answered_at = now
            if now - answered_at > _SILENCE_SECONDS_MAX or now - started_at > _LOADING_SECONDS_MAX:
                raise EmbeddedServerError(
                    f"the embedded server does not answer: {self._last_log_line()}"
                )
            await asyncio.sleep(_READY_POLL_SECONDS)

    def _is_lock_held(self) -> bool:
        """Whether this launcher's server holds the lock.

        When two start at once, the loser reaches the winner's server at the same socket before its
        own launcher has ended.
        """
        holder = self.pid
        if holder is None or self._process is None:
            return False
        try:
            # The launcher leads a process group that includes the server.
            return os.getpgid(holder) == self._process.pid
        except ProcessLookupError:
            return False

    def _last_log_line(self) -> str:
        """The server's last log line of this start, and the path of the log."""
        with self._log_path.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").split("\n")
        log_lines = [line.strip() for line in lines if line.strip()]
        return f"{log_lines[-1] if log_lines else 'no output'} ({self._log_path})"


def _signal(pid: int, number: signal.Signals) -> None:
    # 0 means a holder in another container, which cannot be signalled from here.
    if pid > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def _wait_until(condition: Callable[[], bool], *, within: float) -> bool:
    end = time.monotonic() + within
    while not condition():
        if time.monotonic() >= end:
            return False
        await asyncio.sleep(_READY_POLL_SECONDS)
    return True


async def _ping(path: Path) -> bytes:
    """The server's reply to PING; empty if it does not listen yet."""
    try:
        async with asyncio.timeout(_SILENCE_SECONDS_MAX):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(b"PING\r\n")
                return await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""
