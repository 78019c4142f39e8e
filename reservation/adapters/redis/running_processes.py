"""The running processes of the installation, by their heartbeats, and its level in Redis."""

import re
from typing import Any, Final

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys
from reservation.domain.levels import LEVEL_OF_0_1_0

__all__ = ["RunningProcess", "RunningProcesses"]

#: Keys that one step of the scan reads.
_SCAN_KEYS: Final = 1_000


class RunningProcess(msgspec.Struct, frozen=True):
    """One process."""

    name: str
    role: str
    version: str
    #: The highest level that it supports.
    level: int

    def __str__(self) -> str:
        return f"{self.name} ({self.role}, version {self.version})"


class RunningProcesses:
    """Reads the heartbeats. It scans all keys of the server, so only operators' commands use it."""

    def __init__(self, connections: RedisClient, keys: Keys) -> None:
        self._connections = connections
        self._keys = keys

    async def all(self) -> list[RunningProcess]:
        """Every process whose heartbeat has not expired, by name."""
        prefix = self._keys.process("")
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", prefix) + "*"
        names: set[str] = set()
        await self._connections.know_servers()
        for node in self._connections.nodes:
            cursor: Any = "0"
            while True:
                cursor, found = await node.command(
                    "SCAN", cursor, "MATCH", pattern, "COUNT", _SCAN_KEYS
                )
                names.update(_text(key).removeprefix(prefix) for key in found)
                if _text(cursor) == "0":
                    break
        processes = [await self._read(name) for name in sorted(names)]
        return [process for process in processes if process is not None]

    async def _read(self, name: str) -> RunningProcess | None:
        role, version, level = await self._connections.command(
            "HMGET", self._keys.process(name), "role", "version", "level"
        )
        if role is None or version is None:
            return None  # It expired meanwhile.
        number = int(level) if level is not None else LEVEL_OF_0_1_0
        return RunningProcess(name, _text(role), _text(version), number)

    async def level(self) -> int:
        """The level in Redis; 0 if there is none."""
        return int(await self._connections.command("GET", self._keys.level) or 0)

    async def write_level(self, level: int) -> None:
        """Copy the level of SQL to Redis."""
        await self._connections.command("SET", self._keys.level, level)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
