"""Each row of the readiness table: it holds, it fails, or it is unknown if the server hides it."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.application.readiness.conditions import ROWS, Disk, Facts, Severity
from reservation.application.readiness.evaluation import TRUSTABLE, check_trusted_names, judge
from reservation.application.readiness.permissions import (
    EXCESSIVE,
    NEEDED,
    dry_runs,
    needed,
    refused,
)
from reservation.application.readiness.sale_conditions import SALE_ROWS
from reservation.config.settings import SettingsError

ROOT = Path(__file__).resolve().parents[3]
MB = 1024 * 1024

#: A server as `deploy/valkey.conf` configures it, with one replica that writes wait for.
WELL = Facts(
    info={
        "redis_version": "7.2.4",
        "valkey_version": "8.1.3",
        "run_id": "abc",
        "aof_enabled": "1",
        "aof_last_write_status": "ok",
        "aof_last_bgrewrite_status": "ok",
        "aof_current_size": str(200 * MB),
        "rdb_last_bgsave_status": "ok",
        "loading": "0",
        "used_memory": "700",
        "maxmemory": "1000",
        "maxmemory_policy": "noeviction",
        "evicted_keys": "0",
        "role": "master",
        "connected_slaves": "1",
        "slave0": "ip=a,port=1,state=online,offset=1,lag=0",
        "min_slaves_good_slaves": "1",
        "master_failover_state": "no-failover",
        "cluster_enabled": "0",
    },
    config={
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "maxmemory-policy": "noeviction",
        "min-replicas-to-write": "1",
        "min-replicas-max-lag": "1",
        "dir": "/data",
    },
    user="reservation",
    lacking=(),
    excessive=(),
    scripts=True,
    client_retries=0,
    clock_offset_ms=-499,
    clock_jumped=False,
    round_trip_ms=1.0,
    sync_ms=10.0,
    redis_disk=Disk(total=2000 * MB, free=400 * MB),
    sql_disk=Disk(total=2000 * MB, free=400 * MB),
    production=True,
    unix_socket=False,
)


def with_facts(
    info: dict[str, str | None] | None = None,
    config: dict[str, str | None] | None = None,
    **more: Any,
) -> Facts:
    """A healthy server with these changes; None removes a fact."""
    return msgspec.structs.replace(
        WELL,
        info=_changed(WELL.info, info or {}),
        config=_changed(WELL.config or {}, config or {}),
        **more,
    )


def _changed(given: Any, changes: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


#: Row -> facts that break it, one or several.
BROKEN: dict[str, list[Facts]] = {
    "client-retries": [with_facts(client_retries=1)],
    "redis-version": [with_facts({"valkey_version": None, "redis_version": "6.2.18"})],
    "redis-version-broken": [
        with_facts({"valkey_version": None}),
        with_facts({"valkey_version": None, "redis_version": "8.6.2"}),
    ],
    "redis-scripts": [with_facts(scripts=False)],
    "redis-append-only-file": [with_facts({"aof_enabled": "0"})],
    "redis-last-write": [with_facts({"aof_last_write_status": "err"})],
    "redis-last-rewrite": [with_facts({"aof_last_bgrewrite_status": "err"})],
    "redis-last-snapshot": [with_facts({"rdb_last_bgsave_status": "err"})],
    "redis-fsync-policy": [with_facts(config={"appendfsync": "everysec"})],
    "redis-fsync-on-rewrite": [with_facts(config={"no-appendfsync-on-rewrite": "yes"})],
    "redis-eviction-policy": [
        with_facts({"maxmemory_policy": "allkeys-lru"}),
        with_facts({"maxmemory_policy": None}, {"maxmemory-policy": "volatile-ttl"}),
    ],
    "redis-evicted": [with_facts({"evicted_keys": "1"})],
    "redis-maxmemory": [with_facts({"maxmemory": "0"})],
    "redis-memory": [with_facts({"used_memory": "851"})],
    "redis-memory-high": [with_facts({"used_memory": "751"})],
    "redis-loading": [with_facts({"loading": "1"})],
    "redis-master": [with_facts({"role": "slave"})],
    "redis-failover": [with_facts({"master_failover_state": "waiting-for-sync"})],
    "redis-cluster": [with_facts({"cluster_enabled": "1"})],
    "redis-replicas": [with_facts({"min_slaves_good_slaves": "0"})],
    "redis-replicas-unbound": [
        with_facts(config={"min-replicas-to-write": "0"}),
        with_facts(config={"min-replicas-max-lag": "10"}),
        with_facts(config={"min-replicas-max-lag": "0"}),
    ],
    "redis-ack-replicas": [
        with_facts(ack_replicas=1, acks_short=True),
        with_facts({"slave0": "ip=a,port=1,state=wait_bgsave"}, ack_replicas=1),
        with_facts({"connected_slaves": "0", "slave0": None}, ack_replicas=1),
        with_facts(ack_replicas=2),
    ],
    "redis-ack-election": [with_facts({"slave1": "ip=b,state=online"}, ack_replicas=1)],
    "redis-replica-priorities": [with_facts(ack_replicas=1, priorities=(100, 0))],
    "redis-clock": [with_facts(clock_offset_ms=500), with_facts(clock_offset_ms=-500)],
    "redis-clock-jumped": [with_facts(clock_jumped=True)],
    "redis-slow": [with_facts(round_trip_ms=101.0)],
    "redis-sync-slow": [with_facts(sync_ms=10.1)],
    "redis-user": [with_facts(user="default"), with_facts(excessive=("FLUSHALL",))],
    "redis-rights": [with_facts(lacking=("XADD",))],
    "redis-disk": [
        with_facts(redis_disk=Disk(total=400 * MB, free=399 * MB)),
        with_facts({"aof_current_size": "1"}, redis_disk=Disk(total=100 * MB, free=63 * MB)),
    ],
    "redis-disk-low": [with_facts(redis_disk=Disk(total=2001 * MB, free=400 * MB))],
    "sql-disk": [with_facts(sql_disk=Disk(total=2000 * MB, free=63 * MB))],
}
#: Row -> the facts reported by a server that hides its value.
HIDDEN: dict[str, Facts] = {
    "redis-version": with_facts({"valkey_version": None, "redis_version": None}),
    "redis-version-broken": with_facts({"valkey_version": None, "redis_version": "unstable"}),
    "redis-scripts": with_facts(scripts=None),
    "redis-run-id": with_facts({"run_id": ""}),
    "redis-append-only-file": with_facts({"aof_enabled": None}),
    "redis-last-write": with_facts({"aof_last_write_status": None}),
    "redis-last-rewrite": with_facts({"aof_last_bgrewrite_status": None}),
    "redis-last-snapshot": with_facts({"rdb_last_bgsave_status": None}),
    "redis-fsync-policy": msgspec.structs.replace(WELL, config=None),
    "redis-fsync-on-rewrite": msgspec.structs.replace(WELL, config=None),
    "redis-eviction-policy": with_facts({"maxmemory_policy": None}, {"maxmemory-policy": None}),
    "redis-evicted": with_facts({"evicted_keys": None}),
    "redis-maxmemory": with_facts({"maxmemory": None}),
    "redis-memory": with_facts({"used_memory": None}),
    "redis-memory-high": with_facts({"used_memory": None}),
    "redis-loading": with_facts({"loading": None}),
    "redis-master": with_facts({"role": None}),
    "redis-failover": with_facts({"master_failover_state": None}),
    "redis-cluster": with_facts({"cluster_enabled": None}),
    "redis-replicas": with_facts({"min_slaves_good_slaves": None}),
    "redis-replicas-unbound": msgspec.structs.replace(WELL, config=None),
    "redis-ack-replicas": with_facts({"connected_slaves": None}, ack_replicas=1),
    "redis-ack-election": with_facts({"connected_slaves": None}, ack_replicas=1),
    "redis-replica-priorities": with_facts(ack_replicas=1, priorities=None),
    "redis-user": with_facts(excessive=None, user=None),
    "redis-rights": with_facts(lacking=None),
}
#: Measured by the service or on this machine: no server can hide them.
MEASURED = {
    "client-retries", "redis-clock", "redis-clock-jumped", "redis-slow", "redis-sync-slow",
    "redis-disk", "redis-disk-low", "sql-disk",
}  # fmt: skip
NAMES = [row.name for row in ROWS]
ROW = {row.name: row for row in ROWS}


def test_a_sound_server_meets_each_condition() -> None:
    found = judge(WELL, trusted=())
    assert found == type(found)()


def test_the_test_covers_each_condition() -> None:
    assert {*BROKEN, "redis-run-id"} == set(NAMES)
    assert set(HIDDEN) | MEASURED == set(NAMES)
    assert not set(HIDDEN) & MEASURED


@pytest.mark.parametrize(
    ("name", "facts"), [(name, facts) for name, some in BROKEN.items() for facts in some]
)
def test_an_unmet_condition_is_reported_by_name(name: str, facts: Facts) -> None:
    found = judge(facts, trusted=())
    severity = ROW[name].severity
    assert name in (found.warnings if severity is Severity.WARN else found.missing)
    assert any(sentences.startswith(f"{name}: ") for sentences in found.stops) is (
        severity is Severity.STOP
    )
    assert f"{name}:unknown" not in found.missing


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_facts_count_as_unmet_conditions(name: str) -> None:
    found = judge(HIDDEN[name], trusted=())
    severity = ROW[name].severity
    sentences = found.warnings if severity is Severity.WARN else found.missing
    assert f"{name}:unknown" in sentences
    assert name not in sentences
    hidden = [
        sentences
        for sentences in found.stops
        if sentences.startswith(f"{name}: the server does not show")
    ]
    assert len(hidden) == (severity is Severity.STOP)


@pytest.mark.parametrize("name", sorted(TRUSTABLE & HIDDEN.keys()))
def test_a_hidden_condition_can_be_waived_by_an_operator(name: str) -> None:
    found = judge(HIDDEN[name], trusted=(name,))
    assert name in found.trusted
    assert not [
        sentences
        for sentences in (*found.missing, *found.warnings)
        if sentences.startswith(f"{name}:")
    ]
    assert not [sentences for sentences in found.stops if sentences.startswith(f"{name}:")]


@pytest.mark.parametrize("name", sorted(TRUSTABLE & BROKEN.keys()))
def test_only_two_conditions_can_be_waived_if_measured_as_unmet(
    name: str,
) -> None:
    waived = [name in judge(facts, trusted=(name,)).trusted for facts in BROKEN[name]]
    assert set(waived) == {name in ("redis-fsync-policy", "redis-user")}


def test_a_met_condition_is_not_listed_as_waived() -> None:
    assert judge(WELL, trusted=sorted(TRUSTABLE)).trusted == ()


@pytest.mark.parametrize(
    "name", ["noeviction", "redis-clock", "redis-scripts", "sql-disk", "client-retries"]
)
def test_unknown_or_mandatory_conditions_cannot_be_waived(name: str) -> None:
    with pytest.raises(SettingsError, match=f"RESERVATION_REDIS_TRUST has {name}; allowed: .*user"):
        check_trusted_names(["redis-user", name])


@pytest.mark.parametrize("facts", [with_facts(unix_socket=True), with_facts(production=False)])
def test_the_default_user_is_accepted_on_a_socket_and_in_development(facts: Facts) -> None:
    as_default = msgspec.structs.replace(facts, user="default", excessive=("FLUSHALL",))
    assert judge(as_default, trusted=()).missing == ()


def test_a_condition_lists_the_excessive_permissions() -> None:
    (sentences,) = judge(with_facts(excessive=("FLUSHALL", "KEYS")), trusted=()).stops
    assert sentences.endswith(": FLUSHALL, KEYS")


def test_a_server_without_replicas_needs_no_min_replicas() -> None:
    alone = with_facts(
        {"connected_slaves": "0", "min_slaves_good_slaves": None},
        {"min-replicas-to-write": "0", "min-replicas-max-lag": "10"},
    )
    assert judge(alone, trusted=()).missing == ()
    assert judge(alone, trusted=()).warnings == ()


def test_the_disk_of_a_remote_server_is_not_checked() -> None:
    found = judge(with_facts(redis_disk=None, sql_disk=None), trusted=())
    assert (found.missing, found.warnings) == ((), ())


def test_the_permission_check_covers_each_command_of_the_scripts() -> None:
    used: set[str] = set()
    for path in (ROOT / "scripts/lua").rglob("*.lua"):
        if path.parent.name != "ops":
            used |= set(re.findall(r"""redis\.call\(\s*["']([A-Z]+)["']""", path.read_text()))
    assert len(used) > 10
    assert used - {command[0] for command in NEEDED} == set()


def test_permissions_are_read_from_acl_dryrun_replies() -> None:
    asked = dry_runs("me", "rsv:{x}:sale", NEEDED)
    assert asked[0] == ("ACL", "DRYRUN", "me", "PING")
    assert ("ACL", "DRYRUN", "me", "GET", "rsv:{x}:sale") in asked
    no = "User me has no permissions to run the command"
    allowed, excessive = ["OK"] * len(NEEDED), [no] * len(EXCESSIVE)
    assert refused([*allowed, *excessive], NEEDED) == ((), ())
    assert refused([no, *allowed[1:], *excessive[1:], "OK"], NEEDED) == (("PING",), ("SHUTDOWN",))
    assert refused([None, *allowed[1:], *excessive], NEEDED) is None


def test_replicas_and_a_cluster_need_further_permissions() -> None:
    plain = set(needed(waits=False, in_cluster=False))
    assert plain == set(NEEDED)
    assert {parts[0] for parts in set(needed(waits=True, in_cluster=False)) - plain} == {"WAIT"}
    assert set(needed(waits=False, in_cluster=True)) - plain == {
        ("CLUSTER", "SHARDS"),
        ("CLUSTER", "INFO"),
    }


def test_the_runbook_lists_each_condition_of_the_code() -> None:
    """The code defines the meaning of a row; only the runbook gives the remedy."""
    does = {
        Severity.STOP: "closes, stops",
        Severity.CLOSE: "closes",
        Severity.WARN: "warns",
    }
    table = [(row.name, does[row.severity], row.means) for row in ROWS]
    table += [(name, "closes the sale", means) for name, means in SALE_ROWS.items()]
    runbook = (ROOT / "docs/operations.md").read_text()
    section = runbook.partition("\n## The preflight\n")[2].partition("\n## ")[0]
    sentences = re.findall(r"^\| `([a-z-]+)` \| (.+?) \| (.+?) \| (.+) \|$", section, re.MULTILINE)
    assert [(name, what, means) for name, what, means, _ in sentences] == table
