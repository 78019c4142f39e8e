"""Whether the processor is what everything waits for."""

import time
from pathlib import Path
from typing import Final

__all__ = ["Processor"]

#: This process is one thread of Python: more of a core than this is all of it.
SHARE_MAX: Final = 0.9
#: Less than this of the whole machine is idle: what else runs there may be what this process
#: waits for, Redis above all. A machine of two cores on which everything waits for the processor
#: was seen to be idle for up to 0.12, the waits for its disk included; one that waits for the disk
#: alone for 0.3 and more.
IDLE_MIN: Final = 0.2
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
        then, used_then, total_then, idle_then = self._seen
        if time.monotonic() - then > LOOK_SECONDS:
            try:
                now, used, total, idle = self._seen = self._look()
            except OSError:
                # A crowd may have taken the last file descriptor. What was seen stands.
                return self._full
            process_is = used - used_then > SHARE_MAX * (now - then)
            machine_is = idle - idle_then < IDLE_MIN * (total - total_then)
            self._full = process_is or machine_is
        return self._full

    def _look(self) -> tuple[float, float, int, int]:
        """Seconds by the clock and by this process; ticks of the machine, and idle ones."""
        now, used = time.monotonic(), time.process_time()
        if self._stat is None:
            return now, used, 0, 0
        with self._stat.open("rb") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
        return now, used, sum(ticks), sum(ticks[IDLE])
