"""CPU time of a running service, by part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from reservation.adapters.redis.embedded.server import EmbeddedServer

__all__ = ["PARTS", "ServiceCpu", "role_of"]

#: Parts whose CPU time counts: a sale in production has no sandbox, and the supervisor only waits.
PARTS: Final = ("api", "worker", "redis")
_ROLES: Final = ("api", "worker", "sandbox")
_REDIS_PROGRAMS: Final = ("valkey-server", "redis-server")


class ServiceCpu:
    """The processes of a service, its Valkey and its PostgreSQL.

    Args:
        supervisor: of the service.
        valkey: its server, which runs.
        sql: the first process of its PostgreSQL; None with SQLite, whose time is the service's.
    """

    def __init__(
        self, supervisor: psutil.Process, valkey: EmbeddedServer, sql: psutil.Process | None = None
    ) -> None:
        if valkey.pid is None:
            raise RuntimeError("the Valkey server has ended")
        self._processes = {"redis": [psutil.Process(valkey.pid)]} | {role: [] for role in _ROLES}
        self._sql = sql
        for child in supervisor.children(recursive=True):
            role = role_of(child.cmdline())
            if role in self._processes:
                self._processes[role].append(child)
        if not all(self._processes[role] for role in ("redis", "api", "worker")):
            raise RuntimeError(f"not every part of the service runs: {self._processes}")

    def seconds(self) -> Mapping[str, float]:
        """Seconds of user and system time by part; raises where a process has ended.

        The parts are `PARTS`, `sandbox` and `sql`, which is 0 with SQLite.
        """
        seconds: dict[str, float] = {"sql": 0.0 if self._sql is None else _postgres(self._sql)}
        for role, processes in self._processes.items():
            times = [one.cpu_times() for one in processes]
            seconds[role] = sum(one.user + one.system for one in times)
        return seconds


def _postgres(first: psutil.Process) -> float:
    """The server and its processes, those that have ended included."""
    seconds = 0.0
    for process in [first, *first.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
        if process == first:
            seconds += times.children_user + times.children_system
    return seconds


def role_of(command: list[str]) -> str | None:
    """The part of the service, by its process' command line: the layout of the code may differ."""
    names = [Path(word).name for word in command]
    if any(name in _REDIS_PROGRAMS for name in names):
        return "redis"
    return next((role for role in _ROLES if role in command), None)
