"""The preconditions of a hold as a table, one row per condition: pure, no I/O."""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final

import msgspec

__all__ = ["ROWS", "Disk", "Facts", "Row", "Severity"]

#: Shares of maxmemory: above the first the server is filling up, above the second prepare closes.
MEMORY_SHARE_HIGH: Final = 0.75
MEMORY_SHARE_MAX: Final = 0.85
#: Free share of a disk below which operators are warned.
DISK_SHARE_LOW: Final = 0.2
#: A rewrite of the append-only file writes a second file while the old one grows.
DISK_FILES_MIN: Final = 2
#: With less than this the disk counts as full, however small the file is: a minute of events of a
#: sale at full speed.
DISK_BYTES_MIN: Final = 64 * 1024 * 1024
#: Clock skew between Redis and us at which the windows and deadlines that we report are wrong.
CLOCK_MS_MAX: Final = 500
#: A slow round trip; on a quiet network it takes a thousandth of this.
ROUND_TRIP_MS_MAX: Final = 100
#: A longer sync of the append-only file limits the holds a second of a sale.
SYNC_MS_MAX: Final = 10
#: The oldest server with the features that we need (`#!lua`, flags, ACL DRYRUN).
VERSION_MIN: Final = (7, 0, 0)
#: The first Redis version with a memory error that a client can reach (CVE-2026-23479), and the
#: first with the fix. A distribution may have backported the fix under an old number.
VERSION_BROKEN: Final = ((7, 2, 0), (8, 6, 3))
#: Replication lag in seconds that `min-replicas-max-lag` may allow.
REPLICA_LAG_MAX: Final = 1


class Severity(StrEnum):
    """The effect of a failed row."""

    #: Closes prepare; in production the service does not even start (exit status 78).
    STOP = "stop"
    #: Closes prepare; existing orders continue.
    CLOSE = "close"
    #: Is reported, and closes nothing.
    WARN = "warn"


