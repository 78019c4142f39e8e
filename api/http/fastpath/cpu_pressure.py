"""How far the processor is what everything waits for."""

import time
from pathlib import Path
from typing import Final

__all__ = ["CpuPressure"]

#: This process is one thread of Python: more of a core than this is all of it.
SHARE_MAX: Final = 0.9
#: Of the whole machine: what else runs there may be what this process waits for, Redis above all.
#: Two cores on which everything waits for the processor were seen to be idle for up to 0.12, the
#: waits for their disk included; where the disk alone is waited for, for 0.17 to 0.4. Between the
#: two time is short by degrees: at one limit a busy machine would be called full in every other
#: look, and its crowd would wait as if it were.
IDLE_NONE: Final = 0.12
IDLE_ENOUGH: Final = 0.18
#: How long a time is looked at.
LOOK_SECONDS: Final = 0.5
#: Ticks of all cores since the start: user, nice, system, idle, iowait, ... (proc(5)). Only Linux.
STAT: Final = Path("/proc/stat")
IDLE: Final = slice(3, 5)


class CpuPressure:
    """Looks at most twice a second; between that it says what it saw last."""

    def __init__(self, stat: Path = STAT) -> None:
        """`stat` is read for the whole machine, where there is such a file."""
        self._stat = stat if stat.exists() else None
        self._seen = self._look()
        self._shortage = 0.0

    def shortage(self) -> float:
        """How short time is: 1 where this process or the machine has none left, 0 with enough."""
        then, used_then, total_then, idle_then = self._seen
        if time.monotonic() - then > LOOK_SECONDS:
            try:
                now, used, total, idle = self._seen = self._look()
            except OSError:
                # A crowd may have taken the last file descriptor. What was seen stands.
                return self._shortage
            all_of_a_core = used - used_then > SHARE_MAX * (now - then)
            ticks = total - total_then
            left = (idle - idle_then) / ticks if ticks else 1.0
            short = (IDLE_ENOUGH - left) / (IDLE_ENOUGH - IDLE_NONE)
            self._shortage = 1.0 if all_of_a_core else min(1.0, max(0.0, short))
        return self._shortage

    def _look(self) -> tuple[float, float, int, int]:
        """Seconds by the clock and by this process; ticks of the machine, and idle ones."""
        now, used = time.monotonic(), time.process_time()
        if self._stat is None:
            return now, used, 0, 0
        with self._stat.open("rb") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
        return now, used, sum(ticks), sum(ticks[IDLE])
