"""CPU time of a running service, by component."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from reservation.adapters.redis.embedded.server import EmbeddedServer

__all__ = ["PARTS", "ServiceCpu", "role_of"]

#: Components whose CPU time counts. Production has no sandbox, and the supervisor is idle.
PARTS: Final = ("api", "worker", "redis")
_ROLES: Final = ("api", "worker", "sandbox")
_REDIS_PROGRAMS: Final = ("valkey-server", "redis-server")


class ServiceCpu:
    """The processes of a service, its Valkey and its PostgreSQL.

    Args:
        supervisor: the process of `reservation serve`.
        valkey: the running server.
        sql: the postmaster of its PostgreSQL; None with SQLite, which runs inside the service.
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
            raise RuntimeError(f"a component of the service is not running: {self._processes}")

    def seconds(self) -> Mapping[str, float]:
        """Seconds of user and system time by component: `PARTS`, `sandbox` and `sql`.

        `sql` is 0 with SQLite.

        Raises:
            psutil.NoSuchProcess: a process has ended.
        """
        seconds: dict[str, float] = {"sql": 0.0 if self._sql is None else _postgres(self._sql)}
        for role, processes in self._processes.items():
            times = [one.cpu_times() for one in processes]
            seconds[role] = sum(one.user + one.system for one in times)
        return seconds


def _postgres(first: psutil.Process) -> float:
    """CPU seconds of the postmaster and its child processes, including ended ones."""
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
    """The component that a process runs, from its command line; the module path may differ."""
    names = [Path(word).name for word in command]
    if any(name in _REDIS_PROGRAMS for name in names):
        return "redis"
    return next((role for role in _ROLES if role in command), None)
