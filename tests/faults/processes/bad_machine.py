"""Bad machine below Redis, by a preloaded library: logs syncs; a bad disk, a wrong clock."""

import mmap
import os
import struct
import subprocess
from pathlib import Path

from reservation.adapters.redis.embedded.server import EmbeddedServer

__all__ = ["Machine", "ServerOn", "build", "last_sync"]

_SOURCE = Path(__file__).with_name("bad_machine.c")
#: `struct state` of the library: the clock's offset, the added latency of each sync, both in
#: microseconds, and whether the disk is full.
_STATE = struct.Struct("=qqq")


def build(folder: Path) -> Path:
    """The library; needs a C compiler."""
    library = folder / "bad_machine.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O", "-o", library, _SOURCE, "-ldl"], check=True)
    return library


class Machine:
    """One machine, healthy until a test sets a fault.

    Args:
        library: as it was built.
        log: the file that records the syncs.
    """

    def __init__(self, library: Path, log: Path) -> None:
        self.log = log
        state = log.with_suffix(".state")
        state.write_bytes(bytes(_STATE.size))
        with state.open("r+b") as file:
            self._state = mmap.mmap(file.fileno(), _STATE.size)
        #: The environment of a server on this machine.
        self.environ = {
            "LD_PRELOAD": os.fspath(library),
            "FSYNC_LOG": os.fspath(log),
            "MACHINE_STATE": os.fspath(state),
        }

    def be(
        self, *, clock_off: float = 0.0, sync_delay: float = 0.0, disk_full: bool = False
    ) -> None:
        """Set the faults from now on, in seconds; none by default."""
        state = int(clock_off * 1e6), int(sync_delay * 1e6), int(disk_full)
        _STATE.pack_into(self._state, 0, *state)


class ServerOn(EmbeddedServer):
    """A server on this machine; on the one that all use while it is None."""

    machine: Machine | None = None

    def _launch(self, binary: Path, configuration: Path) -> "subprocess.Popen[bytes]":
        # A child inherits our environment: it has these names for this one call, and no other child
        # of the loop can get them too.
        below = self.machine.environ if self.machine else {}
        os.environ.update(below)
        try:
            return super()._launch(binary, configuration)
        finally:
            for name in below:
                os.environ.pop(name)


def last_sync(log: Path, file: Path) -> int:
    """The file's length when its last sync began."""
    lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
    return max((int(size) for size, path in lines if Path(path).name == file.name), default=0)
