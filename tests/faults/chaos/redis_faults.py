"""Faults of Redis: its process, its disk, its memory, its configuration, its network."""

import asyncio
import os
import random
import signal
from functools import partial

from tests.faults.chaos.environment import Stage
from tests.faults.chaos.fault import Fault
from tests.faults.chaos.network import Trouble

__all__ = ["REDIS_FAULTS", "drop_clients", "forget_scripts", "keep_busy", "pause_clients"]

#: Free memory at the limit.
SPARE_BYTES = 64 * 1024
BUSY_SCRIPT = """
local function now() local t = redis.call("TIME") return t[1] * 1000 + t[2] / 1000 end
local over = now() + ARGV[1]
while now() < over do end
"""


async def kill(stage: Stage, chance: random.Random) -> str:
    """SIGKILL; started again after a while."""
    await stage.kill_redis()
    return await _again(stage, chance)


async def kill_while_it_rewrites(stage: Stage, chance: random.Random) -> str:
    """SIGKILL, in the middle of a rewrite of its file."""
    async with stage.redis() as client:
        await client.bgrewriteaof()
    await asyncio.sleep(chance.uniform(0, 0.3))
    await stage.kill_redis()
    return await _again(stage, chance)


async def cut_power(stage: Stage, chance: random.Random) -> str:
    """SIGKILL, and the bytes that no sync had made durable are lost."""
    if stage.machine is None:
        return ""
    lost = await stage.cut_power(stage.machine)
    return f"{lost} bytes gone, {await _again(stage, chance)}"


async def _again(stage: Stage, chance: random.Random) -> str:
    pause = chance.choice([0.0, 0.1, 0.5, 1.5])
    await asyncio.sleep(pause)
    await stage.start_redis()
    return f"down for {pause} s"


async def fill_the_disk(stage: Stage, chance: random.Random) -> str:
    """No write to a file succeeds: Redis exits, and does not start before there is room."""
    if stage.machine is None:
        return ""
    stage.machine.be(disk_full=True)
    try:
        await asyncio.sleep(chance.choice([0.3, 1.0, 2.0]))
    finally:
        stage.machine.be()
    ended = stage.server.returncode is not None
    await stage.start_redis()
    return "it ended" if ended else "nothing was written meanwhile"


async def slow_the_disk(stage: Stage, chance: random.Random) -> str:
    """Each sync takes longer."""
    if stage.machine is None:
        return ""
    delay, seconds = chance.choice([0.02, 0.2, 2.0]), chance.uniform(1, 4)
    stage.machine.be(sync_delay=delay)
    try:
        await asyncio.sleep(seconds)
    finally:
        stage.machine.be()
    return f"{delay} s a sync for {seconds:.1f} s"


async def turn_the_clock(stage: Stage, chance: random.Random) -> str:
    """Redis' clock jumps, and back again."""
    if stage.machine is None:
        return ""
    jump, seconds = chance.choice([-60, -5, 5, 60]), chance.uniform(0.5, 4)
    stage.machine.be(clock_off=jump)
    try:
        await asyncio.sleep(seconds)
    finally:
        stage.machine.be()
    return f"{jump:+} s for {seconds:.1f} s"


async def freeze(stage: Stage, chance: random.Random) -> str:
    """SIGSTOP, and later SIGCONT."""
    pid = stage.server.pid
    if pid is None:
        return ""
    seconds = chance.choice([0.2, 0.5, 1.0, 3.0])
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
    return f"{seconds} s"


async def pause_clients(stage: Stage, chance: random.Random) -> str:
    """No client gets an answer for a while."""
    milliseconds = chance.choice([100, 400, 900])
    async with stage.redis() as client:
        await client.execute_command("CLIENT", "PAUSE", milliseconds, "ALL")
        await asyncio.sleep(milliseconds / 1000)
    return f"{milliseconds} ms"


async def drop_clients(stage: Stage, _: random.Random) -> str:
    """Every connection is closed by the server."""
    async with stage.redis() as client:
        dropped = await client.execute_command("CLIENT", "KILL", "TYPE", "NORMAL", "SKIPME", "YES")
    return f"{dropped} connections"


