"""Faults of several hosts: links, servers of Redis, failovers, slots, SQL, the pooler, machines."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial

import redis

from reservation.adapters.redis.cluster_slots import slot_of
from tests.faults.chaos.environment import Stage, signal_all
from tests.faults.chaos.fault import Fault
from tests.faults.chaos.hosts_stage import MACHINES, HostsStage
from tests.faults.chaos.redis_faults import drop_clients, forget_scripts, keep_busy, pause_clients
from tests.support.hosts import OUTSIDE, Host
from tests.support.topologies import (
    SERVICE,
    Cluster,
    Node,
    Sentinels,
    migrate_atomically,
    migrate_by_keys,
)

__all__ = ["CLUSTER_FAULTS", "LINK_FAULTS", "MACHINE_FAULTS", "SENTINEL_FAULTS"]

Act = Callable[[HostsStage, random.Random], Awaitable[str]]

#: How long a link is cut: less and more than a failover takes.
CUT_SECONDS = (0.5, 2.0, 5.0, 10.0)
#: How long a server is away: less and more than a failover takes.
AWAY_SECONDS = (0.3, 2.0, 6.0, 10.0)
FROZEN_SECONDS = (0.5, 2.0, 6.0, 9.0)
#: Rates of a slow link, and the queues of one that loses.
SLOW_KBIT = (1_000, 4_000)
LOSSY_KBIT = (4_000, 12_000)
SLOW_QUEUE_BYTES, LOSSY_QUEUE_BYTES = 400_000, 6_000
MOVE_SECONDS_MAX = 30.0


def on_hosts(act: Act) -> Callable[[Stage, random.Random], Awaitable[str]]:
    """The action of a fault, for the stage of several hosts."""

    async def do(stage: Stage, chance: random.Random) -> str:
        assert isinstance(stage, HostsStage)
        return await act(stage, chance)

    return do


# Links.

#: The two ends of each kind of link.
LINKS = (
    ("the buyers", "the proxy"),
    ("the proxy", "a machine"),
    ("a machine", "the master"),
    ("a machine", "every server"),
    ("a machine", "the pooler"),
    ("a machine", "the PG"),
    ("the PG", "the proxy"),
    ("the pooler", "SQL"),
    ("the master", "the other servers"),
    ("a replica", "the other servers"),
)
_NAMES = {"the proxy": "front", "the pooler": "pool", "the PG": "gateway", "SQL": "sql"}


def chosen(stage: HostsStage, name: str, chance: random.Random) -> list[Host]:
    """The hosts of this name."""
    net = stage.network
    stores = [stage.host_of(node) for node in stage.redis_nodes]
    match name:
        case "the buyers":
            return [net[OUTSIDE]]
        case "a machine":
            return [net[chance.choice(MACHINES)]]
        case "the machines":
            return [net[one] for one in MACHINES]
        case "every server":
            return stores
        case "the master":
            return [stage.host_of(stage.master())]
        case "a replica":
            master = stage.host_of(stage.master())
            return [chance.choice([one for one in stores if one is not master])]
        case _:
            return [net[_NAMES[name]]]


def ends(
    stage: HostsStage, one: str, other: str, chance: random.Random
) -> tuple[list[Host], list[Host]]:
    """The hosts at both ends of a link."""
    some = chosen(stage, one, chance)
    if other == "the other servers":
        stores = [stage.host_of(node) for node in stage.redis_nodes]
        return some, [host for host in stores if host not in some]
    return some, chosen(stage, other, chance)


async def cut_link(
    one: str, other: str, direction: str, stage: HostsStage, chance: random.Random
) -> str:
    """A link is cut for a while, in one direction or in both."""
    some, others = await asyncio.to_thread(ends, stage, one, other, chance)
    seconds = chance.choice(CUT_SECONDS)
    source, target = (others, some) if direction == "back" else (some, others)
    try:
        await asyncio.to_thread(stage.network.cut, source, target, both=direction == "both")
        await asyncio.sleep(seconds)
    finally:
        await asyncio.to_thread(stage.network.join, some, others)
    return f"{seconds} s: {_words(some)} and {_words(others)}"


async def part(side: Sequence[str], stage: HostsStage, chance: random.Random) -> str:
    """These hosts are cut off from all the others; the buyers reach both sides."""
    inside: list[Host] = []
    for name in side:
        inside += await asyncio.to_thread(chosen, stage, name, chance)
    outside = [host for host in stage.network if host not in inside]
    seconds = chance.choice(CUT_SECONDS)
    try:
        await asyncio.to_thread(stage.network.cut, inside, outside)
        await asyncio.sleep(seconds)
    finally:
        await asyncio.to_thread(stage.network.join, inside, outside)
    return f"{seconds} s: {_words(inside)}"


async def flap(name: str, stage: HostsStage, chance: random.Random) -> str:
    """The links of a host come and go."""
    some = await asyncio.to_thread(chosen, stage, name, chance)
    others = [host for host in stage.network if host not in some]
    times = chance.randint(3, 8)
    for _ in range(times):
        try:
            await asyncio.to_thread(stage.network.cut, some, others)
            await asyncio.sleep(chance.uniform(0.1, 0.6))
        finally:
            await asyncio.to_thread(stage.network.join, some, others)
        await asyncio.sleep(chance.uniform(0.1, 0.6))
    return f"{times} times: {_words(some)}"


async def limit(
    name: str, rates: Sequence[int], queue_bytes: int, stage: HostsStage, chance: random.Random
) -> str:
    """The links of a host are slow, or lose what their short queue cannot take."""
    some = await asyncio.to_thread(chosen, stage, name, chance)
    rate, seconds = chance.choice(rates), chance.uniform(1, 6)
    try:
        for host in some:
            await asyncio.to_thread(host.limit, rate, queue_bytes)
        await asyncio.sleep(seconds)
    finally:
        for host in some:
            await asyncio.to_thread(host.unlimit)
    return f"{rate} kbit/s for {seconds:.1f} s: {_words(some)}"


def _words(some: Sequence[Host]) -> str:
    return ", ".join(host.name for host in some)


def _link_faults() -> tuple[Fault, ...]:
    found: list[Fault] = []
    for one, other in LINKS:
        weight = 4 if "the master" in (one, other) else 2
        for direction, words in (
            ("both", f"{one} and {other} are cut off"),
            ("forth", f"packets from {one} to {other} are lost"),
            ("back", f"packets from {other} to {one} are lost"),
        ):
            act = partial(cut_link, one, other, direction)
            found.append(Fault(f"link: {words}", weight, on_hosts(act)))
    sides = {
        "the master is alone": ("the master",),
        "a machine is alone": ("a machine",),
        "the master and a machine are alone": ("the master", "a machine"),
        "the machines are alone": ("the machines",),
        "a replica is alone": ("a replica",),
    }
    found += [
        Fault(f"hosts: {words}", 5, on_hosts(partial(part, side))) for words, side in sides.items()
    ]
    for name in ("a machine", "the master", "the proxy", "the pooler", "SQL", "the PG"):
        slow = partial(limit, name, SLOW_KBIT, SLOW_QUEUE_BYTES)
        lossy = partial(limit, name, LOSSY_KBIT, LOSSY_QUEUE_BYTES)
        found += [
            Fault(f"link: {name} is slow", 2, on_hosts(slow)),
            Fault(f"link: {name} loses packets", 2, on_hosts(lossy)),
        ]
    for name in ("a machine", "the master"):
        found.append(Fault(f"link: {name} flaps", 3, on_hosts(partial(flap, name))))
    return tuple(found)


LINK_FAULTS = _link_faults()


# Servers of Redis.


def _replicas(stage: HostsStage, master: Node) -> list[Node]:
    if isinstance(stage.topology, Sentinels):
        return [node for node in stage.redis_nodes if node is not master]
    found: list[Node] = []
    for node in stage.redis_nodes:
        with suppress(redis.RedisError):
            facts = node.info("replication")
            if facts["role"] == "slave" and int(facts["master_port"]) == master.port:
                found.append(node)
    return found


def _servers(stage: HostsStage, name: str, chance: random.Random) -> list[Node]:
    """The servers of this name, of the current sale."""
    master = stage.master()
    match name:
        case "the master":
            return [master]
        case "a replica":
            # A master of a cluster may have lost its replica to another one.
            return _replicas(stage, master)[:1]
        case "every replica":
            return _replicas(stage, master)
        case "a sentinel":
            assert isinstance(stage.topology, Sentinels)
            return chance.sample(stage.topology.sentinels, 1)
        case "two sentinels":
            assert isinstance(stage.topology, Sentinels)
            return chance.sample(stage.topology.sentinels, 2)
        case _:
            assert isinstance(stage.topology, Sentinels)
            own = next(one for one in stage.topology.sentinels if one.place == master.place)
            return [master, own]


async def kill(name: str, stage: HostsStage, chance: random.Random) -> str:
    """SIGKILL; started again after a while."""
    nodes = await asyncio.to_thread(_servers, stage, name, chance)
    seconds = chance.choice(AWAY_SECONDS)
    try:
        for node in nodes:
            await asyncio.to_thread(node.kill)
        await asyncio.sleep(seconds)
    finally:
        for node in nodes:
            await asyncio.to_thread(node.start)
    return f"{len(nodes)} away for {seconds} s" if nodes else ""


async def freeze(name: str, stage: HostsStage, chance: random.Random) -> str:
    """SIGSTOP, and later SIGCONT."""
    nodes = await asyncio.to_thread(_servers, stage, name, chance)
    seconds = chance.choice(FROZEN_SECONDS)
    try:
        for node in nodes:
            node.freeze()
        await asyncio.sleep(seconds)
    finally:
        for node in nodes:
            node.thaw()
    return f"{len(nodes)} for {seconds} s" if nodes else ""


async def fail_over(stage: HostsStage, chance: random.Random) -> str:
    """SENTINEL FAILOVER: a replica is promoted without a vote."""
    assert isinstance(stage.topology, Sentinels)
    sentinel = chance.choice(stage.topology.sentinels)
    await asyncio.to_thread(sentinel.execute, "SENTINEL", "FAILOVER", SERVICE)
    await asyncio.sleep(1)
    return "asked for"


async def promote(option: str, stage: HostsStage, chance: random.Random) -> str:
    """CLUSTER FAILOVER on a replica of the sale's master."""

    def ask() -> str:
        replicas = _replicas(stage, stage.master())
        if not replicas:
            return ""
        words = [option] if option else []
        chance.choice(replicas).execute("CLUSTER", "FAILOVER", *words)
        return "asked for"

    asked = await asyncio.to_thread(ask)
    await asyncio.sleep(1)
    return asked


