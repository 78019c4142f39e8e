"""CPU saturation of this process, and of the CPU time that it shares: its quota's or the host's."""

import time
from pathlib import Path
from typing import Final, NamedTuple

from api.http.fastpath.cpu_quota import QuotaUse, quota_use

__all__ = ["CpuPressure"]

#: This process is one Python thread: above this share of a core it is saturated.
SHARE_MAX: Final = 0.9
#: Idle share of the whole host, where this process waits for others too, above all for Redis. Two
#: cores with every task waiting for the CPU were measured up to 0.12 idle, waits for their disk
#: included; with tasks waiting only for the disk, 0.17 to 0.4. In between the shortage is graded:
#: with one threshold a busy host would count as saturated in every other sample, and its requests
#: would wait accordingly. The same bounds apply to the unused share of a quota.
IDLE_SHARE_MIN: Final = 0.12
IDLE_SHARE_MAX: Final = 0.18
#: Share of throttled periods that counts as saturation: in each of them the whole group, Redis
#: included, was stopped for up to a period. A few come with any burst of several threads.
THROTTLED_MAX: Final = 0.25
#: Length of a sample.
SAMPLE_SECONDS: Final = 0.5
#: Where `proc` and `sys` are. Only Linux has their files.
ROOT: Final = Path("/")
#: Ticks of all cores since the start: user, nice, system, idle, iowait, ... (proc(5)).
IDLE: Final = slice(3, 5)
#: A file that is not readable now, or has another format.
_UNREADABLE: Final = (OSError, ValueError)


class _Sample(NamedTuple):
    """Counters at one time."""

    at: float
    #: CPU seconds of this process.
    used: float
    #: The quota that limits this process; without one, the ticks of the host count.
    quota: QuotaUse | None
    #: Total and idle ticks of the host; 0 if unknown.
    ticks: int
    idle: int


class CpuPressure:
    """Samples at most twice a second; in between it returns the last result."""

    def __init__(self, root: Path = ROOT) -> None:
        """`root` is the directory of `proc` and `sys`."""
        self._root = root
        self._stat = root / "proc/stat"
        self._has_stat = self._stat.exists()
        self._shortage = 0.0
        try:
            self._seen = self._sample()
        except _UNREADABLE:
            self._seen = _Sample(time.monotonic(), time.process_time(), None, 0, 0)

    def shortage(self) -> float:
        """CPU shortage: 1 if this process or the CPU it shares has no time left, 0 if enough."""
        if time.monotonic() - self._seen.at > SAMPLE_SECONDS:
            then = self._seen
            try:
                now = self._seen = self._sample()
            except _UNREADABLE:
                # A surge may have taken the last file descriptor: keep the last result.
                return self._shortage
            if now.used - then.used > SHARE_MAX * (now.at - then.at):
                self._shortage = 1.0
            elif now.quota is not None:
                self._shortage = _of_quota(then, now.quota, now.at - then.at)
            else:
                self._shortage = _of_host(then, now)
        return self._shortage

    def _sample(self) -> _Sample:
        now, used, quota = time.monotonic(), time.process_time(), quota_use(self._root)
        if quota is not None or not self._has_stat:
            return _Sample(now, used, quota, 0, 0)
        with self._stat.open("rb") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
        return _Sample(now, used, None, sum(ticks), sum(ticks[IDLE]))


def _of_quota(then: _Sample, quota: QuotaUse, seconds: float) -> float:
    """The shortage of a process with a quota: the host's idle time is not available to it."""
    before = then.quota
    if before is None or before.group != quota.group:
        # The quota is new: the next sample shows its use.
        return 0.0
    unused = 1.0 - (quota.used_seconds - before.used_seconds) / (quota.cores * seconds)
    periods = quota.periods - before.periods
    throttled = (quota.throttled - before.throttled) / periods if periods else 0.0
    return max(_graded(unused), min(1.0, throttled / THROTTLED_MAX))


def _of_host(then: _Sample, now: _Sample) -> float:
    """The shortage of a process that may use the whole host."""
    ticks = now.ticks - then.ticks
    if not then.ticks or ticks <= 0:
        return 0.0
    return _graded((now.idle - then.idle) / ticks)


def _graded(idle: float) -> float:
    return min(1.0, max(0.0, (IDLE_SHARE_MAX - idle) / (IDLE_SHARE_MAX - IDLE_SHARE_MIN)))