async def keep_busy(stage: Stage, chance: random.Random) -> str:
    """A script that takes long."""
    milliseconds = chance.choice([50, 200, 800])
    async with stage.redis() as client:
        await client.eval(BUSY_SCRIPT, 0, milliseconds)
    return f"{milliseconds} ms"


async def forget_scripts(stage: Stage, _: random.Random) -> str:
    """SCRIPT FLUSH: the next calls find nothing."""
    async with stage.redis() as client:
        await client.script_flush()
    return "all scripts"


async def run_out_of_memory(stage: Stage, chance: random.Random) -> str:
    """The limit is just above the memory in use."""
    seconds = chance.uniform(0.5, 3)
    async with stage.redis() as client:
        limit = (await client.config_get("maxmemory"))["maxmemory"]
        used = (await client.info("memory"))["used_memory"]
        await client.config_set("maxmemory", used + SPARE_BYTES)
    await asyncio.sleep(seconds)
    await _set(stage, "maxmemory", limit)
    return f"{seconds:.1f} s"


async def drift(name: str, value: str, stage: Stage, chance: random.Random) -> str:
    """A setting has a wrong value; the preflight has to detect it."""
    seconds = chance.uniform(1, 7)
    async with stage.redis() as client:
        before = (await client.config_get(name))[name]
    await _set(stage, name, value)
    await asyncio.sleep(seconds)
    await _set(stage, name, before)
    return f"{name} {value} for {seconds:.1f} s"


async def become_a_replica(stage: Stage, chance: random.Random) -> str:
    """It answers READONLY, as the replica of an unreachable master."""
    seconds = chance.uniform(0.3, 3)
    async with stage.redis() as client:
        await client.execute_command("REPLICAOF", "127.0.0.1", "1")
    await asyncio.sleep(seconds)
    async with stage.redis() as client:
        await client.execute_command("REPLICAOF", "NO", "ONE")
    return f"{seconds:.1f} s"


async def _set(stage: Stage, name: str, value: str) -> None:
    async with stage.redis() as client:
        await client.config_set(name, value)


async def cut_connections(stage: Stage, _: random.Random) -> str:
    """Every connection on the way is reset."""
    before = stage.link.lost
    stage.link.reset()
    await asyncio.sleep(0)
    return f"{stage.link.lost - before} connections"


async def way_in_trouble(trouble: Trouble, stage: Stage, chance: random.Random) -> str:
    """The network has this trouble for a while."""
    slow = trouble is Trouble.SLOW
    delay = chance.choice([0.005, 0.05, 0.2]) if slow else 0.0
    seconds, before = chance.uniform(0.3, 2.5), stage.link.lost
    with stage.link.trouble(trouble, delay):
        await asyncio.sleep(seconds)
    effect = f"{delay * 1000:.0f} ms more" if slow else f"{stage.link.lost - before} connections"
    return f"{effect} in {seconds:.1f} s"


REDIS_FAULTS = (
    Fault("redis is killed", 10, kill),
    Fault("redis is killed while it rewrites its file", 4, kill_while_it_rewrites),
    Fault("redis loses power", 8, cut_power),
    Fault("redis' disk is full", 4, fill_the_disk),
    Fault("redis' disk is slow", 3, slow_the_disk),
    Fault("redis' clock jumps", 4, turn_the_clock),
    Fault("redis is frozen", 6, freeze),
    Fault("redis pauses its clients", 3, pause_clients),
    Fault("redis drops its clients", 5, drop_clients),
    Fault("redis is busy with another script", 3, keep_busy),
    Fault("redis forgets the scripts", 4, forget_scripts),
    Fault("redis has no memory left", 4, run_out_of_memory),
    Fault("redis does not sync any more", 2, partial(drift, "appendfsync", "no")),
    Fault("redis may evict", 2, partial(drift, "maxmemory-policy", "allkeys-lru")),
    Fault("redis is a replica", 4, become_a_replica),
    Fault("the way resets connections", 5, cut_connections),
    Fault("the way loses requests", 6, partial(way_in_trouble, Trouble.LOSES_REQUESTS)),
    Fault("the way loses replies", 6, partial(way_in_trouble, Trouble.LOSES_REPLIES)),
    Fault("the way is a black hole", 4, partial(way_in_trouble, Trouble.BLACK_HOLE)),
    Fault("the way is slow", 4, partial(way_in_trouble, Trouble.SLOW)),
)
