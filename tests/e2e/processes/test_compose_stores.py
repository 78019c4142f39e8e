"""The stores of compose.yaml: each command of its Valkey servers, run on this machine."""

import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from reservation.adapters.redis.embedded.files import find_binary
from tests.support.programs import end
from tests.support.service import eventually, free_port

ROOT = Path(__file__).resolve().parents[3]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
START_SECONDS = 40.0
Replaced = dict[str, str]


def command_of(name: str, replaced: Replaced) -> str:
    """The service's command for a shell, as compose reads it, with this machine's addresses."""
    command = SERVICES[name]["command"]
    text = command[2] if command[0] == "sh" else f"exec {shlex.join(command)}"
    text = text.replace("$$", "$")
    for there, here in replaced.items():
        assert there in text, (there, text)
        text = text.replace(there, here)
    return text


@contextmanager
def running(name: str, folder: Path, port: int, replaced: Replaced) -> Iterator[redis.Redis]:
    folder.mkdir()
    programs = folder / "bin"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(find_binary())
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", **SERVICES[name].get("environment", {})}
    command = ["/bin/sh", "-c", command_of(name, replaced)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        with redis.Redis(port=port, decode_responses=True, socket_timeout=10) as client:
            eventually(lambda: answers(client), bool, within=START_SECONDS)
            yield client
    finally:
        end(process)


def answers(client: redis.Redis) -> bool:
    with suppress(redis.RedisError):
        return bool(client.ping())
    return False


def of_a_server(port: int, bind: str) -> Replaced:
    return {
        "/etc/valkey/valkey.conf": str(ROOT / "deploy" / "valkey.conf"),
        bind: f"--bind 127.0.0.1 --port {port}",
    }


@pytest.mark.slow
def test_replica_and_sentinel_follow_the_master(tmp_path: Path) -> None:
    master, replica, sentinel = (free_port() for _ in range(3))
    quoted = "--bind '*' '-::*'"
    with ExitStack() as stack:
        of_master = of_a_server(master, "--bind '*' '-::*'") | {
            "--replica-announce-ip valkey": "--replica-announce-ip 127.0.0.1"
        }
        stack.enter_context(running("valkey", tmp_path / "master", master, of_master))
        of_replica = of_a_server(replica, quoted) | {
            "--replicaof valkey 6379": f"--replicaof 127.0.0.1 {master}",
            "--replica-announce-ip $NAME": "--replica-announce-ip 127.0.0.1",
        }
        copy = stack.enter_context(running("replica-1", tmp_path / "replica", replica, of_replica))
        eventually(
            lambda: copy.info("replication").get("master_link_status"),
            lambda status: status == "up",
            within=START_SECONDS,
        )
        of_sentinel = {
            "port 26379": f"port {sentinel}",
            "stock valkey 6379 2": f"stock 127.0.0.1 {master} 2",
            "/tmp/sentinel.conf": str(tmp_path / "sentinel.conf"),
        }
        watch = stack.enter_context(
            running("sentinel-1", tmp_path / "sentinel", sentinel, of_sentinel)
        )
        eventually(
            lambda: watch.execute_command("SENTINEL", "REPLICAS", "stock"),
            lambda found: len(found or ()) == 1,
            within=START_SECONDS,
        )


@pytest.mark.slow
def test_a_node_of_the_cluster_announces_its_name(tmp_path: Path) -> None:
    port = free_port()
    replaced = of_a_server(port, "--bind '*' '-::*'")
    replaced["--cluster-enabled yes"] = f"--cluster-enabled yes --cluster-port {free_port()}"
    with running("cluster-1", tmp_path / "node", port, replaced) as node:
        assert node.info("cluster")["cluster_enabled"] == 1
        assert node.config_get("cluster-announce-hostname") == {
            "cluster-announce-hostname": "cluster-1"
        }
        assert node.config_get("cluster-require-full-coverage") == {
            "cluster-require-full-coverage": "no"
        }


@pytest.mark.parametrize(("kind", "count"), [("replica", 2), ("sentinel", 3), ("cluster", 6)])
def test_the_servers_of_a_kind_have_one_command(kind: str, count: int) -> None:
    commands = [str(SERVICES[f"{kind}-{number}"]["command"]) for number in range(1, count + 1)]
    assert len(set(commands)) == 1