def _end_move(topology: Cluster, slot: int) -> None:
    """Cancel the move of the slot on every server, because another fault prevented it."""
    for node in topology.nodes:
        with suppress(redis.RedisError):
            node.execute("CLUSTER", "SETSLOT", slot, "STABLE")


async def move_slot(way: str, stage: HostsStage, chance: random.Random) -> str:
    """The sale's slot moves to another master."""
    topology = stage.topology
    assert isinstance(topology, Cluster)
    slot = slot_of(stage.sale_id)

    def move() -> str:
        source = stage.master()
        others = [node for node in topology.masters() if node is not source]
        target = chance.choice(others)
        if way == "atomic":
            migrate_atomically(source, target, slot)
            return f"{source.port} to {target.port}"
        give_up_at = time.monotonic() + MOVE_SECONDS_MAX
        while topology.owner(slot) is not target:
            # A slot that stays between two servers would keep its sales closed.
            with suppress(redis.RedisError):
                migrate_by_keys(topology, source, target, slot)
            if time.monotonic() > give_up_at:
                _end_move(topology, slot)
                return f"{source.port} to {target.port}, given up"
            time.sleep(0.2)
        return f"{source.port} to {target.port}"

    return await asyncio.to_thread(move)


async def kill_during_move(stage: HostsStage, chance: random.Random) -> str:
    """The slot's master is killed while the slot moves in one step."""
    moved = await move_slot("atomic", stage, chance)
    await asyncio.sleep(chance.uniform(0, 0.2))
    return f"{moved}, {await kill('the master', stage, chance)}"


