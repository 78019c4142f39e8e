"""Service on several hosts: a proxy, two machines, Redis with replicas, SQL behind a pooler, a PG.

Each part has a network namespace of its own. The judge observes from the machine itself, whose
links to Redis are never cut.
"""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import redis
import redis.asyncio
from redis.exceptions import RedisError

from reservation.adapters.redis.cluster_slots import slot_of
from reservation.adapters.redis.keys import Keys
from reservation.config.settings import Settings
from reservation.verification.model.history_format import Head
from tests.faults.chaos.environment import HTTP_SECONDS, Stage, signal_all
from tests.faults.chaos.master_heads import DOUBT_SECONDS, MasterHeads, Mastership, certified
from tests.http.connection.proxies import nginx_of_the_page
from tests.support.databases import PostgresServer, running_postgres
from tests.support.hosts import OUTSIDE, Host, Hosts, hosts, needs_hosts
from tests.support.programs import end, find
from tests.support.service import STOP_SECONDS, Served, running_service
from tests.support.topologies import SERVICE, Cluster, Node, Place, Sentinels, until

__all__ = ["LAYOUTS", "HostsStage", "Machine"]

#: Layouts of Redis: one master with two replicas and three sentinels; three masters with three.
LAYOUTS = ("sentinel", "cluster")
ROOT = Path(__file__).resolve().parents[3]
SECRET = "chaos-" * 6
SECRETS = ("ADMIN_API_KEY", "SIGNING_KEYS", "ORDER_ID_KEY", "JWT_SECRET")
PORT = 8000
POOL_PORT, SQL_PORT, GATEWAY_PORT = 6432, 5432, 9000
MACHINES = ("api-1", "api-2")
#: Connections of the pooler to SQL: fewer than the service's own, so that it shares them.
POOL_SIZE = 6
#: How often the stage looks whether the pooler has ended by itself.
POOL_LOOK_SECONDS = 0.5
#: Servers that are as sensitive as in production, on a machine with few processors.
SERVER_LINES = (
    "protected-mode no",
    "maxmemory 2gb",
    "min-replicas-to-write 1",
    "min-replicas-max-lag 1",
)
DOWN_AFTER_MS = 3_000
REBUILD_SECONDS_MAX = 120.0
#: A machine may start while its stores are away, beside all the other parts.
START_SECONDS_MAX = 180.0
#: A rebuild is repeated while the payment of a lost order is undecided.
_REPEAT = b"repeat this command"
REPEAT_SECONDS = 30.0


