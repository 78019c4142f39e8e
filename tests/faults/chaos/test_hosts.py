"""The network of hosts loses packets in the direction that was cut, and leaves nothing behind."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.hosts import OUTSIDE, Host, Hosts, hosts, needs_hosts, remove_abandoned
from tests.support.service import eventually

PORT = 7000
#: Receives datagrams, and writes each to its standard output.
RECEIVER = """
import socket, sys
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind((sys.argv[1], int(sys.argv[2])))
sys.stdout.write("ready\\n"); sys.stdout.flush()
while True:
    sys.stdout.write(own.recv(100).decode() + "\\n"); sys.stdout.flush()
"""
SENDER = """
import socket, sys
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.sendto(sys.argv[3].encode(), (sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture
def network() -> Iterator[Hosts]:
    needs_hosts()
    with hosts("a", "b", "c") as made:
        yield made


@contextmanager
def receiving(host: Host, folder: Path) -> Iterator[Path]:
    """A receiver on this host; the file of its datagrams."""
    file = folder / f"{host.name}.log"
    with file.open("wb") as output:
        process = subprocess.Popen(
            [*host.before, sys.executable, "-c", RECEIVER, host.address, str(PORT)], stdout=output
        )
    try:
        eventually(file.read_text, lambda text: "ready" in text)
        yield file
    finally:
        process.kill()
        process.wait()


def send(source: Host, target: Host, text: str) -> None:
    subprocess.run(
        [*source.before, sys.executable, "-c", SENDER, target.address, str(PORT), text],
        check=True,
        timeout=30,
    )


def arrives(source: Host, target: Host, file: Path, text: str) -> None:
    """Send until it arrives: a single datagram may be lost while addresses are resolved."""

    def got() -> str:
        send(source, target, text)
        return file.read_text()

    eventually(got, lambda lines: text in lines)


def test_one_direction_of_a_link_is_cut_and_joined(network: Hosts, tmp_path: Path) -> None:
    a, b, c = network["a"], network["b"], network["c"]
    with receiving(a, tmp_path) as at_a, receiving(b, tmp_path) as at_b:
        arrives(a, b, at_b, "before")
        network.cut([a], [b], both=False)
        for number in range(3):
            send(a, b, f"lost-{number}")
        # Later datagrams on the other links arrive, so these are lost and not late.
        arrives(b, a, at_a, "the-other-way")
        arrives(c, b, at_b, "the-other-host")
        arrives(network[OUTSIDE], b, at_b, "the-machine")
        assert "lost" not in at_b.read_text()
        network.join([a], [b])
        arrives(a, b, at_b, "after")


def test_a_limited_link_passes_and_loses(network: Hosts, tmp_path: Path) -> None:
    a, b = network["a"], network["b"]
    with receiving(b, tmp_path) as at_b:
        arrives(a, b, at_b, "before")
        a.limit(64, 3000)
        burst = (
            "import socket, sys\n"
            "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for n in range(100): own.sendto(b'x' * 1000, (sys.argv[1], int(sys.argv[2])))\n"
        )
        subprocess.run([*a.before, sys.executable, "-c", burst, b.address, str(PORT)], check=True)
        a.unlimit()
        arrives(a, b, at_b, "after")
        assert 0 < at_b.read_text().count("x" * 100) < 100


def test_nothing_is_left_behind(network: Hosts) -> None:
    a = network["a"]
    process = subprocess.Popen([*a.before, sys.executable, "-c", "import time; time.sleep(600)"])

    def pids() -> list[str]:
        command = ["ip", "netns", "pids", a.namespace]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return done.stdout.split()

    eventually(pids, lambda found: str(process.pid) in found)
    network.close()
    assert process.wait(30) != 0
    assert not Path(f"/run/netns/{a.namespace}").exists()
    assert network.name not in [name for _, name in socket.if_nameindex()]


def test_the_network_of_a_killed_process_is_removed() -> None:
    needs_hosts()
    killed = (
        "import os, signal\n"
        "from tests.support.hosts import Hosts\n"
        "made = Hosts(); made.add('a'); print(made.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", killed], capture_output=True, text=True, timeout=60, check=False
    )
    name = done.stdout.strip()
    assert done.returncode < 0, done.stderr
    assert name
    assert name in [interface for _, interface in socket.if_nameindex()]
    remove_abandoned()
    assert name not in [interface for _, interface in socket.if_nameindex()]
    assert not any(one.name.startswith(name) for one in Path("/run/netns").iterdir())
