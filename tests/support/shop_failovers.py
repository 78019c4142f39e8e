"""Rounds of failovers under load, on sentinels or a cluster, and the judge of each."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis.exceptions import RedisError

from reservation.adapters.redis.cluster_slots import slot_of
from tests.support.failover import service_on
from tests.support.hosts import Hosts, hosts
from tests.support.sandbox import RunningSandbox, sandbox_process
from tests.support.service import Served, eventually, item
from tests.support.shoppers import Held, Shopping, shopping
from tests.support.topologies import Cluster, Node, Place, Sentinels, cluster, sentinels, until

__all__ = ["FailoverStage", "Fault", "Tally", "play", "stage"]

#: Units: more than the shoppers take, and fewer than they request.
MANY, FEW = 100_000, 30
SHOPPERS = 6
#: Time after which a killed server is started again.
RESTART_SECONDS = 2.0
#: How long replication is cut before the master is killed. If one replica suffices, this is long
#: enough for the service to continue with the other replica.
CUT_SECONDS, LONG_CUT_SECONDS = (1.0, 3.0), (5.5, 8.0)
#: Pause between two polls of the servers.
POLL_SECONDS = 0.04
LOOK_SECONDS_MAX = 0.3
#: Two processes answer, whichever is free: in this many answers both occur.
SOUND = 8
#: Longer than a process of the API retries the end of a payment.
LEASE_SECONDS = 4.0
#: A payment that the settler decides, on a busy machine.
SETTLE_SECONDS = 120.0
#: Statuses of an order whose units are taken.
TAKEN = {"HELD", "PREPARED", "CONFIRMING", "CONFIRMED"}


class Fault(StrEnum):
    """The fault of a round's master."""

    KILL = "kill"
    FREEZE = "freeze"
    #: One replica is cut off first; then the master's host and the other replica are lost.
    PARTITION = "partition"


class Tally:
    """The sums of all rounds."""

    def __init__(self) -> None:
        self.rounds: Counter[str] = Counter()
        self.failovers = 0
        self.holds = 0
        self.paid = 0
        self.lost: list[str] = []
        self.told = 0
        self.recovered = 0
        #: From the moment that enough replicas were attached to the first hold of a sale; and of a
        #: sale that a worker had to rebuild first.
        self.waits: list[float] = []
        self.waits_for_rebuild: list[float] = []
        self.rows: Counter[str] = Counter()
        self.prepared: Counter[tuple[int, str]] = Counter()
        self.returned: Counter[tuple[int, str]] = Counter()
        self.longest_unknown = 0
        self.without_retry_after = 0

    def add(self, found: Shopping) -> None:
        """Add the answers of a round."""
        self.holds += len(found.held)
        self.paid += sum(held.is_confirmed for held in found.held.values())
        self.rows += found.rows
        self.prepared += found.prepared
        self.returned += found.returned
        self.longest_unknown = max(self.longest_unknown, found.longest_unknown)
        self.without_retry_after += found.without_retry_after

    def report(self) -> str:
        """One line for the log of the run."""
        return (
            f"rounds {dict(sorted(self.rounds.items()))}, failovers {self.failovers}, "
            f"holds {self.holds}, paid {self.paid}, lost {len(self.lost)}, told {self.told}, "
            f"sales rebuilt {self.recovered}; first hold after the replicas: {_shown(self.waits)}; "
            f"with a rebuild: {_shown(self.waits_for_rebuild)}; "
            f"prepares {dict(self.prepared)}; success URLs {dict(self.returned)}; "
            f"rows {dict(self.rows)}; longest series of unknown outcomes {self.longest_unknown}"
        )