class Machine:
    """A machine of the service: an API process and a worker under one supervisor."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        self.running: AbstractContextManager[Served] | None = None
        self.served: Served | None = None


class HostsStage(Stage):
    """The stage with a host for each part.

    Args:
        folder: the files of all parts.
        layout: one of `LAYOUTS`.
        chance: draws the machine of an operator's call.
        environ: further settings of the service.
        keeps_all: whether a failover may lose no acknowledged hold.
        waits_for_payments: whether the run lasts until every payment must be decided.
    """

    def __init__(
        self,
        folder: Path,
        layout: str,
        chance: random.Random,
        environ: dict[str, str],
        *,
        keeps_all: bool = False,
        waits_for_payments: bool = True,
    ) -> None:
        super().__init__(folder)
        self.layout = layout
        self.keeps_all = keeps_all
        self.waits_for_payments = waits_for_payments
        #: Sales with a payment that a rebuild could not decide yet, and when to repeat it.
        self._repeats: dict[str, float] = {}
        self._chance = random.Random(chance.getrandbits(64))
        self._more = environ
        self._stack = ExitStack()
        self.network = Hosts.__new__(Hosts)
        self.machines: list[Machine] = []
        self.redis_nodes: list[Node] = []
        self.topology: Sentinels | Cluster | None = None
        self.postgres = PostgresServer(folder, folder)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        #: The hosts whose processes a fault has ended.
        self._ended: set[str] = set()
        #: How often the pooler has ended by itself.
        self.pool_crashes = 0
        self._database_url = ""
        self.front_url = ""
        #: Rebuilds that an operator started, by sale.
        self.rebuilds: Counter[str] = Counter()
        #: The servers that the observer found to be the master, by sale, in their order.
        self.masters: dict[str, list[Mastership]] = {}
        self._down: Machine | None = None

    @property
    def served(self) -> Served:
        served = next(one.served for one in self.machines if one.served is not None)
        assert served is not None
        return served

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.front_url,)

    @property
    def settings(self) -> Settings:
        return self.served.settings

    @property
    def environ(self) -> dict[str, str]:
        return self._environ() | {"RESERVATION_DATA_DIR": str(self.folder / "reader")}

    def _environ(self) -> dict[str, str]:
        assert self.topology is not None
        return {f"RESERVATION_{name}": SECRET for name in SECRETS} | {
            "RESERVATION_REDIS_URL": self.topology.url,
            "RESERVATION_DATABASE_URL": self._database_url,
            "RESERVATION_TOSS_API_URL": self.pg_url,
            "RESERVATION_TOSS_CHECKOUT_URL": f"{self.pg_url}/checkout",
            "RESERVATION_PUBLIC_URL": self.front_url,
            "RESERVATION_TRUSTED_PROXIES": self.network["front"].address,
            "RESERVATION_PORT": str(PORT),
            "RESERVATION_REBUILD": "auto",
            **self._more,
        }

    async def start(self) -> None:
        needs_hosts()
        await asyncio.to_thread(self._start_stores)
        await self.start_service()

    def _start_stores(self) -> None:
        self.network = self._stack.enter_context(hosts())
        count = 3 if self.layout == "sentinel" else 6
        stores = [f"redis-{number + 1}" for number in range(count)]
        for name in (*MACHINES, "front", "sql", "pool", "gateway", *stores):
            self.network.add(name)
        places = [Place(self.network[name].address, self.network[name].before) for name in stores]
        self._start_redis(places)
        sql = self.network["sql"]
        self.postgres = self._stack.enter_context(
            running_postgres(
                before=sql.before,
                network="10.0.0.0/8",
                **self._sql_settings(),
            )
        )
        database = self.postgres.make_database().split("/")[3].split("?")[0]
        pool = self.network["pool"].address
        self._database_url = f"postgresql://postgres:x@{pool}:{POOL_PORT}/{database}"
        self.start_pool()
        self.pg_url = f"http://{self.network['gateway'].address}:{GATEWAY_PORT}"
        self.front_url = f"http://{self.network['front'].address}:{PORT}"
        self.start_gateway()
        self.machines = [Machine(self.network[name], self.folder / name) for name in MACHINES]
        self.start_front()

    def _start_redis(self, places: Sequence[Place]) -> None:
        folder = self.folder / "stores"
        if self.layout == "sentinel":
            down_after = f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}"
            self.topology = Sentinels(
                folder, lines=SERVER_LINES, places=places,
                sentinel_lines=["protected-mode no", down_after],
            )  # fmt: skip
        else:
            lines = [*SERVER_LINES, f"cluster-node-timeout {DOWN_AFTER_MS}"]
            self.topology = Cluster(folder, lines=lines, places=places)
        self._stack.callback(self.topology.close)
        self.topology.start()
        self.redis_nodes = self.topology.nodes

    def _sql_settings(self) -> dict[str, str]:
        # A crash must not lose a committed intent.
        return {"listen_addresses": self.network["sql"].address, "fsync": "on"}

    def start_sql(self) -> None:
        """PostgreSQL again, after a fault has ended it."""
        self.postgres.start(**self._sql_settings())

    def sql_processes(self) -> list[psutil.Process]:
        """The processes of PostgreSQL."""
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self.postgres.pid)
            return [main, *main.children()]
        return []

    def processes_of(self, machine: Machine) -> list[psutil.Process]:
        """The supervisor of a machine and all its processes."""
        with suppress(psutil.NoSuchProcess):
            if machine.served is not None:
                supervisor = psutil.Process(machine.served.process.pid)
                return [supervisor, *supervisor.children(recursive=True)]
        return []

    # The parts besides Redis, each of which a fault may end and start again.

    def _spawn(self, name: str, command: Sequence[str | Path]) -> None:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        self._ended.discard(name)
        with (folder / "log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*self.network[name].before, *command], stdout=log, stderr=log, cwd=ROOT
            )

    def process(self, name: str) -> subprocess.Popen[bytes]:
        """The process of the host `pool`, `gateway` or `front`."""
        return self._processes[name]

    def part(self, name: str) -> list[psutil.Process]:
        """The processes of the host `pool`, `gateway` or `front`."""
        with suppress(psutil.NoSuchProcess):
            main = psutil.Process(self._processes[name].pid)
            return [main, *main.children(recursive=True)]
        return []

    def end(self, name: str, *, kill: bool = False) -> None:
        """End the processes of this host."""
        self._ended.add(name)
        process = self._processes[name]
        if kill:
            signal_all(self.part(name), signal.SIGKILL)
            process.wait()
        else:
            end(process, within=STOP_SECONDS)

    def start_pool(self) -> None:
        """PgBouncer in transaction pooling."""
        host, sql = self.network["pool"], self.network["sql"]
        folder = self.folder / "pool"
        folder.mkdir(exist_ok=True)
        configuration = Path(f"/tmp/{self.network.name}-pool.ini")
        configuration.write_text(
            "[databases]\n"
            f"* = host={sql.address} port={SQL_PORT} user=postgres\n"
            "[pgbouncer]\n"
            f"listen_addr = {host.address}\n"
            f"listen_port = {POOL_PORT}\n"
            "unix_socket_dir =\n"
            "auth_type = any\n"
            "pool_mode = transaction\n"
            f"default_pool_size = {POOL_SIZE}\n"
            "max_client_conn = 200\n"
            "server_login_retry = 1\n"
        )
        self._stack.callback(configuration.unlink, missing_ok=True)
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        self._spawn("pool", [find("pgbouncer"), *user, configuration])
        _until_connects(host.address, POOL_PORT, "the pooler does not listen")

    async def restart_crashed_pool(self, over: asyncio.Event) -> None:
        """Start the pooler again if it ends by itself, as a service manager does.

        PgBouncer 1.18 sometimes ends with "bad client state" after a request to cancel.
        """
        while not over.is_set():
            if "pool" not in self._ended and self._processes["pool"].poll() is not None:
                self.pool_crashes += 1
                await asyncio.to_thread(self.start_pool)
            with suppress(TimeoutError):
                async with asyncio.timeout(POOL_LOOK_SECONDS):
                    await over.wait()

    def start_gateway(self) -> None:
        """The stand-in PG; its webhooks go through the proxy."""
        host = self.network["gateway"]
        module = ["-m", "tests.faults.chaos.gateway", str(self.folder / "gateway")]
        self._spawn(
            "gateway",
            [sys.executable, *module, host.address, str(GATEWAY_PORT), self.front_url],
        )
        _until_connects(host.address, GATEWAY_PORT, "the PG does not listen")

    def start_front(self) -> None:
        """Nginx by the page of going live."""
        folder = self.folder / "front"
        folder.mkdir(exist_ok=True)
        backends = [f"{one.host.address}:{PORT}" for one in self.machines]
        host = self.network["front"].address
        self._spawn("front", nginx_of_the_page(folder, backends, PORT, host=host))
        _until_connects(host, PORT, "the proxy does not listen")

    # The service.

    async def start_service(self) -> str:
        """Start the machine that is down; the first call starts both."""
        if self._down is not None:
            machine, self._down = self._down, None
            await self.start_machine(machine)
            return "started"
        for machine in self.machines:
            await self.start_machine(machine)
        return "started"

    async def start_machine(self, machine: Machine) -> None:
        """Start its supervisor; return when it is ready, or a fault prevents that."""
        machine.running = running_service(
            machine.folder,
            # A fault of another group may be in progress.
            but_for=("",),
            before=machine.host.before,
            start_seconds=START_SECONDS_MAX,
            settings={
                **self._environ(),
                "RESERVATION_HOST": machine.host.address,
                "RESERVATION_WORKERS": "1",
            },
        )
        machine.served = await asyncio.to_thread(machine.running.__enter__)

    async def stop_service(self, *, kill: bool = False) -> None:
        """End one machine's processes, by SIGTERM or by SIGKILL of its supervisor."""
        self._down = self._chance.choice(self.machines)
        await self.stop_machine(self._down, kill=kill)

    async def stop_machine(self, machine: Machine, *, kill: bool = False) -> None:
        if machine.running is None or machine.served is None:
            return
        if kill:
            machine.served.process.kill()
        running, machine.running, machine.served = machine.running, None, None
        await asyncio.to_thread(running.__exit__, None, None, None)

    async def stop(self) -> None:
        for machine in self.machines:
            await self.stop_machine(machine)
        await asyncio.to_thread(self._stop_parts)

    def _stop_parts(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                end(process, within=STOP_SECONDS)
        self._stack.close()

    def parts(self, role: str) -> list[psutil.Process]:
        """Processes of this role on both machines."""
        found: list[psutil.Process] = []
        for machine in self.machines:
            served = machine.served
            if served is not None:
                with suppress(psutil.NoSuchProcess):
                    children = psutil.Process(served.process.pid).children()
                    found += [one for one in children if role in one.cmdline()]
        return found

    async def operate(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A call with the operator's key to either machine, past the proxy."""
        headers = {"Authorization": f"Bearer {SECRET}", "X-Operator": "chaos"}
        machine = self._chance.choice(self.machines)
        async with httpx.AsyncClient(
            base_url=f"http://{machine.host.address}:{PORT}", timeout=HTTP_SECONDS, trust_env=False
        ) as client:
            headers |= more.pop("headers", {})
            return await client.request(method, path, headers=headers, **more)

    # Redis, as the machine itself sees it.

    def master(self) -> Node:
        """The current sale's master.

        Raises:
            RedisError: no server is known to be the master now.
        """
        return master_of(self, self.sale_id)

    def host_of(self, node: Node) -> Host:
        return next(host for host in self.network if host.address == node.place.address)

    @asynccontextmanager
    async def redis(self) -> AsyncIterator[Any]:
        """An operator's own connection to the current sale's master."""
        node = await asyncio.to_thread(self.master)
        client = redis.asyncio.Redis(
            host=node.place.address, port=node.port, decode_responses=True, socket_timeout=5.0
        )
        try:
            yield client
        finally:
            with suppress(RedisError):
                await client.aclose()

    def heads(self, sale_id: str, skus: Iterable[str]) -> MasterHeads:
        keys = Keys(self.settings.key_prefix).of(sale_id)
        found = self.masters.setdefault(sale_id, [])
        return MasterHeads(sale_id, keys, skus, partial(master_of, self, sale_id), found)

    @property
    def observed_after_seconds(self) -> float:
        return DOUBT_SECONDS

    def trusted(self, sale_id: str, heads: list[Head]) -> list[Head]:
        """The heads without those that may be of a server that was no longer the master."""
        return certified(heads, self.masters.get(sale_id, []))

    # Operators.

    async def rebuild_lost_sales(self, over: asyncio.Event) -> None:
        """The operator of the alarm, who rebuilds under `--set RESERVATION_REBUILD=manual`."""
        if self._more.get("RESERVATION_REBUILD") != "manual":
            return
        while not over.is_set():
            recovering: set[str] = set()
            for machine in self.machines:
                url = f"http://{machine.host.address}:{PORT}/health/ready"
                with suppress(httpx.HTTPError, ValueError):
                    async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
                        answer = (await client.get(url)).json()
                        recovering |= set(answer.get("recovering", {}))
            now = time.monotonic()
            recovering |= {sale_id for sale_id, at in self._repeats.items() if at <= now}
            for sale_id in sorted(recovering):
                await self._rebuild(sale_id)
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await over.wait()

    async def _rebuild(self, sale_id: str) -> None:
        command = [sys.executable, "-m", "api.cli", "rebuild", sale_id, "--operator", "chaos"]
        process = await asyncio.create_subprocess_exec(
            *command,
            env={"PATH": "/usr/bin:/bin", **self.environ},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(REBUILD_SECONDS_MAX):
                output, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            return
        with (self.folder / "rebuilds.log").open("ab") as log:
            log.write(output)
        self.rebuilds[sale_id] += process.returncode in (0, 1)
        self._repeats.pop(sale_id, None)
        if _REPEAT in output:
            self._repeats[sale_id] = time.monotonic() + REPEAT_SECONDS

    async def heal(self) -> None:
        """Every link whole, and every server in its role."""
        await asyncio.to_thread(self._heal)

    def _heal(self) -> None:
        everyone = list(self.network)
        for host in everyone:
            host.unlimit()
        self.network.join(everyone, everyone)
        self.network.join([self.network[OUTSIDE]], everyone)


def master_of(stage: HostsStage, sale_id: str) -> Node:
    """The server that most of the servers report as the sale's master.

    Raises:
        redis.ConnectionError: there is none.
    """
    topology = stage.topology
    votes: Counter[int] = Counter()
    if isinstance(topology, Sentinels):
        for sentinel in topology.sentinels:
            with suppress(RedisError):
                command = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
                votes[int(sentinel.execute(*command, socket_timeout=1)[1])] += 1
    elif isinstance(topology, Cluster):
        slot = slot_of(sale_id)
        for node in topology.nodes:
            with suppress(RedisError):
                owner = topology.owner_by(node, slot)
                if owner is not None:
                    votes[owner.port] += 1
    if not votes:
        raise redis.ConnectionError("no server reports the master")
    (port, count), *_ = votes.most_common(1)
    if 2 * count <= votes.total():
        raise redis.ConnectionError("the servers do not agree on the master")
    return next(node for node in stage.redis_nodes if node.port == port)


def _until_connects(address: str, port: int, what: str) -> None:
    def connects() -> bool:
        with suppress(OSError), socket.create_connection((address, port), timeout=2):
            return True
        return False

    until(connects, what)
