"""CPU saturation of this process and of the host."""

import time
from pathlib import Path
from typing import Final

__all__ = ["CpuPressure"]

#: This process is one Python thread: above this share of a core it is saturated.
SHARE_MAX: Final = 0.9
#: Idle share of the whole host, where this process waits for others too, above all for Redis. Two
#: cores with every task waiting for the CPU were measured up to 0.12 idle, waits for their disk
#: included; with tasks waiting only for the disk, 0.17 to 0.4. In between the shortage is graded:
#: with one threshold a busy host would count as saturated in every other sample, and its requests
#: would wait accordingly.
IDLE_NONE: Final = 0.12
IDLE_ENOUGH: Final = 0.18
#: Length of a sample.
LOOK_SECONDS: Final = 0.5
#: Ticks of all cores since the start: user, nice, system, idle, iowait, ... (proc(5)). Only Linux.
STAT: Final = Path("/proc/stat")
IDLE: Final = slice(3, 5)


class CpuPressure:
    """Samples at most twice a second; in between it returns the last result."""

    def __init__(self, stat: Path = STAT) -> None:
        """`stat` covers the whole host, where such a file exists."""
        self._stat = stat if stat.exists() else None
        self._seen = self._look()
        self._shortage = 0.0

    def shortage(self) -> float:
        """CPU shortage: 1 if this process or the host has no time left, 0 if there is enough."""
        then, used_then, total_then, idle_then = self._seen
        if time.monotonic() - then > LOOK_SECONDS:
            try:
                now, used, total, idle = self._seen = self._look()
            except OSError:
                # A surge may have taken the last file descriptor: keep the last result.
                return self._shortage
            all_of_a_core = used - used_then > SHARE_MAX * (now - then)
            ticks = total - total_then
            left = (idle - idle_then) / ticks if ticks else 1.0
            short = (IDLE_ENOUGH - left) / (IDLE_ENOUGH - IDLE_NONE)
            self._shortage = 1.0 if all_of_a_core else min(1.0, max(0.0, short))
        return self._shortage

    def _look(self) -> tuple[float, float, int, int]:
        """Wall and CPU seconds of this process; total and idle ticks of the host."""
        now, used = time.monotonic(), time.process_time()
        if self._stat is None:
            return now, used, 0, 0
        with self._stat.open("rb") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
        return now, used, sum(ticks), sum(ticks[IDLE])