def _shown(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    found = sorted(seconds)
    middle, high = found[len(found) // 2], found[len(found) * 99 // 100]
    return (
        f"{middle:.2f} s (median), {high:.2f} s (p99), {found[-1]:.2f} s (longest of {len(found)})"
    )


class FailoverStage:
    """One service on one topology of Redis servers, with a PG of its own."""

    def __init__(
        self,
        topology: Sentinels | Cluster,
        served: Served,
        sandbox: RunningSandbox,
        acks: int,
        network: Hosts | None,
    ) -> None:
        self.topology, self.served, self.sandbox = topology, served, sandbox
        self.acks = acks
        self._network = network

    def master_of(self, sale_id: str) -> Node:
        """The master that serves the sale."""
        if isinstance(self.topology, Cluster):
            return self.topology.owner(slot_of(sale_id))
        return self.topology.master

    def shard_of(self, master: Node) -> list[Node]:
        """The master and its replicas."""
        if isinstance(self.topology, Sentinels):
            return self.topology.nodes
        return [
            node
            for node in self.topology.nodes
            if node is master or node.info("replication").get("master_port") == master.port
        ]

    def serving(self, shard: Sequence[Node]) -> tuple[int, str] | None:
        """The master with enough attached replicas, by port and run id; None without one."""
        found = None
        for node in shard:
            with suppress(RedisError):
                options = {
                    "socket_timeout": LOOK_SECONDS_MAX,
                    "socket_connect_timeout": LOOK_SECONDS_MAX,
                }
                with node.client(**options) as client:
                    info = client.info("replication")
                    if info["role"] == "master" and _online(info) >= self.acks:
                        found = (node.port, client.info("server")["run_id"])
        if found is not None and isinstance(self.topology, Sentinels):
            with suppress(RedisError, StopIteration):
                named = self.topology._master()
                return found if named is not None and named.port == found[0] else None
            return None
        return found

    def cut(self, some: Node, other: Node) -> None:
        """Lose all packets between these two servers."""
        assert self._network is not None
        self._network.cut([self._host(some)], [self._host(other)])

    def join(self, some: Node, other: Node) -> None:
        """Undo `cut`."""
        assert self._network is not None
        self._network.join([self._host(some)], [self._host(other)])

    def _host(self, node: Node) -> Any:
        assert self._network is not None
        return next(host for host in self._network if host.address == node.place.address)


@contextmanager
def stage(
    folder: Path, layout: str, *, acks: int, hosts_apart: bool = False
) -> Iterator[FailoverStage]:
    """A started stage.

    Args:
        folder: its files.
        layout: `sentinel` (1 + 2) or `cluster` (3 + 3).
        acks: the replicas that must acknowledge a change.
        hosts_apart: whether each server has a host of its own, whose links can be cut.
    """
    with ExitStack() as stack:
        network, options = None, {}
        if hosts_apart:
            network = stack.enter_context(hosts("r1", "r2", "r3"))
            places = [Place(host.address, host.before) for host in network]
            options = {
                "places": places,
                "lines": ["protected-mode no"],
                "sentinel_lines": ["protected-mode no"],
            }
        make = sentinels if layout == "sentinel" else cluster
        topology = stack.enter_context(make(folder / "redis", **options))
        pg = stack.enter_context(sandbox_process(folder)).sandbox
        served = stack.enter_context(
            service_on(
                topology.url,
                folder / "data",
                RESERVATION_REDIS_ACK_REPLICAS=str(acks),
                RESERVATION_TOSS_API_URL=pg.url,
                RESERVATION_TOSS_CHECKOUT_URL=pg.checkout_url,
            )
        )
        yield FailoverStage(topology, served, pg, acks, network)


class _Watch(threading.Thread):
    """Notes when the serving master of a shard changes."""

    def __init__(self, look: Callable[[], tuple[int, str] | None]) -> None:
        super().__init__(daemon=True)
        self._look = look
        self._stopped = threading.Event()
        self.value = look()
        self.changed_at = time.monotonic()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            value = self._look()
            if value != self.value:
                self.value, self.changed_at = value, time.monotonic()


def play(here: FailoverStage, fault: Fault, draw: random.Random, tally: Tally) -> None:
    """One round."""
    sale_ids = _sales_of_one_master(here)
    first = here.master_of(sale_ids[0])
    shard = here.shard_of(first)
    rebuilt: set[str] = set()
    with (
        shopping(here.served, here.sandbox, sale_ids, shoppers=SHOPPERS) as found,
        _Watch(lambda: here.serving(shard)) as watch,
    ):
        before = watch.value
        assert before is not None
        for sale_id in sale_ids:
            until(lambda sale_id=sale_id: found.of_sale(sale_id), "no hold")
        time.sleep(draw.uniform(0, 0.5))
        at = _strike(here, fault, first, shard, draw)
        _until_all_sell(here, found, watch, sale_ids, at, rebuilt)
        since = watch.changed_at
        for sale_id in sale_ids[:-1]:
            if (held_at := found.first_since(sale_id, since)) is not None:
                waits = tally.waits_for_rebuild if sale_id in rebuilt else tally.waits
                waits.append(held_at - since)
        after = watch.value
        until(lambda: _is_whole(here, shard), "the lost servers do not follow")
        time.sleep(0.3)
    tally.rounds[fault.value] += 1
    tally.failovers += after is not None and after[0] != before[0]
    tally.recovered += len(rebuilt)
    tally.add(found)
    _judge(here, found, sale_ids, tally)


def _sales_of_one_master(here: FailoverStage) -> list[str]:
    """Three sales in the slots of one master; the last one sells out."""

    def new(total: int) -> str:
        return here.served.sale(items=[item("a", total=total)])

    found = [new(MANY)]
    master = here.master_of(found[0])
    for total in (MANY, FEW):
        while here.master_of(sale_id := new(total)) is not master:
            pass
        found.append(sale_id)
    return found


def _strike(
    here: FailoverStage, fault: Fault, first: Node, shard: Sequence[Node], draw: random.Random
) -> float:
    """Let the fault happen, and end it; the moment at which the master was lost."""
    match fault:
        case Fault.KILL:
            first.kill()
            at = time.monotonic()
            time.sleep(RESTART_SECONDS)
            first.start()
        case Fault.FREEZE:
            first.freeze()
            at = time.monotonic()
            try:
                _until_another_serves(here, first, shard)
            finally:
                first.thaw()
        case Fault.PARTITION:
            behind, level = draw.sample([node for node in shard if node is not first], 2)
            here.cut(first, behind)
            lasts = CUT_SECONDS if here.acks == len(shard) - 1 else LONG_CUT_SECONDS
            time.sleep(draw.uniform(*lasts))
            # The host is lost, or its kernel would still deliver what the master had sent.
            here.cut(first, level)
            first.kill()
            level.kill()
            at = time.monotonic()
            until(lambda: behind.info("replication")["role"] == "master", "no failover")
            here.join(first, behind)
            here.join(first, level)
            first.start()
            level.start()
    return at


def _until_another_serves(here: FailoverStage, first: Node, shard: Sequence[Node]) -> None:
    others = [node for node in shard if node is not first]
    until(
        lambda: any(node.info("replication")["role"] == "master" for node in others),
        "no failover",
    )


def _until_all_sell(
    here: FailoverStage,
    found: Shopping,
    watch: _Watch,
    sale_ids: Sequence[str],
    at: float,
    rebuilt: set[str],
) -> None:
    """Wait for holds since the last change of the master; note the sales that a worker rebuilds.

    The last sale may be sold out by then.
    """
    sound = 0

    def sell() -> bool:
        nonlocal sound
        since = watch.changed_at
        if watch.value is None or since < at:
            return False
        recovering = here.served.http.get("/health/ready").json().get("recovering", {})
        sound += 1
        for sale_id in sale_ids:
            if sale_id in recovering:
                sound = 0
                rebuilt.add(sale_id)
        firsts = [found.first_since(sale_id, since) for sale_id in sale_ids[:-1]]
        return sound > SOUND and None not in firsts

    until(sell, "a sale does not sell again", seconds=SETTLE_SECONDS)


def _is_whole(here: FailoverStage, shard: Sequence[Node]) -> bool:
    infos = [node.info("replication") for node in shard]
    return max(_online(info) for info in infos) == len(shard) - 1


def _online(info: dict[str, Any]) -> int:
    replicas = [info.get(f"slave{number}", {}) for number in range(info["connected_slaves"])]
    return sum(replica.get("state") == "online" for replica in replicas)


def _judge(here: FailoverStage, found: Shopping, sale_ids: Sequence[str], tally: Tally) -> None:
    for sale_id in sale_ids:
        held = found.of_sale(sale_id)
        statuses = _settled(here, sale_id, held)
        for one in held:
            status = statuses[one.order_id]
            if status is None:
                tally.lost.append(one.order_id)
                tally.told += _is_told(here.served, one)
            elif one.is_confirmed:
                assert status == "CONFIRMED", (one.order_id, status, one.paid)
        taken = sum(status in TAKEN for status in statuses.values())
        available, reserved, sold = here.served.stock(sale_id)
        assert sold == sum(status == "CONFIRMED" for status in statuses.values())
        # Each key got its one certain answer, so no unit is held for anybody else.
        assert taken == reserved + sold, (sale_id, taken, reserved, sold)
        total = FEW if sale_id == sale_ids[-1] else MANY
        assert available + reserved + sold == total
        report = here.served.audit(sale_id)
        assert report["problems"] == [], report
        _check_money(here, held, statuses)


def _settled(here: FailoverStage, sale_id: str, held: Sequence[Held]) -> dict[str, str | None]:
    """The status of each order on the sale's master, once no payment is undecided.

    A payment whose process lost its master ends after its lease, which is cut short here.
    """
    began = time.monotonic()

    def read() -> dict[str, str | None]:
        with here.master_of(sale_id).client() as client:
            batch = client.pipeline(transaction=False)
            for one in held:
                batch.hget(f"rsv:{{{sale_id}}}:order:{one.order_id}", "status")
            found = dict(zip((one.order_id for one in held), batch.execute(), strict=True))
            if time.monotonic() - began > LEASE_SECONDS:
                for order_id in [name for name, status in found.items() if status == "CONFIRMING"]:
                    client.zadd(f"rsv:{{{sale_id}}}:confirming", {order_id: 1}, xx=True)
            return found

    return eventually(
        read, lambda statuses: "CONFIRMING" not in statuses.values(), within=SETTLE_SECONDS
    )


def _check_money(
    here: FailoverStage, held: Sequence[Held], statuses: dict[str, str | None]
) -> None:
    """The PG has the money of the sold orders, and no other."""
    paying = [one for one in held if one.payment_key]

    def kept() -> dict[str, int]:
        sums: Counter[str] = Counter()
        for entry in here.sandbox.ledger()["entries"]:
            sign = -1 if entry["kind"] in ("cancel", "deposit_reversed") else 1
            sums[entry["orderId"]] += sign * entry["amount"]
        return {one.order_id: sums[one.order_id] for one in paying}

    due = {
        one.order_id: one.order["amount"] if statuses[one.order_id] == "CONFIRMED" else 0
        for one in paying
    }
    eventually(kept, lambda found: found == due, within=SETTLE_SECONDS)


def _is_told(served: Served, held: Held) -> bool:
    """Whether the token of a lost hold gets `hold_lost`."""
    answer = served.http.get(
        f"/v1/reservations/{held.order_id}", headers={"X-Reservation-Token": held.order["token"]}
    )
    return answer.json().get("code") == "hold_lost"
