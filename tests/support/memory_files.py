"""Temporary files in memory: databases and servers of tests sync thousands of times a minute."""

import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["keep_temporary_files_in_memory"]

_MEMORY = Path("/dev/shm")
#: A run has about 1 GB at a time.
_FREE_BYTES_MIN = 4 * 1024**3


def keep_temporary_files_in_memory() -> None:
    """Use a file system in memory, if there is one with room, unless `TMPDIR` is set."""
    if "TMPDIR" in os.environ or not os.access(_MEMORY, os.W_OK):
        return
    if shutil.disk_usage(_MEMORY).free < _FREE_BYTES_MIN or _free_memory() < _FREE_BYTES_MIN:
        return
    # In the environment, so that the processes of a run use the same.
    os.environ["TMPDIR"] = str(_MEMORY)
    tempfile.tempdir = None


def _free_memory() -> int:
    # The size of the file system is a limit, not a reservation.
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0
