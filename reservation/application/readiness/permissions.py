"""The ACL permissions that our Redis user needs, and those that it must not have."""

from collections.abc import Sequence
from typing import Final

__all__ = ["EXCESSIVE", "NEEDED", "dry_runs", "needed", "refused"]

#: Placeholder for one of our keys.
_KEY: Final = "{key}"

#: Every command that the service and its scripts send, with arguments that the server can parse.
NEEDED: Final[tuple[tuple[str, ...], ...]] = (
    ("PING",),
    ("TIME",),
    ("INFO", "server"),
    ("EVALSHA", "sha", "1", _KEY),
    ("SCRIPT", "LOAD", "text"),
    ("SCRIPT", "EXISTS", "sha"),
    ("SCAN", "0"),
    ("GET", _KEY),
    ("SET", _KEY, "1"),
    ("DEL", _KEY),
    ("UNLINK", _KEY),
    ("EXISTS", _KEY),
    ("EXPIRE", _KEY, "1"),
    ("SADD", _KEY, "a"),
    ("SMEMBERS", _KEY),
    ("HGET", _KEY, "a"),
    ("HMGET", _KEY, "a"),
    ("HGETALL", _KEY),
    ("HSET", _KEY, "a", "1"),
    ("HSETNX", _KEY, "a", "1"),
    ("HINCRBY", _KEY, "a", "1"),
    ("HDEL", _KEY, "a"),
    ("ZADD", _KEY, "1", "a"),
    ("ZREM", _KEY, "a"),
    ("ZCARD", _KEY),
    ("ZSCORE", _KEY, "a"),
    ("ZMSCORE", _KEY, "a"),
    ("ZRANGE", _KEY, "0", "1"),
    ("ZREVRANGE", _KEY, "0", "1"),
    ("ZRANGEBYSCORE", _KEY, "0", "1"),
    ("ZSCAN", _KEY, "0"),
    ("XADD", _KEY, "*", "a", "1"),
    ("XLEN", _KEY),
    ("XRANGE", _KEY, "-", "+"),
    ("XREVRANGE", _KEY, "+", "-"),
    ("XTRIM", _KEY, "MINID", "1"),
    ("XACK", _KEY, "g", "1-0"),
    ("XINFO", "GROUPS", _KEY),
    ("XGROUP", "CREATE", _KEY, "g", "0"),
    ("XREADGROUP", "GROUP", "g", "c", "STREAMS", _KEY, ">"),
)

#: Needed as well where replicas must acknowledge changes.
_NEEDED_TO_WAIT: Final = ("WAIT", "1", "1")
#: Needed as well on a cluster, to read the slots.
_NEEDED_IN_A_CLUSTER: Final = (("CLUSTER", "SHARDS"), ("CLUSTER", "INFO"))

#: Commands that lose or change everything at once: an operator's slip or an intruder must not be
#: able to run them.
EXCESSIVE: Final[tuple[tuple[str, ...], ...]] = (
    ("FLUSHALL",),
    ("KEYS", "*"),
    ("CONFIG", "SET", "appendonly", "no"),
    ("SHUTDOWN",),
)


def needed(*, waits: bool, in_cluster: bool) -> tuple[tuple[str, ...], ...]:
    """The commands that the service sends to this server.

    Args:
        waits: whether replicas must acknowledge changes.
        in_cluster: whether the server is reached as a master of a cluster.
    """
    return (
        *NEEDED,
        *([_NEEDED_TO_WAIT] if waits else []),
        *(_NEEDED_IN_A_CLUSTER if in_cluster else []),
    )


def dry_runs(user: str, key: str, commands: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """ACL DRYRUN of the needed commands, then of the excessive ones.

    Args:
        user: our user.
        key: one of our keys.
        commands: from `needed`.
    """
    named = [tuple(key if part == _KEY else part for part in parts) for parts in commands]
    return [("ACL", "DRYRUN", user, *parts) for parts in (*named, *EXCESSIVE)]


def refused(
    replies: Sequence[object], commands: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Needed commands that the dry runs refused, and excessive ones that they allowed.

    None if the server denies us the dry run.
    """
    if any(not isinstance(reply, str) for reply in replies):
        return None
    wanted, excessive = replies[: len(commands)], replies[len(commands) :]
    lacking = [parts[0] for parts, reply in zip(commands, wanted, strict=True) if reply != "OK"]
    allowed = [parts[0] for parts, reply in zip(EXCESSIVE, excessive, strict=True) if reply == "OK"]
    return tuple(lacking), tuple(allowed)