def _server_faults(names: Sequence[tuple[str, int]]) -> tuple[Fault, ...]:
    found: list[Fault] = []
    for name, weight in names:
        verb = "are" if name.startswith("two") or " and " in name else "is"
        found += [
            Fault(f"redis: {name} {verb} killed", weight, on_hosts(partial(kill, name))),
            Fault(f"redis: {name} {verb} frozen", weight, on_hosts(partial(freeze, name))),
        ]
    found += [
        Fault("redis: the master forgets the scripts", 2, forget_scripts),
        Fault("redis: the master drops its clients", 2, drop_clients),
        Fault("redis: the master pauses its clients", 2, pause_clients),
        Fault("redis: the master is busy with another script", 2, keep_busy),
    ]
    return tuple(found)


SENTINEL_FAULTS = (
    *_server_faults(
        [
            ("the master", 10),
            ("a replica", 4),
            ("every replica", 3),
            ("a sentinel", 3),
            ("two sentinels", 2),
            ("the master and its sentinel", 6),
        ]
    ),
    Fault("redis: a failover is forced", 8, on_hosts(fail_over)),
)

CLUSTER_FAULTS = (
    *_server_faults([("the master", 8), ("a replica", 3), ("every replica", 2)]),
    Fault("redis: CLUSTER FAILOVER", 6, on_hosts(partial(promote, ""))),
    Fault("redis: CLUSTER FAILOVER FORCE", 4, on_hosts(partial(promote, "FORCE"))),
    Fault("redis: CLUSTER FAILOVER TAKEOVER", 3, on_hosts(partial(promote, "TAKEOVER"))),
    Fault("redis: a slot moves in one step", 8, on_hosts(partial(move_slot, "atomic"))),
    Fault("redis: a slot moves key by key", 5, on_hosts(partial(move_slot, "by keys"))),
    Fault("redis: the master is killed while a slot moves", 4, on_hosts(kill_during_move)),
)


