"""CPU quota of this process's control group, and the group's use of it (cgroup v2 and v1).

A container may use a fraction of the host's cores. The kernel stops all of its processes for the
rest of each period (100 ms by default) once they have used the quota of that period.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["QuotaUse", "quota_use"]

#: The mount points of the version 1 controllers, which distributions join or separate.
_CPU_V1: Final = ("cpu,cpuacct", "cpu")
_CPUACCT_V1: Final = ("cpu,cpuacct", "cpuacct")
_MICROSECONDS: Final = 1e6
_NANOSECONDS: Final = 1e9


class QuotaUse(NamedTuple):
    """A quota, and the counters of the group that has it, all since the group began."""

    #: The group of the quota: counters of two groups must not be compared.
    group: Path
    #: The quota: 0.5 is half of one core.
    cores: float
    used_seconds: float
    #: Periods in which the group ran, and those in which it was stopped.
    periods: int
    throttled: int


def quota_use(root: Path) -> QuotaUse | None:
    """The use of the smallest quota that applies to this process; None if none applies.

    Args:
        root: directory of `proc` and `sys`: `/`, or recorded files.

    Raises:
        OSError: a file cannot be read now, as without free file descriptors.
        ValueError: a file has another format.
    """
    mount = root / "sys/fs/cgroup"
    paths = _group_paths(root / "proc/self/cgroup")
    found: list[QuotaUse] = []
    if "" in paths:
        for group in _with_parents(mount, paths[""]):
            found += _version_2(group)
    if "cpu" in paths:
        controller, accounting = _mounted(mount, _CPU_V1), _mounted(mount, _CPUACCT_V1)
        if controller is not None and accounting is not None:
            for group in _with_parents(controller, paths["cpu"]):
                found += _version_1(group, accounting / group.relative_to(controller))
    return min(found, key=lambda use: use.cores, default=None)


def _group_paths(file: Path) -> dict[str, str]:
    """The group of each version 1 controller, and under the empty name that of version 2."""
    if not file.exists():
        return {}
    paths: dict[str, str] = {}
    for line in file.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    return paths


def _mounted(mount: Path, names: tuple[str, ...]) -> Path | None:
    return next((mount / name for name in names if (mount / name).is_dir()), None)


def _with_parents(mount: Path, path: str) -> Iterator[Path]:
    """The group and those around it, whose quotas bound it too.

    In a container, the path may be the host's, while the mount shows only the container's group.
    """
    group = mount / path.strip("/")
    while True:
        if group.is_dir():
            yield group
        if group == mount:
            return
        group = group.parent


def _version_2(group: Path) -> Iterator[QuotaUse]:
    limit = group / "cpu.max"
    # The root group has none.
    if not limit.exists():
        return
    quota, period = limit.read_text().split()
    if quota == "max":
        return
    counters = _counters(group / "cpu.stat")
    used = counters.get("usage_usec")
    if used is None:
        return
    yield QuotaUse(
        group,
        int(quota) / int(period),
        used / _MICROSECONDS,
        counters.get("nr_periods", 0),
        counters.get("nr_throttled", 0),
    )


def _version_1(group: Path, accounting: Path) -> Iterator[QuotaUse]:
    limit, usage = group / "cpu.cfs_quota_us", accounting / "cpuacct.usage"
    if not limit.exists() or not usage.exists():
        return
    quota = int(limit.read_text())
    if quota < 0:
        return
    counters = _counters(group / "cpu.stat")
    yield QuotaUse(
        group,
        quota / int((group / "cpu.cfs_period_us").read_text()),
        int(usage.read_text()) / _NANOSECONDS,
        counters.get("nr_periods", 0),
        counters.get("nr_throttled", 0),
    )


def _counters(file: Path) -> dict[str, int]:
    """A flat keyed file: one name and number a line."""
    pairs = (line.split() for line in file.read_text().splitlines())
    return {name: int(number) for name, number in pairs}
