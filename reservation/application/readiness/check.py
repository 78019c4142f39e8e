"""Health check of Redis and its machine, every 3 s: the preconditions of a hold.

    read     INFO, CONFIG, ACL, the server's clock, the disk
    judge    each row of the table against the facts read (`evaluation`, `conditions`)

A failed row closes prepare at most: existing orders continue. A fact that the server hides is
unknown and fails its row too, unless RESERVATION_REDIS_TRUST names it.
"""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from reservation.adapters.redis.client import ClockReading, RedisClient
from reservation.adapters.redis.errors import NotPermitted, UnexpectedReply, unwrap
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.mapping import as_mapping
from reservation.adapters.redis.scripts import all_scripts
from reservation.application.readiness.clock_skew import Clocks
from reservation.application.readiness.conditions import Disk, Facts
from reservation.application.readiness.evaluation import (
    STILL_LOADING,
    Findings,
    check_trusted_names,
    judge,
)
from reservation.application.readiness.permissions import dry_runs, refused
from reservation.config.settings import Settings
from reservation.domain.clock import Clock

__all__ = ["Findings", "Preflight", "disk_of"]

#: Readiness probes within this time share one check of the server.
FRESH_SECONDS: Final = 0.5

_SECTIONS: Final = (
    "server", "persistence", "memory", "stats", "replication", "cluster",
)  # fmt: skip
_SETTINGS: Final = (
    "appendfsync", "no-appendfsync-on-rewrite", "maxmemory-policy", "min-replicas-to-write",
    "min-replicas-max-lag", "dir",
)  # fmt: skip
#: The name of our key in the dry runs; it is never written.
_PROBE: Final = "preflight"


def disk_of(folder: Path) -> Disk | None:
    """The disk of a folder; None if this machine has no such folder that we may read."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return Disk(total=usage.total, free=usage.free)


class Preflight:
    """One process's health check of the server.

    Args:
        connections: to the server.
        keys: our key prefix, to which the ACL limits our user.
        settings: the trusted rows, and whether this is production.
        clock: measures the age of a check.
        disk: reads a folder's disk.

    Raises:
        SettingsError: a trusted name is no row, or is one that must be measured.
    """

    def __init__(
        self,
        connections: RedisClient,
        keys: Keys,
        settings: Settings,
        *,
        clock: Clock,
        disk: Callable[[Path], Disk | None] = disk_of,
    ) -> None:
        check_trusted_names(settings.redis_trust)
        self._connections = connections
        self._settings = settings
        self._probe_key = keys.of(_PROBE).sale
        self._clock = clock
        self._disk = disk
        self._checking = asyncio.Lock()
        self._found: Findings | None = None
        self._found_at = 0.0
        self.clocks = Clocks()

    async def check(self) -> Findings:
        """Check once.

        Raises:
            StoreUnavailable, StoreUncertain: the server does not answer.
        """
        async with self._checking:
            return await self._check()

    async def missing(self) -> tuple[str, ...]:
        """The failed rows that close prepare; raises as `check` does."""
        return (await self.check()).missing

    async def recent(self) -> Findings:
        """The findings of a moment ago, or of a new check; raises as `check` does."""
        async with self._checking:
            found = self._found
            if found is not None and self._clock.monotonic() - self._found_at < FRESH_SECONDS:
                return found
            return await self._check()

    async def measure_clocks(self) -> None:
        """Read only the clocks, for the workers that expire holds by them."""
        self.clocks.observe(await self._connections.read_clock())

    async def _check(self) -> Findings:
        self._found = None
        facts = await self._read()
        found = judge(facts, trusted=self._settings.redis_trust) if facts else STILL_LOADING
        self._found, self._found_at = found, self._clock.monotonic()
        return found

    async def _read(self) -> Facts | None:
        """The facts; None while the server is loading its file."""
        reading = await self._connections.read_clock()
        self.clocks.observe(reading)
        *infos, config, user, loaded = await self._connections.pipeline(
            [
                *(("INFO", section) for section in _SECTIONS),
                ("CONFIG", "GET", *_SETTINGS),
                ("ACL", "WHOAMI"),
                ("SCRIPT", "EXISTS", *(script.sha for script in all_scripts())),
            ]
        )
        info = _lines(infos)
        if info.get("loading") == "1":
            return None
        shown = _shown(config)
        settings = as_mapping(shown) if shown is not None else None
        name = _shown(user)
        rights = await self._rights(name) if name is not None else None
        scripts = await self._scripts(_shown(loaded))
        return self._facts(reading, info, settings, name, rights, scripts=scripts)

    def _facts(
        self,
        reading: ClockReading,
        info: dict[str, str],
        settings: dict[str, str] | None,
        user: str | None,
        rights: tuple[tuple[str, ...], tuple[str, ...]] | None,
        *,
        scripts: bool | None,
    ) -> Facts:
        return Facts(
            info=info,
            config=settings,
            user=user,
            lacking=rights[0] if rights else None,
            excessive=rights[1] if rights else None,
            scripts=scripts,
            client_retries=self._connections.client_retries,
            clock_offset_ms=self.clocks.offset_ms,
            clock_jumped=self.clocks.jumped,
            round_trip_ms=(reading.received - reading.sent) * 1000,
            redis_disk=self._redis_disk(settings),
            sql_disk=None if self._settings.database_url else self._disk(self._settings.data_dir),
            production=self._settings.production,
            unix_socket=self._connections.is_unix_socket,
        )

    async def _rights(self, user: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        replies = await self._connections.pipeline(dry_runs(user, self._probe_key))
        return refused([_shown(reply) for reply in replies])

    async def _scripts(self, loaded: Sequence[int] | None) -> bool | None:
        """Load the scripts that the server lacks; whether it accepts them."""
        if loaded is None:
            return None
        scripts = [script for script, there in zip(all_scripts(), loaded, strict=True) if not there]
        if not scripts:
            return True
        replies = await self._connections.pipeline(
            [("SCRIPT", "LOAD", script.source) for script in scripts]
        )
        return [script.sha for script in scripts] == [_shown(reply) for reply in replies]

    def _redis_disk(self, settings: dict[str, str] | None) -> Disk | None:
        if not settings or not self._connections.is_local:
            return None
        return self._disk(Path(settings.get("dir", "")))


def _shown(reply: Any) -> Any:
    """A reply; None if the server denies us this command.

    Raises:
        StoreUnavailable: a transient refusal.
    """
    if isinstance(reply, NotPermitted | UnexpectedReply):
        return None
    return unwrap(reply)


def _lines(infos: Sequence[Any]) -> dict[str, str]:
    info: dict[str, str] = {}
    for text in infos:
        for line in (_shown(text) or "").splitlines():
            name, colon, value = line.partition(":")
            if colon:
                info[name] = value
    return info
