"""CPU time of a running service, by part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from reservation.adapters.redis.embedded.server import EmbeddedServer

__all__ = ["PARTS", "ServiceCpu"]

#: Parts whose CPU time counts: a sale in production has no sandbox, and the supervisor only waits.
PARTS: Final = ("api", "worker", "redis")
_REDIS_PROGRAMS: Final = ("valkey-server", "redis-server")


class ServiceCpu:
    """The processes of a service and its Valkey.

    Args:
        supervisor: of the service.
        valkey: its server, which runs.
    """

    def __init__(self, supervisor: psutil.Process, valkey: EmbeddedServer) -> None:
        if valkey.pid is None:
            raise RuntimeError("the Valkey server has ended")
        self._processes = {"redis": [psutil.Process(valkey.pid)], "api": [], "worker": []}
        for child in supervisor.children(recursive=True):
            role = _role_of(child.cmdline())
            if role in self._processes:
                self._processes[role].append(child)
        if not all(self._processes.values()):
            raise RuntimeError(f"not every part of the service runs: {self._processes}")

    def seconds(self) -> Mapping[str, float]:
        """Seconds of user and system time by part; raises where a process has ended."""
        seconds: dict[str, float] = {}
        for role, processes in self._processes.items():
            times = [one.cpu_times() for one in processes]
            seconds[role] = sum(one.user + one.system for one in times)
        return seconds


def _role_of(command: list[str]) -> str | None:
    """The part that a process is, by its command line: the layout of the code may differ."""
    names = [Path(word).name for word in command]
    if any(name in _REDIS_PROGRAMS for name in names):
        return "redis"
    return next((role for role in ("api", "worker") if role in command), None)
