"""What must be true of Redis before holds are promised, named where it is not."""

from collections.abc import Callable
from typing import Final

from reservation.redis.connection import Connections, StoreUnavailable, UnexpectedReply, good
from reservation.redis.records import as_mapping

__all__ = ["missing_in_redis"]

#: Above this share of its memory the server is about to refuse new holds.
MEMORY_SHARE_MAX: Final = 0.85

#: What INFO must say. Each name is what an operator reads in /health/ready.
_INFO: Final[dict[str, tuple[str, Callable[[str], bool]]]] = {
    "redis-append-only-file": ("aof_enabled", lambda value: value == "1"),
    "redis-last-write": ("aof_last_write_status", lambda value: value == "ok"),
    "redis-loading": ("loading", lambda value: value == "0"),
    "redis-master": ("role", lambda value: value == "master"),
}
#: What CONFIG must say.
_CONFIG: Final[dict[str, tuple[str, str]]] = {
    "redis-fsync-policy": ("appendfsync", "always"),
    "redis-fsync-on-rewrite": ("no-appendfsync-on-rewrite", "no"),
    "redis-eviction-policy": ("maxmemory-policy", "noeviction"),
}


async def missing_in_redis(connections: Connections) -> list[str]:
    """Names of the conditions that do not hold; empty where all is well.

    Raises:
        StoreUnavailable, StoreUncertain: the server does not answer.
    """
    names = [name for name, _ in _CONFIG.values()]
    infos = await connections.pipeline(
        [("INFO", section) for section in ("persistence", "replication", "memory")]
        + [("CONFIG", "GET", *names)]
    )
    info: dict[str, str] = {}
    for text in infos[:3]:
        lines = good(text).splitlines()
        info.update(line.split(":", 1) for line in lines if ":" in line)
    missing = [name for name, (field, good_) in _INFO.items() if not good_(info.get(field, ""))]
    limit = int(info.get("maxmemory", "0"))
    if limit and int(info["used_memory"]) > MEMORY_SHARE_MAX * limit:
        missing.append("redis-memory")
    return missing + _wrong_config(infos[3])


def _wrong_config(reply: object) -> list[str]:
    if isinstance(reply, StoreUnavailable | UnexpectedReply):
        # A managed server that does not show its configuration: not known is not well.
        return ["redis-config-unknown"]
    config = as_mapping(good(reply))
    return [name for name, (field, value) in _CONFIG.items() if config.get(field) != value]
