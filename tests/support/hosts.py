"""Several hosts on this machine: network namespaces, joined by one bridge.

Needs root and Debian's `iproute2`, and no module of the kernel beyond bridges and token buckets. A
link is cut in one direction by a wrong neighbour entry on the sending host: its packets leave for
an address without an owner, and no error is reported.
"""

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.programs import find, missing

__all__ = ["OUTSIDE", "Host", "Hosts", "hosts", "needs_hosts"]

#: The name of the machine itself, which is a host of the network as well.
OUTSIDE = "outside"
IP_SECONDS_MAX = 30
#: A network's name has the id of the process that made it; a device's name has 15 characters.
_PREFIX = "rs"
#: An address without an owner.
_UNUSED = "02:00:00:00:00:01"
_TRIES = 50


def needs_hosts() -> None:
    """Skip where no namespaces can be made; fail there under CI, which runs as root."""
    find("ip")
    find("tc")
    if os.geteuid() != 0:
        missing("network namespaces need root")


class Host:
    """One host: its namespace, its address, and the command that runs a program in it."""

    def __init__(self, name: str, namespace: str, address: str, device: str, outer: str) -> None:
        self.name = name
        self.namespace = namespace
        self.address = address
        #: Its network device, and the other end of it on the bridge.
        self.device = device
        self.outer = outer

    @property
    def before(self) -> tuple[str, ...]:
        """The command in front of a program that runs on this host."""
        if not self.namespace:
            return ()
        return (_program("ip"), "netns", "exec", self.namespace)

    @property
    def _inside(self) -> tuple[str, ...]:
        return ("-n", self.namespace) if self.namespace else ()

    def sends_to(self, other: "Host", *, arrives: bool) -> None:
        """Whether packets to the other host arrive."""
        if arrives:
            # The entry is absent where the link was whole.
            with suppress(subprocess.CalledProcessError):
                _ip(*self._inside, "neigh", "del", other.address, "dev", self.device)
            return
        entry = ("lladdr", _UNUSED, "dev", self.device, "nud", "permanent")
        _ip(*self._inside, "neigh", "replace", other.address, *entry)

    def limit(self, rate_kbit: int, queue_bytes: int) -> None:
        """Limit both directions to this rate; what the queue cannot take is lost."""
        shape = ("tbf", "rate", f"{rate_kbit}kbit", "burst", "4kb", "limit", str(queue_bytes))
        _run("tc", *self._inside, "qdisc", "replace", "dev", self.device, "root", *shape)
        _run("tc", "qdisc", "replace", "dev", self.outer, "root", *shape)

    def unlimit(self) -> None:
        """Remove the limit, where there is one."""
        for where, device in ((self._inside, self.device), ((), self.outer)):
            with suppress(subprocess.CalledProcessError):
                _run("tc", *where, "qdisc", "del", "dev", device, "root")


class Hosts:
    """One network of hosts; the machine itself has an address in it."""

    def __init__(self) -> None:
        remove_abandoned()
        self.name = f"{_PREFIX}{os.getpid()}x{secrets.token_hex(1)}"
        self._bridge = self.name
        self._network = _free_network()
        self._hosts: dict[str, Host] = {}
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            outside = f"{self._network}.1"
            _ip("addr", "add", f"{outside}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.close()
            raise
        self._hosts[OUTSIDE] = Host(OUTSIDE, "", outside, self._bridge, self._bridge)

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        """All hosts but the machine itself."""
        return iter([host for host in self._hosts.values() if host.namespace])

    def add(self, name: str) -> Host:
        """A new host on the bridge."""
        number = len(self._hosts) + 1
        namespace = f"{self.name}-{name}"
        device, outer = "eth0", f"{self.name}v{number}"
        host = Host(name, namespace, f"{self._network}.{number}", device, outer)
        _ip("netns", "add", namespace)
        self._hosts[name] = host
        _ip("link", "add", outer, "type", "veth", "peer", "name", device, "netns", namespace)
        _ip("link", "set", outer, "master", self._bridge, "up")
        _ip("-n", namespace, "addr", "add", f"{host.address}/24", "dev", device)
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", device, "up")
        return host

    def cut(self, some: Sequence[Host], others: Sequence[Host], *, both: bool = True) -> None:
        """Lose the packets from these hosts to the others, and in the other direction."""
        self._set(some, others, arrives=False, both=both)

    def join(self, some: Sequence[Host], others: Sequence[Host]) -> None:
        """Undo a cut, in both directions."""
        self._set(some, others, arrives=True, both=True)

    def _set(
        self, some: Sequence[Host], others: Sequence[Host], *, arrives: bool, both: bool
    ) -> None:
        for one in some:
            for other in others:
                one.sends_to(other, arrives=arrives)
                if both:
                    other.sends_to(one, arrives=arrives)

    def close(self) -> None:
        """End every process of the hosts, and remove the network."""
        _remove(self.name)


@contextmanager
def hosts(*names: str) -> Iterator[Hosts]:
    """A network of these hosts, removed at the end of the block."""
    made = Hosts()
    try:
        for name in names:
            made.add(name)
        yield made
    finally:
        made.close()


def remove_abandoned() -> None:
    """Remove the networks of test processes that were killed."""
    for line in _ip("-o", "link", "show", "type", "bridge").splitlines():
        name = line.split(":")[1].strip()
        maker = name.removeprefix(_PREFIX).split("x")[0]
        if name.startswith(_PREFIX) and maker.isdecimal() and not Path(f"/proc/{maker}").exists():
            # Another test process may be removing it as well.
            with suppress(subprocess.CalledProcessError):
                _remove(name)


def _remove(name: str) -> None:
    for line in _ip("netns", "list").splitlines():
        namespace = line.split()[0]
        if not namespace.startswith(f"{name}-"):
            continue
        for pid in _ip("netns", "pids", namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        # Its end of each link goes with the namespace, and the other end with it.
        _ip("netns", "del", namespace)
    if Path(f"/sys/class/net/{name}").exists():
        _ip("link", "del", name)


def _free_network() -> str:
    """The first three numbers of the addresses of a network that is not in use here."""
    for _ in range(_TRIES):
        network = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
        if not _ip("-4", "addr", "show", "to", f"{network}.0/24").strip():
            return network
    raise AssertionError("no free network")


def _program(name: str) -> str:
    return shutil.which(name) or f"/usr/sbin/{name}"


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(program: str, *arguments: str) -> str:
    return subprocess.run(
        [_program(program), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=IP_SECONDS_MAX,
    ).stdout