class Disk(msgspec.Struct, frozen=True):
    """A file system's bytes."""

    total: int
    free: int


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one check; None if the server hides a fact."""

    info: Mapping[str, str]
    config: Mapping[str, str] | None
    #: The ACL user that we are.
    user: str | None
    #: Commands that we need and may not use, and dangerous ones that we may use.
    lacking: tuple[str, ...] | None
    excessive: tuple[str, ...] | None
    #: Whether every script of this release is loaded.
    scripts: bool | None
    #: How often the client library would retry a command by itself.
    client_retries: int
    #: Redis' clock minus ours, less the uncertainty, and whether either has jumped recently.
    clock_offset_ms: int
    clock_jumped: bool
    round_trip_ms: float
    #: A write that the server syncs before it answers; None if it was not measured.
    sync_ms: float | None = None
    #: The disk of the append-only file; None if it is on another machine.
    redis_disk: Disk | None
    #: The disk of SQLite; None with PostgreSQL.
    sql_disk: Disk | None
    production: bool
    #: Whether the server listens on a unix socket, whose directory controls the access.
    unix_socket: bool
    #: Whether the server is reached as a master of a cluster.
    in_cluster: bool = False
    #: Replicas that must acknowledge a change, and whether too few did so last.
    ack_replicas: int = 0
    acks_short: bool = False
    #: The replicas' priorities as the sentinels have them; None if they hide them.
    priorities: tuple[int, ...] | None = ()

    def setting(self, name: str) -> str | None:
        """One of the server's settings."""
        return self.config.get(name) if self.config is not None else None

    @property
    def replicas(self) -> int | None:
        """The attached replicas that receive each change; None if the server hides them."""
        if self.number("connected_slaves") is None:
            return None
        return sum(
            name[:5] == "slave" and name[5:].isdecimal() and "state=online" in text
            for name, text in self.info.items()
        )

    def number(self, name: str) -> int | None:
        """A number out of INFO."""
        text = self.info.get(name, "")
        return int(text) if text.isdecimal() else None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One condition."""

    #: The name shown in /health/ready and documented in docs/operations.md.
    name: str
    severity: Severity
    #: The meaning of a failure, in one line.
    means: str
    #: Whether it holds; None if the server hides it.
    holds: Callable[[Facts], bool | None]
    #: Whether RESERVATION_REDIS_TRUST may override a visible failure of it.
    waivable: bool = False


def _info(name: str, value: str) -> Callable[[Facts], bool | None]:
    def holds(facts: Facts) -> bool | None:
        found = facts.info.get(name)
        return None if found is None else found == value

    return holds


def _config(name: str, value: str) -> Callable[[Facts], bool | None]:
    def holds(facts: Facts) -> bool | None:
        found = facts.setting(name)
        return None if found is None else found == value

    return holds


def _below(share: float) -> Callable[[Facts], bool | None]:
    def holds(facts: Facts) -> bool | None:
        used, limit = facts.number("used_memory"), facts.number("maxmemory")
        if used is None or limit is None:
            return None
        return limit == 0 or used <= share * limit

    return holds


def _memory_is_bounded(facts: Facts) -> bool | None:
    limit = facts.number("maxmemory")
    return None if limit is None else limit > 0


def _policy_keeps_all(facts: Facts) -> bool | None:
    policy = facts.info.get("maxmemory_policy") or facts.setting("maxmemory-policy")
    return None if policy is None else policy == "noeviction"


def _version(facts: Facts) -> tuple[int, ...] | None:
    valkey = facts.info.get("valkey_version")
    parts = (valkey or facts.info.get("redis_version", "")).split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else None


def _version_is_new_enough(facts: Facts) -> bool | None:
    version = _version(facts)
    return None if version is None else version >= VERSION_MIN


def _version_is_sound(facts: Facts) -> bool | None:
    version = _version(facts)
    if version is None:
        return None
    first, repaired = VERSION_BROKEN
    return "valkey_version" in facts.info or not first <= version < repaired


def _matches_its_address(facts: Facts) -> bool | None:
    enabled = facts.info.get("cluster_enabled")
    return None if enabled is None else enabled == ("1" if facts.in_cluster else "0")


def _replicas_are_there(facts: Facts) -> bool | None:
    wanted = facts.setting("min-replicas-to-write")
    if not (wanted or "").isdecimal() or int(wanted or 0) == 0:
        return True  # No replica is required; a hidden setting is another row's concern.
    good = facts.number("min_slaves_good_slaves")
    return None if good is None else good >= int(wanted or 0)


def _replicas_are_bound(facts: Facts) -> bool | None:
    if not facts.number("connected_slaves"):
        return True
    wanted, lag = facts.setting("min-replicas-to-write"), facts.setting("min-replicas-max-lag")
    if wanted is None or lag is None:
        return None
    return int(wanted) >= 1 and 0 < int(lag) <= REPLICA_LAG_MAX


def _replicas_acknowledge(facts: Facts) -> bool | None:
    if not facts.ack_replicas:
        return True
    if facts.acks_short:
        return False
    return None if facts.replicas is None else facts.replicas >= facts.ack_replicas


def _acks_bind_the_election(facts: Facts) -> bool | None:
    if not facts.ack_replicas:
        return True
    return None if facts.replicas is None else facts.replicas <= facts.ack_replicas


def _priorities_are_equal(facts: Facts) -> bool | None:
    if not facts.ack_replicas:
        return True
    return None if facts.priorities is None else len(set(facts.priorities)) <= 1


def _user_is_bounded(facts: Facts) -> bool | None:
    if facts.unix_socket or not facts.production:
        return True
    if facts.user == "default":
        return False
    return None if facts.excessive is None else not facts.excessive


def _rights_suffice(facts: Facts) -> bool | None:
    if facts.lacking is None:
        # Outside production the first refused command shows it soon enough.
        return None if facts.production else True
    return not facts.lacking


def _disk_takes_a_rewrite(facts: Facts) -> bool | None:
    if facts.redis_disk is None:
        return True
    size = facts.number("aof_current_size") or 0
    return facts.redis_disk.free >= max(DISK_BYTES_MIN, DISK_FILES_MIN * size)


def _disk_has_room(facts: Facts) -> bool | None:
    disk = facts.redis_disk
    return disk is None or disk.free >= DISK_SHARE_LOW * disk.total


def _sql_disk_has_room(facts: Facts) -> bool | None:
    return facts.sql_disk is None or facts.sql_disk.free >= DISK_BYTES_MIN


#: In the order in which they are reported.
ROWS: Final = (
    Row(
        name="client-retries",
        severity=Severity.STOP,
        means="the client library retries commands: a hold could be taken twice",
        holds=lambda facts: facts.client_retries == 0,
    ),
    Row(
        name="redis-version",
        severity=Severity.STOP,
        means="the server is older than Redis 7.0, which the scripts require",
        holds=_version_is_new_enough,
    ),
    Row(
        name="redis-version-broken",
        severity=Severity.WARN,
        means="this Redis version has a memory error that clients can trigger (CVE-2026-23479)",
        holds=_version_is_sound,
    ),
    Row(
        name="redis-scripts",
        severity=Severity.STOP,
        means="the server does not load this release's scripts",
        holds=lambda facts: facts.scripts,
    ),
    Row(
        name="redis-run-id",
        severity=Severity.CLOSE,
        means="the server does not report its run id: a restart would go undetected",
        holds=lambda facts: True if facts.info.get("run_id") else None,
    ),
    Row(
        name="redis-append-only-file",
        severity=Severity.STOP,
        means="the append-only file is off: a restart loses all data",
        holds=_info("aof_enabled", "1"),
    ),
    Row(
        name="redis-last-write",
        severity=Severity.STOP,
        means="the last write to the append-only file failed: the disk is full or broken",
        holds=_info("aof_last_write_status", "ok"),
    ),
    Row(
        name="redis-last-rewrite",
        severity=Severity.STOP,
        means="the last rewrite of the append-only file failed: it grows without bound",
        holds=_info("aof_last_bgrewrite_status", "ok"),
    ),
    Row(
        name="redis-last-snapshot",
        severity=Severity.WARN,
        means="the last snapshot failed: there is no current backup",
        holds=_info("rdb_last_bgsave_status", "ok"),
    ),
    Row(
        name="redis-fsync-policy",
        severity=Severity.CLOSE,
        means="appendfsync is not always: a power failure loses acknowledged holds",
        holds=_config("appendfsync", "always"),
        waivable=True,
    ),
    Row(
        name="redis-fsync-on-rewrite",
        severity=Severity.CLOSE,
        means="no-appendfsync-on-rewrite is on: nothing is synced while the file is rewritten",
        holds=_config("no-appendfsync-on-rewrite", "no"),
    ),
    Row(
        name="redis-eviction-policy",
        severity=Severity.STOP,
        means="maxmemory-policy is not noeviction: stock could be evicted",
        holds=_policy_keeps_all,
    ),
    Row(
        name="redis-evicted",
        severity=Severity.CLOSE,
        means="keys were evicted: stock may have been lost",
        holds=_info("evicted_keys", "0"),
    ),
    Row(
        name="redis-maxmemory",
        severity=Severity.CLOSE,
        means="maxmemory is not set: the system kills the server when memory runs out",
        holds=_memory_is_bounded,
    ),
    Row(
        name="redis-memory",
        severity=Severity.CLOSE,
        means="85 % of maxmemory is used: payments, releases and expiries need the rest",
        holds=_below(MEMORY_SHARE_MAX),
    ),
    Row(
        name="redis-memory-high",
        severity=Severity.WARN,
        means="75 % of maxmemory is used",
        holds=_below(MEMORY_SHARE_HIGH),
    ),
    Row(
        name="redis-loading",
        severity=Severity.CLOSE,
        means="the server is still loading its file",
        holds=_info("loading", "0"),
    ),
    Row(
        name="redis-master",
        severity=Severity.CLOSE,
        means="the server is a replica",
        holds=_info("role", "master"),
    ),
    Row(
        name="redis-failover",
        severity=Severity.CLOSE,
        means="the server is failing over to a replica",
        holds=_info("master_failover_state", "no-failover"),
    ),
    Row(
        name="redis-cluster",
        severity=Severity.CLOSE,
        means="the server is a cluster node, but its address is not a cluster's",
        holds=_matches_its_address,
    ),
    Row(
        name="redis-replicas",
        severity=Severity.CLOSE,
        means="fewer replicas are in sync than min-replicas-to-write requires: writes are refused",
        holds=_replicas_are_there,
    ),
    Row(
        name="redis-replicas-unbound",
        severity=Severity.WARN,
        means="the lag of the replicas is unbounded: a failover loses that much",
        holds=_replicas_are_bound,
    ),
    Row(
        name="redis-ack-replicas",
        severity=Severity.CLOSE,
        means="fewer replicas acknowledge changes than RESERVATION_REDIS_ACK_REPLICAS requires",
        holds=_replicas_acknowledge,
    ),
    Row(
        name="redis-ack-election",
        severity=Severity.WARN,
        means="more replicas are attached than must acknowledge a change: an election is not "
        "bound to choose one that has it",
        holds=_acks_bind_the_election,
    ),
    Row(
        name="redis-replica-priorities",
        severity=Severity.WARN,
        means="the replicas have different priorities: an election may choose one that lacks "
        "acknowledged changes",
        holds=_priorities_are_equal,
    ),
    Row(
        name="redis-clock",
        severity=Severity.CLOSE,
        means="the clocks of Redis and of the service differ by half a second or more",
        holds=lambda facts: abs(facts.clock_offset_ms) < CLOCK_MS_MAX,
    ),
    Row(
        name="redis-clock-jumped",
        severity=Severity.CLOSE,
        means="the clock of Redis or of the service has jumped within the last 15 s",
        holds=lambda facts: not facts.clock_jumped,
    ),
    Row(
        name="redis-slow",
        severity=Severity.WARN,
        means="a round trip to the server takes over 100 ms",
        holds=lambda facts: facts.round_trip_ms <= ROUND_TRIP_MS_MAX,
    ),
    Row(
        name="redis-sync-slow",
        severity=Severity.WARN,
        means="a synced write takes over 10 ms: the disk bounds the holds a second",
        holds=lambda facts: facts.sync_ms is None or facts.sync_ms <= SYNC_MS_MAX,
    ),
    Row(
        name="redis-user",
        severity=Severity.STOP,
        means="the service connects as the default user, or may flush, list or configure the "
        "server",
        holds=_user_is_bounded,
        waivable=True,
    ),
    Row(
        name="redis-rights",
        severity=Severity.CLOSE,
        means="the service's user lacks the permission for a required command",
        holds=_rights_suffice,
    ),
    Row(
        name="redis-disk",
        severity=Severity.CLOSE,
        means="the disk of the append-only file is too full for a rewrite",
        holds=_disk_takes_a_rewrite,
    ),
    Row(
        name="redis-disk-low",
        severity=Severity.WARN,
        means="less than a fifth of the append-only file's disk is free",
        holds=_disk_has_room,
    ),
    Row(
        name="sql-disk",
        severity=Severity.CLOSE,
        means="the disk of SQLite is full: no payment can start",
        holds=_sql_disk_has_room,
    ),
)
