"""The Valkey configuration shipped for compose, on a real server."""

import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from reservation.adapters.redis.embedded.files import configuration_of, find_binary

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "deploy" / "valkey.conf"
COMPOSE = ROOT / "compose.yaml"

#: A start takes a tenth of a second; a busy machine gets a hundred times that.
START_SECONDS_MAX = 10.0

#: Intended differences between the embedded server and one in its own container.
OF_THE_PLACE = {
    "bind",
    "daemonize",
    "dir",
    "enable-debug-command",
    "enable-module-command",
    "enable-protected-configs",
    "logfile",
    "loglevel",
    "maxmemory",
    "notify-keyspace-events",
    "port",
    "protected-mode",
    "unixsocket",
    "unixsocketperm",
}


def settings_of(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines}


def arguments_in_compose() -> list[str]:
    """The options that compose.yaml adds to the configuration."""
    lines = COMPOSE.read_text().splitlines()
    [line] = [line for line in lines if "command: [valkey-server" in line]
    words = [word.strip().strip('"') for word in line.split("[")[1].rstrip("]").split(",")]
    return words[2:]


@pytest.fixture(params=[False, True], ids=["alone", "in compose"])
def in_compose(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def server(tmp_path: Path, in_compose: bool) -> Iterator["redis.Redis"]:
    more = arguments_in_compose() if in_compose else []
    # A socket's path is short: the test's own folder may be too deep for it.
    with tempfile.TemporaryDirectory(prefix="rsv-") as folder:
        socket = f"{folder}/valkey.sock"
        process = subprocess.Popen(
            [find_binary(), CONFIG, *more, "--port", "0", "--unixsocket", socket],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            with redis.Redis(unix_socket_path=socket, decode_responses=True) as client:
                wait_for(client)
                yield client
        finally:
            process.terminate()
            process.communicate(timeout=START_SECONDS_MAX)


def wait_for(client: "redis.Redis") -> None:
    until = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def test_a_server_accepts_the_shipped_configuration_and_its_durability(
    server: "redis.Redis",
) -> None:
    asked = ["appendonly", "appendfsync", "no-appendfsync-on-rewrite", "maxmemory-policy"]
    assert server.config_get(*asked) == {
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "maxmemory-policy": "noeviction",
    }
    assert server.config_get("maxmemory") != {"maxmemory": "0"}
    assert server.set("rsv:{s}:sale", "1")


def test_the_shipped_configuration_equals_the_embedded_servers() -> None:
    embedded = configuration_of(
        data=Path("/data"), socket_path=Path("/s"), maxmemory_bytes=None, debug_commands=False
    )
    shipped, own = settings_of(CONFIG.read_text()), settings_of(embedded)
    for name in OF_THE_PLACE:
        shipped.pop(name, None)
        own.pop(name, None)
    assert shipped == own


def test_only_the_compose_configuration_opens_the_server_to_a_network(
    server: "redis.Redis", in_compose: bool
) -> None:
    """A copy of the file started without users must not be an open server."""
    found = server.config_get("bind", "protected-mode")
    opened = {"bind": "* -::*", "protected-mode": "no"}
    alone = {"bind": "127.0.0.1 -::1", "protected-mode": "yes"}
    assert found == (opened if in_compose else alone)
