"""A whole sale while every part of the service is killed: the books must agree all the same."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from redis import Redis
from redis.exceptions import RedisError

from tests.fixtures.service import Served, running_service

#: What is killed, three times each, in an order drawn from the seed that a failure prints.
VICTIMS = ("valkey", "api", "worker", "sandbox")
KILLS_EACH = 3
#: Kills come at least this far apart, so that most parts are up when the next one falls.
APART_SECONDS = (0.2, 1.0)
#: The demo itself waits up to three minutes for the last lease to end.
DEMO_SECONDS = 400


@pytest.mark.slow
@pytest.mark.timeout(DEMO_SECONDS + 120)
def test_a_sale_is_clean_although_every_part_is_killed_three_times(tmp_path: Path) -> None:
    """Kill -9 at random moments while orders are CONFIRMING; the verdict compares all books."""
    seed = random.SystemRandom().randrange(1 << 32)
    with running_service(tmp_path / "data", RESERVATION_WORKERS="2") as served:
        demo = subprocess.Popen(
            [
                *(sys.executable, "-m", "api.cli", "demo", "--json"),
                *("--buyers", "2000", "--stock", "300"),
                *("--url", served.url, "--seed", str(seed)),
            ],
            env=_environ(served),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            killed = _kill_parts(served, demo, random.Random(seed))
            output, errors = demo.communicate(timeout=DEMO_SECONDS)
        finally:
            if demo.poll() is None:
                demo.kill()
                demo.wait()
    told = f"seed {seed}, killed {killed}\n{errors.decode()[-2000:]}"
    assert output, told
    verdict = json.loads(output)
    assert verdict["problems"] == [], told
    assert verdict["sold"] <= 300, told
    assert demo.returncode == 0, told
    assert killed == dict.fromkeys(VICTIMS, KILLS_EACH), told


def _environ(served: Served) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "RESERVATION_DATA_DIR": str(served.settings.data_dir),
        "RESERVATION_PORT": str(served.settings.port),
    }


def _kill_parts(
    served: Served, demo: "subprocess.Popen[bytes]", chance: random.Random
) -> dict[str, int]:
    order = [victim for victim in VICTIMS for _ in range(KILLS_EACH)]
    chance.shuffle(order)
    killed: dict[str, int] = dict.fromkeys(VICTIMS, 0)
    store = Redis(
        unix_socket_path=str(served.settings.data_dir / "valkey.sock"), decode_responses=True
    )
    for victim in order:
        for _ in _while_running(demo):
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
    name = "valkey-server" if victim == "valkey" else f"api.processes {victim}"
    with suppress(psutil.NoSuchProcess):
        return [
            child
            for child in psutil.Process(served.process.pid).children()
            if name in " ".join(child.cmdline())
        ]
    return []


def _while_running(demo: "subprocess.Popen[bytes]") -> Iterator[None]:
    while demo.poll() is None:
        yield
        time.sleep(0.005)


def _confirming(store: "Redis") -> int:
    with suppress(RedisError):
        return sum(
            int(store.zcard(f"rsv:{{{sale}}}:confirming")) for sale in store.smembers("rsv:sales")
        )
    return 0
