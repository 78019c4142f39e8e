"""Health check of Redis and its machine, every 3 s: the preconditions of a hold.

    read     INFO, CONFIG, ACL, the server's clock, the disk
    judge    each row of the table against the facts read (`evaluation`, `conditions`)

A failed row closes prepare at most: existing orders continue. A fact that the server hides is
unknown and fails its row too, unless RESERVATION_REDIS_TRUST names it.
"""

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from reservation.adapters.redis.client import ClockReading, RedisClient
from reservation.adapters.redis.errors import (
    NotPermitted,
    StoreUnavailable,
    StoreUncertain,
    UnexpectedReply,
    unwrap,
)
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
from reservation.application.readiness.permissions import dry_runs, needed, refused
from reservation.application.readiness.sync_time import SyncTimes
from reservation.config.settings import Settings
from reservation.domain.alarms import Alarm
from reservation.domain.clock import Clock
from reservation.telemetry.metrics import alarm

__all__ = ["Findings", "Preflight", "disk_of"]

log = structlog.get_logger(__name__)

#: Time-out of the check of one master of a cluster.
NODE_SECONDS_MAX: Final = 1.5
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
    """The health check of one process for the server, or for each master of a cluster.

    Args:
        connections: to the servers.
        keys: our key prefix, to which the ACL limits our user.
        settings: the trusted rows, and whether this is production.
        clock: measures the age of a check.
        disk: reads a folder's disk.

    Raises:
        SettingsError: a trusted name is not a row, or is one that must be measured.
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
        self._sync_times = SyncTimes(connections, keys.sync, clock=clock)
        self._clock = clock
        self._disk = disk
        self._checking = asyncio.Lock()
        self._found: Findings | None = None
        self._found_at = 0.0
        self.clocks = Clocks()
        #: In a cluster, the check of each master, and its failed rows that close prepare.
        self._of_nodes: dict[str, _ServerPreflight] = {}
        self._missing_at: dict[str, tuple[str, ...]] = {}
        self._reported: tuple[str, ...] = ()

    async def check(self) -> Findings:
        """Check once.

        Raises:
            StoreUnavailable, StoreUncertain: no server answers.
        """
        async with self._checking:
            return await self._check()

    async def missing(self) -> tuple[str, ...]:
        """The failed rows that close prepare in every sale; raises as `check` does."""
        found = await self.check()
        return () if self._connections.is_cluster else found.missing

    def missing_at(self, sale_id: str) -> tuple[str, ...]:
        """In a cluster, the failed rows of the sale's master that close prepare."""
        if not self._connections.is_cluster:
            return ()
        node = self._connections.node_of(sale_id)
        return ("redis-cluster-slots",) if node is None else self._missing_at.get(node.identity, ())

    async def recent(self) -> Findings:
        """The findings of a moment ago, or of a new check; raises as `check` does."""
        async with self._checking:
            found = self._found
            if found is not None and self._clock.monotonic() - self._found_at < FRESH_SECONDS:
                return found
            return await self._check()

    async def measure_clocks(self) -> None:
        """Read only the clocks, for the workers that expire holds by them."""
        if not self._connections.is_cluster:
            self.clocks.observe(await self._connections.read_clock())
            return
        await self._connections.read_clock()
        checks = self._by_node()
        await asyncio.gather(
            *(check.measure_clocks() for check in checks.values()), return_exceptions=True
        )
        # The offset of this process is that of the master that differs most.
        by_offset = sorted(
            (check.clocks for check in checks.values()),
            key=lambda clocks: (clocks.may_expire, -abs(clocks.offset_ms)),
        )
        self.clocks = by_offset[0]

    def clocks_of(self, sale_id: str) -> Clocks:
        """The clocks of this process and the sale's server."""
        node = self._connections.node_of(sale_id) if self._connections.is_cluster else None
        return self.clocks if node is None else self._by_node()[node.identity].clocks

    async def _check(self) -> Findings:
        self._found = None
        if self._connections.is_cluster:
            found = await self._check_nodes()
        else:
            found = await self._server(self._connections).check(self.clocks)
        self._found, self._found_at = found, self._clock.monotonic()
        return found

    def _report(self, missing: tuple[str, ...]) -> None:
        if missing and missing != self._reported:
            alarm(Alarm.PREFLIGHT, missing=", ".join(missing))
        if self._reported and not missing:
            log.info("preflight_passed")
        self._reported = missing

    def _server(self, node: RedisClient) -> "_ServerPreflight":
        return _ServerPreflight(node, self._probe_key, self._settings, self._disk, self._sync_times)

    def _by_node(self) -> "dict[str, _ServerPreflight]":
        """The check of each master, created for a new one."""
        self._of_nodes = {
            node.identity: self._of_nodes.get(node.identity) or self._server(node)
            for node in self._connections.nodes
        }
        for node in self._connections.nodes:
            self._of_nodes[node.identity].connections = node
        return self._of_nodes

    async def _check_nodes(self) -> Findings:
        """Check each master; the name of a failed row ends with its address."""
        # Reads the slots if they are unknown.
        await self._connections.read_clock()
        checks = self._by_node()
        results = await asyncio.gather(
            *(check.check_in_time() for check in checks.values()), return_exceptions=True
        )
        missing: list[str] = []
        warnings: list[str] = []
        trusted: list[str] = []
        stops: list[str] = []
        self._missing_at = {}
        for check, result in zip(checks.values(), results, strict=True):
            node = check.connections
            away = isinstance(result, StoreUnavailable | StoreUncertain | TimeoutError)
            node.note_away(away=away)
            if away:
                found = Findings(missing=("redis",))
            elif isinstance(result, BaseException):
                raise result
            else:
                found = result
            self._missing_at[node.identity] = found.missing
            missing += [f"{row}@{node.name}" for row in found.missing]
            warnings += [f"{row}@{node.name}" for row in found.warnings]
            trusted += [row for row in found.trusted if row not in trusted]
            stops += [f"{node.name}: {reason}" for reason in found.stops]
        if self._connections.uncovered_slots:
            missing.append("redis-cluster-slots")
        if not self._connections.is_ok:
            missing.append("redis-cluster-state")
        if len({check.version for check in checks.values()} - {""}) > 1:
            warnings.append("redis-cluster-versions")
        self._report(tuple(missing))
        return Findings(
            missing=tuple(missing),
            warnings=tuple(warnings),
            trusted=tuple(trusted),
            stops=tuple(stops),
        )


