"""Kills of the parts of a running service, at moments when money is moving."""

import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
from redis import Redis
from redis.exceptions import RedisError

from tests.support.service import Served

__all__ = ["VICTIMS", "kill_parts"]

#: Parts to kill, in an order drawn from the seed that a failure prints.
VICTIMS = ("valkey", "api", "worker", "sandbox")
#: Kills come at least this far apart, so that most parts are up when the next one falls.
APART_SECONDS = (0.2, 1.0)


def kill_parts(
    served: Served, during: "subprocess.Popen[bytes]", chance: random.Random, *, each: int
) -> dict[str, int]:
    """Kill every part this many times while this process runs; returns the count of each."""
    order = [victim for victim in VICTIMS for _ in range(each)]
    chance.shuffle(order)
    killed: dict[str, int] = dict.fromkeys(VICTIMS, 0)
    store = Redis(
        unix_socket_path=str(served.settings.data_dir / "valkey.sock"), decode_responses=True
    )
    for victim in order:
        for _ in _while_running(during):
            if _confirming(store) and (parts := _parts(served, victim)):
                # Every API worker at once: no other one may answer for it.
                for part in parts:
                    part.kill()
                killed[victim] += 1
                break
        time.sleep(chance.uniform(*APART_SECONDS))
    return killed


def _parts(served: Served, victim: str) -> list[psutil.Process]:
    """The supervisor's children that are this part of the service."""
    name = "valkey-server" if victim == "valkey" else f"api.server.entrypoints {victim}"
    with suppress(psutil.NoSuchProcess):
        return [
            child
            for child in psutil.Process(served.process.pid).children()
            if name in " ".join(child.cmdline())
        ]
    return []


def _while_running(during: "subprocess.Popen[bytes]") -> Iterator[None]:
    while during.poll() is None:
        yield
        time.sleep(0.005)


def _confirming(store: "Redis") -> int:
    with suppress(RedisError):
        return sum(
            int(store.zcard(f"rsv:{{{sale}}}:confirming")) for sale in store.smembers("rsv:sales")
        )
    return 0
