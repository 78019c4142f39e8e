"""Histories of the model of partitions, replayed step by step by the scripts on a real server.

After each step the partition on the server equals the model's, and the script's word is the
model's, so a failure ends with the step at which they part.
"""

import asyncio
from collections import Counter
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings

from reservation.adapters.redis.client import RedisClient
from tests.support.in_process import Bench, bench
from tests.support.lua_sale import NOW
from tests.support.partition_losses import LossReplay
from tests.support.partition_replay import Replay, is_replayed
from tests.unit.partitions.explorer import next_steps, trace_text
from tests.unit.partitions.invariants import noted
from tests.unit.partitions.scenarios import FOR_EACH_RULE, order, scenario_of
from tests.unit.partitions.sizes import QUICK
from tests.unit.partitions.test_random_histories import SEEDS, SLOW_TO_DRAW, sales
from tests.unit.partitions.world import Buyer, Scenario, Step, World

EXAMPLES, SOAK_EXAMPLES = 150, 3_000
#: Histories of each small scenario, and their longest.
SEEDS_EACH, STEPS_MAX = 25, 120

OVERDUE_AT_HOME = scenario_of(
    ((1,), (1,)),
    (order(0, 1), order(0, 1), order(0, 2)),
    (Buyer(0), Buyer(1, after=("claim", "decline")), Buyer(2)),
    deadlines=frozenset({0, 1, 2}),
    rounds=2,
)
#: A server cannot go back here, and no script reserves the units that an operator withdraws.
SCENARIOS = {
    name: scenario
    for name, scenario in (FOR_EACH_RULE | QUICK | {"overdue at home": OVERDUE_AT_HOME}).items()
    if not scenario.has_losses and not any(number is not None for number in scenario.reservations)
}
#: Those in which a server, or a server and SQL, go back.
LOSSES = {
    name: scenario
    for name, scenario in (FOR_EACH_RULE | QUICK).items()
    if scenario.has_losses and not scenario.changes
}
LOSS_SEEDS_EACH = 12
REACHED_BY_LOSSES = {
    "step: loses events",
    "step: and SQL are restored",
    "step: compares",
    "step: opens",
    "lent again",
    "borrowed again",
    "lend: recovering",
    "borrow: held",
    "lend: lent",
}
#: Replies that the small scenarios reach together.
REACHED = {
    "prepare: held",
    "prepare: replayed",
    "prepare: limit_exceeded",
    "prepare: due",
    "prepare: dry",
    "lend: lent",
    "lend: due",
    "lend: dry",
    "borrow: held",
    "borrow: borrowed",
    "borrow: done",
    "refused borrow: limit_exceeded",
    "refused borrow: dry",
    "claim: late",
    "claim: claimed",
    "read: expire",
    "read: changed",
    "read: no certificate",
    "read: sold_out",
}


def replayed_steps(scenario: Scenario, world: World) -> list[Step]:
    """The possible steps that the scripts have."""
    steps, _ = next_steps(scenario, world)
    return [step for step in steps if is_replayed(step[0], world, scenario)]


async def replayed(url: str, scenario: Scenario, draw: Random, seen: Counter[str]) -> None:
    """Play one history of drawn steps in the model and on the server."""
    connections = RedisClient(url, clock=NOW)
    await connections.measure_offset()
    replay = Replay(connections, scenario, seen)
    world = noted(scenario, scenario.start())
    trace: list[tuple[object, ...]] = []
    try:
        await replay.open()
        for _ in range(STEPS_MAX):
            steps = replayed_steps(scenario, world)
            if not steps:
                break
            label, stepped = draw.choice(steps)
            trace.append(label)
            await replay.step(label, world, stepped)
            world = noted(scenario, stepped, world)
        await replay.end(world)
    except AssertionError as error:
        error.add_note(trace_text(trace))
        raise
    finally:
        await connections.aclose()


async def test_the_scripts_follow_the_model_in_each_small_scenario(each_server_url: str) -> None:
    seen: Counter[str] = Counter()
    for name, scenario in SCENARIOS.items():
        for seed in range(SEEDS_EACH):
            await replayed(each_server_url, scenario, Random(f"{name} {seed}"), seen)
    assert set(seen) >= REACHED, REACHED - set(seen)


def with_useful_losses(steps: list[Step], world: World, draw: Random) -> list[Step]:
    """The steps to draw from: a restore removes a lend that a peer has, in half of the histories.

    Drawn without that, a restore almost always comes before the first transfer.
    """
    restores = [step for step in steps if step[0][2:] == ("and SQL are restored",)]
    useful = [step for step in restores if is_lent(world, int(str(step[0][1])))]
    if useful and draw.random() < 1 / 2:
        return useful
    return [step for step in steps if step not in restores] or steps


def is_lent(world: World, place: int) -> bool:
    """Whether a peer has received units of this partition."""
    lent = world.partitions[place].lent
    return any(lot.number for lot in lent) and any(
        row.donor == place and peer.received[place * len(peer.total) + row.sku].number
        for row in world.rows
        for peer in [world.partitions[row.receiver]]
    )


async def replayed_with_losses(
    here: Bench, scenario: Scenario, draw: Random, seen: Counter[str]
) -> None:
    """Play one history with losses in the model, on the server and in SQL."""
    replay = LossReplay(here, scenario, seen)
    world = noted(scenario, scenario.start())
    trace: list[tuple[object, ...]] = []
    try:
        await replay.open()
        for _ in range(STEPS_MAX):
            steps = replayed_steps(scenario, world)
            if not steps:
                break
            label, stepped = draw.choice(with_useful_losses(steps, world, draw))
            trace.append(label)
            await replay.step(label, world, stepped)
            world = noted(scenario, stepped, world)
        await replay.end(world)
    except AssertionError as error:
        error.add_note(trace_text(trace))
        raise
    finally:
        await replay.aclose()


async def test_the_rebuild_follows_the_model_after_each_loss(
    tmp_path: Path, each_server_url: str, database_url: str
) -> None:
    address = "" if database_url.startswith("sqlite") else database_url
    seen: Counter[str] = Counter()
    async with bench(tmp_path, each_server_url, RESERVATION_DATABASE_URL=address) as here:
        for name, scenario in LOSSES.items():
            for seed in range(LOSS_SEEDS_EACH):
                await replayed_with_losses(here, scenario, Random(f"{name} {seed}"), seen)
    assert all(seen[one] for one in REACHED_BY_LOSSES), seen


def replay_of_random_histories(url: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, suppress_health_check=SLOW_TO_DRAW)
    @given(sales(), SEEDS)
    def replay(scenario: Scenario, seed: int) -> None:
        without = msgspec.structs.replace(scenario.faults, losses=0)
        kept = msgspec.structs.replace(scenario, faults=without)
        asyncio.run(replayed(url, kept, Random(seed), Counter()))

    replay()


def test_the_scripts_follow_the_model_in_random_histories(valkey_url: str) -> None:
    replay_of_random_histories(valkey_url, EXAMPLES)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_scripts_follow_the_model_in_many_random_histories(valkey_url: str) -> None:
    replay_of_random_histories(valkey_url, SOAK_EXAMPLES)