class _ServerPreflight:
    """The check of one server.

    Args:
        connections: to the server.
        probe_key: a key of ours, for the dry runs.
        settings, disk: as `Preflight` has them.
        sync_times: of all servers.
    """

    def __init__(
        self,
        connections: RedisClient,
        probe_key: str,
        settings: Settings,
        disk: Callable[[Path], Disk | None],
        sync_times: SyncTimes,
    ) -> None:
        self.connections = connections
        self.clocks = Clocks()
        #: The server's program and version; empty while unknown.
        self.version = ""
        self._probe_key = probe_key
        self._settings = settings
        self._disk = disk
        self._sync_times = sync_times

    @property
    def _connections(self) -> RedisClient:
        return self.connections

    async def check(self, clocks: Clocks) -> Findings:
        """Check once; raises as `Preflight.check` does."""
        self.clocks = clocks
        facts = await self._read()
        return judge(facts, trusted=self._settings.redis_trust) if facts else STILL_LOADING

    async def check_in_time(self) -> Findings:
        """Check once; a server that hangs does not delay the check of the others."""
        async with asyncio.timeout(NODE_SECONDS_MAX):
            return await self.check(self.clocks)

    async def measure_clocks(self) -> None:
        """Read only the clocks."""
        self.clocks.observe(await self.connections.read_clock())

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
        self.version = _version_in(info)
        shown = _shown(config)
        settings = as_mapping(shown) if shown is not None else None
        name = _shown(user)
        rights = await self._rights(name) if name is not None else None
        scripts = await self._scripts(_shown(loaded))
        priorities = await self._priorities()
        facts = self._facts(
            reading, info, settings, name, rights, scripts=scripts, priorities=priorities
        )
        if facts.setting("appendfsync") == "always":
            sync_ms = await self._sync_times.of(self._connections, reading.run_id)
            facts = msgspec.structs.replace(facts, sync_ms=sync_ms)
        acks, replicas = self._connections.acks, facts.replicas
        if replicas is not None and replicas < acks.asked:
            if acks.is_open:
                # No batch has to find it out.
                acks.fall_short()
            return msgspec.structs.replace(facts, acks_short=True)
        return facts

    async def _priorities(self) -> tuple[int, ...] | None:
        """The replicas' priorities; empty if no replica must acknowledge a change."""
        if not self._connections.acks.wanted:
            return ()
        return await self._connections.replica_priorities()

    def _facts(
        self,
        reading: ClockReading,
        info: dict[str, str],
        settings: dict[str, str] | None,
        user: str | None,
        rights: tuple[tuple[str, ...], tuple[str, ...]] | None,
        *,
        scripts: bool | None,
        priorities: tuple[int, ...] | None,
    ) -> Facts:
        acks = self._connections.acks
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
            in_cluster=bool(self._connections.identity),
            ack_replicas=acks.wanted,
            acks_short=acks.is_short,
            priorities=priorities,
        )

    async def _rights(self, user: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        commands = needed(
            waits=self._connections.acks.wanted > 0, in_cluster=bool(self._connections.identity)
        )
        replies = await self._connections.pipeline(dry_runs(user, self._probe_key, commands))
        return refused([_shown(reply) for reply in replies], commands)

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


def _version_in(info: Mapping[str, str]) -> str:
    """The server's program and version; empty if it hides them."""
    # Valkey also reports the version of Redis with which it is compatible.
    valkey = info.get("valkey_version")
    return f"valkey {valkey}" if valkey else info.get("redis_version", "")
