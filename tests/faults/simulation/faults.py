"""Faults of a simulated sale, their times and durations: drawn from the seed, one by one."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from reservation import failpoints
from reservation.sandbox.faults import Fault
from tests.faults.simulation.clients import PG
from tests.faults.simulation.loop import CURRENT
from tests.faults.simulation.network import Link
from tests.faults.simulation.operators import Operator
from tests.faults.simulation.processes import Process
from tests.faults.simulation.world import Slot, World

__all__ = ["KINDS", "Faults"]

#: Maximum downtime of a killed process.
AWAY_SECONDS = 10.0
#: Beyond the lease on a payment (75 s), so that a frozen process wakes up to find it taken over.
FROZEN_SECONDS = (0.5, 3.0, 20.0, 100.0)
#: Below the checker's tolerance between two machines' clocks; beyond the service's.
JUMP_MS = (-900, -600, 600, 900)


class Faults:
    """Injects the faults of a plan.

    Args:
        world: their target.
        operator: sets the PG's faults.
        draw: the source of randomness.
    """

    def __init__(self, world: World, operator: Operator, draw: random.Random) -> None:
        self._world = world
        self._operator = operator
        self._draw = draw
        self._tasks: list[asyncio.Task[None]] = []

    def let_loose(self, count: int, seconds: float) -> None:
        """Inject this many faults within this many seconds."""
        for number in range(count):
            at = self._draw.random() * seconds
            kind = self._draw.choice(list(KINDS))
            # Its own random source: the draws of one fault shift no other's.
            draw = self._world.luck("fault", number)
            self._tasks.append(asyncio.create_task(self._later(at, kind, draw)))

    def end(self) -> None:
        """No more of them; the world ends those that last."""
        failpoints.disarm()
        for task in self._tasks:
            task.cancel()

    async def _later(self, at: float, kind: str, draw: random.Random) -> None:
        await asyncio.sleep(at)
        self._world.trace.note("fault", kind, "")
        self._world.trace.note(f"fault: {kind}", "", "")
        await KINDS[kind](self._world, self._operator, draw)


def _slot(world: World, draw: random.Random) -> Slot:
    return draw.choice(world.slots)


async def _kill(world: World, _: Operator, draw: random.Random) -> None:
    _slot(world, draw).kill(draw.random() * AWAY_SECONDS)


async def _kill_at_a_point(world: World, _: Operator, draw: random.Random) -> None:
    """The next process that passes dies at that point."""
    point = draw.choice(failpoints.POINTS)
    away = draw.random() * AWAY_SECONDS

    def die(_: str) -> None:
        process: Process | None = CURRENT.get()
        slot = next((one for one in world.slots if one.process is process), None)
        if slot is not None:
            failpoints.arm(point, lambda _: None)
            world.trace.note("dies-at", slot.name, point)
            slot.kill(away)

    failpoints.arm(point, die)


async def _freeze(world: World, _: Operator, draw: random.Random) -> None:
    slot = _slot(world, draw)
    process = slot.process
    if process is None or not process.alive:
        return
    process.freeze()
    await asyncio.sleep(draw.choice(FROZEN_SECONDS) * draw.random())
    process.thaw()


async def _freeze_at_a_point(world: World, _: Operator, draw: random.Random) -> None:
    """The next process that passes freezes at that point, and resumes after others have gone on."""
    point = draw.choice(failpoints.POINTS)
    seconds = draw.choice(FROZEN_SECONDS) * draw.random()

    def stop(_: str) -> None:
        process: Process | None = CURRENT.get()
        if process is None or process.halted:
            return
        failpoints.arm(point, lambda _: None)
        world.trace.note("stops-at", process.name, point)
        process.freeze()
        world.later(seconds, process.thaw)

    failpoints.arm(point, stop)


async def _redis_restarts(world: World, _: Operator, draw: random.Random) -> None:
    world.redis.restart(draw.random() * 5.0)


async def _redis_stalls(world: World, _: Operator, draw: random.Random) -> None:
    world.redis.stalled_until = world.loop.now + draw.choice((0.3, 1.5, 4.0))


async def _sql_away(world: World, _: Operator, draw: random.Random) -> None:
    world.sql.away_until = world.loop.now + draw.choice((0.5, 3.0, 15.0))


async def _spoil(link: Link, draw: random.Random, late_seconds: tuple[float, ...]) -> None:
    """A bad link for a while."""
    if draw.random() < 0.7:
        link.bad = draw.choice((0.02, 0.1, 0.3))
    else:
        link.late, link.late_seconds = draw.choice((0.05, 0.3)), draw.choice(late_seconds)
    await asyncio.sleep(draw.choice((1.0, 5.0, 20.0)))
    link.bad = link.late = 0.0


async def _redis_link(world: World, _: Operator, draw: random.Random) -> None:
    # A script that arrives 2 s late does nothing; after 3 s its caller has timed out.
    await _spoil(world.weather.redis, draw, (1.0, 2.5, 6.0))


async def _sql_link(world: World, _: Operator, draw: random.Random) -> None:
    await _spoil(world.weather.sql, draw, (0.5, 2.0))


async def _pg_link(world: World, _: Operator, draw: random.Random) -> None:
    # A confirm's time-out is a minute.
    await _spoil(world.weather.pg, draw, (3.0, 15.0, 90.0))


async def _web_link(world: World, _: Operator, draw: random.Random) -> None:
    await _spoil(world.weather.web, draw, (2.0, 15.0))


async def _pg_misbehaves(world: World, operator: Operator, draw: random.Random) -> None:
    """One of the sandbox's own faults."""
    fault = draw.choice(list(Fault))
    wish: dict[str, Any] = {
        "fault": fault.value,
        "operations": draw.choice((["confirm"], ["look_up"], ["cancel"], ["confirm", "look_up"])),
        "rate": draw.choice((0.3, 1.0)),
        "seed": draw.randrange(1000),
        "times": draw.choice((1, 3, 10)),
        "seconds": draw.choice((5.0, 75.0)),
    }
    world.trace.note("pg-fault", "pg", fault.value)
    await operator.call("POST", f"{PG}/_faults", wish)


async def _clock_jumps(world: World, _: Operator, draw: random.Random) -> None:
    process = _slot(world, draw).process
    if process is not None:
        process.skew_ms = draw.choice(JUMP_MS)


#: Every kind, by its name.
KINDS: dict[str, Callable[[World, Operator, random.Random], Awaitable[None]]] = {
    "kill": _kill,
    "kill at a point": _kill_at_a_point,
    "freeze": _freeze,
    "freeze at a point": _freeze_at_a_point,
    "redis restarts": _redis_restarts,
    "redis stalls": _redis_stalls,
    "redis link": _redis_link,
    "sql away": _sql_away,
    "sql link": _sql_link,
    "pg link": _pg_link,
    "pg misbehaves": _pg_misbehaves,
    "web link": _web_link,
    "clock jumps": _clock_jumps,
}
