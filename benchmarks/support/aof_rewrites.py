"""Rewrites of the append-only file: kept out of a measurement, or triggered on purpose.

The server forks for it, copies each page that is written while the child works, and shares the disk
and the cores with it. It starts by itself when the file has doubled, so a measurement with one in
it is not comparable with one without.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

from redis.exceptions import ResponseError

__all__ = ["begin", "none_meanwhile", "under_way", "wait"]

_REWRITE_SECONDS_MAX: Final = 300.0
_POLL_SECONDS: Final = 0.2
_GROWTH: Final = "auto-aof-rewrite-percentage"


def under_way(client: Any) -> bool:
    """Whether one is in progress, or about to begin."""
    state = client.info("persistence")
    return bool(state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])


def wait(client: Any) -> None:
    """Wait until none is in progress.

    Raises:
        RuntimeError: it does not end.
    """
    give_up_at = time.monotonic() + _REWRITE_SECONDS_MAX
    while under_way(client):
        if time.monotonic() > give_up_at:
            raise RuntimeError("the server did not finish rewriting its file")
        time.sleep(_POLL_SECONDS)


def begin(client: Any) -> None:
    """Start one; one that starts by itself at this very moment is as good."""
    wait(client)
    try:
        client.bgrewriteaof()
    except ResponseError:
        if not under_way(client):
            raise


@contextmanager
def none_meanwhile(client: Any) -> Generator[None]:
    """None starts by itself during the block."""
    wait(client)
    growth: str = client.config_get(_GROWTH)[_GROWTH]
    client.config_set(_GROWTH, 0)
    try:
        yield
    finally:
        client.config_set(_GROWTH, growth)