# Machines, and the parts between them and their data.


async def restart_sql(stage: HostsStage, chance: random.Random) -> str:
    """PostgreSQL ends, cleanly or by a crash, and starts again."""
    number = chance.choice([signal.SIGINT, signal.SIGQUIT])
    seconds = chance.choice(AWAY_SECONDS)

    def stop() -> None:
        stage.postgres.stop(number)

    try:
        await asyncio.to_thread(stop)
        await asyncio.sleep(seconds)
    finally:
        await asyncio.to_thread(stage.start_sql)
    return f"{number.name}, away for {seconds} s"


async def freeze_sql(stage: HostsStage, chance: random.Random) -> str:
    """SIGSTOP to every process of PostgreSQL, and later SIGCONT."""
    seconds = chance.choice(FROZEN_SECONDS)
    processes = stage.sql_processes()
    signal_all(processes, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        signal_all(processes, signal.SIGCONT)
    return f"{seconds} s"


async def restart_part(
    name: str, start: str, kill: bool, stage: HostsStage, chance: random.Random
) -> str:
    """The pooler, the PG or the proxy ends, and starts again."""
    seconds = chance.choice(AWAY_SECONDS[:3])
    try:
        await asyncio.to_thread(stage.end, name, kill=kill)
        await asyncio.sleep(seconds)
    finally:
        await asyncio.to_thread(getattr(stage, start))
    return f"away for {seconds} s"


async def freeze_part(name: str, stage: HostsStage, chance: random.Random) -> str:
    """SIGSTOP, and later SIGCONT."""
    seconds = chance.choice(FROZEN_SECONDS)
    processes = stage.part(name)
    signal_all(processes, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        signal_all(processes, signal.SIGCONT)
    return f"{seconds} s"


async def pause_pool(stage: HostsStage, chance: random.Random) -> str:
    """PAUSE: the pooler gives out no connection until RESUME."""
    seconds = chance.choice(FROZEN_SECONDS)
    process = stage.process("pool")
    process.send_signal(signal.SIGUSR1)
    try:
        await asyncio.sleep(seconds)
    finally:
        process.send_signal(signal.SIGUSR2)
    return f"{seconds} s"


async def replace_processes(stage: HostsStage, chance: random.Random) -> str:
    """SIGHUP: a machine replaces its processes while it serves."""
    machine = chance.choice([one for one in stage.machines if one.served is not None])
    assert machine.served is not None
    machine.served.process.send_signal(signal.SIGHUP)
    await asyncio.sleep(5)
    return machine.host.name


async def roll(stage: HostsStage, _: random.Random) -> str:
    """One machine after the other is restarted."""
    for machine in stage.machines:
        await stage.stop_machine(machine)
        await stage.start_machine(machine)
    return f"{len(stage.machines)} machines"


async def freeze_machine(stage: HostsStage, chance: random.Random) -> str:
    """SIGSTOP to the supervisor and all processes of one machine, and later SIGCONT."""
    machine = chance.choice([one for one in stage.machines if one.served is not None])
    seconds = chance.choice(FROZEN_SECONDS)
    processes = stage.processes_of(machine)
    signal_all(processes, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        signal_all(processes, signal.SIGCONT)
    return f"{machine.host.name} for {seconds} s"


def _parts() -> tuple[Fault, ...]:
    found: list[Fault] = []
    for words, name, start in (
        ("the pooler", "pool", "start_pool"),
        ("the PG", "gateway", "start_gateway"),
        ("the proxy", "front", "start_front"),
    ):
        killed, ended = (
            partial(restart_part, name, start, True),
            partial(restart_part, name, start, False),
        )
        found += [
            Fault(f"{words} is killed", 3, on_hosts(killed)),
            Fault(f"{words} is restarted", 2, on_hosts(ended)),
            Fault(f"{words} is frozen", 2, on_hosts(partial(freeze_part, name))),
        ]
    return tuple(found)


MACHINE_FAULTS = (
    *_parts(),
    Fault("the pooler pauses", 3, on_hosts(pause_pool)),
    Fault("SQL is restarted", 4, on_hosts(restart_sql)),
    Fault("SQL is frozen", 4, on_hosts(freeze_sql)),
    Fault("a machine replaces its processes", 3, on_hosts(replace_processes)),
    Fault("a machine is frozen", 4, on_hosts(freeze_machine)),
    Fault("the machines are restarted one after the other", 2, on_hosts(roll)),
)
