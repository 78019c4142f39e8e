"""The ACL permissions that our Redis user needs, and those that it must not have."""

from collections.abc import Sequence
from typing import Final

__all__ = ["EXCESSIVE", "NEEDED", "dry_runs", "refused"]

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

#: Commands that lose or change everything at once: an operator's slip or an intruder must not be
#: able to run them.
EXCESSIVE: Final[tuple[tuple[str, ...], ...]] = (
    ("FLUSHALL",),
    ("KEYS", "*"),
    ("CONFIG", "SET", "appendonly", "no"),
    ("SHUTDOWN",),
)


def dry_runs(user: str, key: str) -> list[tuple[str, ...]]:
    """ACL DRYRUN of every command above, for this user and one of our keys."""
    commands = [tuple(key if part == _KEY else part for part in parts) for parts in NEEDED]
    return [("ACL", "DRYRUN", user, *parts) for parts in (*commands, *EXCESSIVE)]


def refused(
    replies: Sequence[object],
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Needed commands that the dry runs refused, and excessive ones that they allowed.

    None if the server denies us the dry run.
    """
    if any(not isinstance(reply, str) for reply in replies):
        return None
    needed, excessive = replies[: len(NEEDED)], replies[len(NEEDED) :]
    lacking = [parts[0] for parts, reply in zip(NEEDED, needed, strict=True) if reply != "OK"]
    allowed = [parts[0] for parts, reply in zip(EXCESSIVE, excessive, strict=True) if reply == "OK"]
    return tuple(lacking), tuple(allowed)
