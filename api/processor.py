"""Whether the processor is what everything waits for."""

import time
from pathlib import Path
from typing import Final

__all__ = ["Processor"]

#: This process is one thread of Python: more of a core than this is all of it.
SHARE_MAX: Final = 0.9
#: Less than this of the whole machine is idle: what else runs there may be what this process
#: waits for, Redis above all.
IDLE_MIN: Final = 0.1
#: How long a time is looked at.
LOOK_SECONDS: Final = 0.5
#: Ticks of all cores since the start: user, nice, system, idle, iowait, ... (proc(5)). Only Linux.
STAT: Final = Path("/proc/stat")
IDLE: Final = slice(3, 5)


class Processor:
    """Looks at most twice a second; between that it says what it saw last."""

    def __init__(self, stat: Path = STAT) -> None:
        """`stat` is read for the whole machine, where there is such a file."""
        self._stat = stat if stat.exists() else None
        self._seen = self._look()
        self._full = False

    def is_full(self) -> bool:
        """Whether this process or the whole machine has no time left."""
        if time.monotonic() - self._seen[0] > LOOK_SECONDS:
            (then, used_then, total_then, idle_then), self._seen = self._seen, self._look()
            now, used, total, idle = self._seen
            self._full = used - used_then > SHARE_MAX * (
                now - then
            ) or idle - idle_then < IDLE_MIN * (total - total_then)
        return self._full

    def _look(self) -> tuple[float, float, int, int]:
        """Seconds by the clock and by this process; ticks of the machine, and idle ones."""
        now, used = time.monotonic(), time.process_time()
        if self._stat is None:
            return now, used, 0, 0
        with self._stat.open("rb") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
        return now, used, sum(ticks), sum(ticks[IDLE])
