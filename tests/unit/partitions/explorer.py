"""Search of every interleaving: each state is visited once, and its trace is a shortest one.

The search goes by the length of the traces, so the first violation that it meets has the shortest
trace. A state that two interleavings reach is continued once.
"""

from collections import Counter
from collections.abc import Iterator

import msgspec

from tests.unit.partitions.background import faults, needed_steps, operator_steps
from tests.unit.partitions.buyers import buyer_steps
from tests.unit.partitions.invariants import broken_at_the_end, broken_rule, noted, wrong_answer
from tests.unit.partitions.world import Buyer, Scenario, Step, World

__all__ = ["Search", "explore", "next_steps", "trace_text"]

#: A search of this many states takes about two minutes; a larger scenario is a mistake.
STATES_MAX = 1_500_000


class Search(msgspec.Struct):
    """The result of a search."""

    states: int = 0
    steps: int = 0
    #: How many final states have these answers.
    ends: Counter[tuple[str, ...]] = msgspec.field(default_factory=Counter)
    #: The broken rule, and the labels of a shortest trace to it.
    broken: str | None = None
    trace: list[tuple[object, ...]] = msgspec.field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.states} states, {self.steps} steps: {self.broken}\n{trace_text(self.trace)}"


def trace_text(trace: list[tuple[object, ...]]) -> str:
    """Return one line per step."""
    return "\n".join(
        f"{number:3} {' '.join(map(str, label))}" for number, label in enumerate(trace, start=1)
    )


def next_steps(scenario: Scenario, world: World) -> tuple[list[Step], bool]:
    """Return the possible steps, and whether the world has ended: only faults may happen."""
    steps = list(needed_steps(scenario, world))
    for index, actor in enumerate(world.actors):
        of = buyer_steps if isinstance(actor, Buyer) else operator_steps
        steps += of(scenario, world, index)
    is_end = not steps
    steps += faults(scenario, world)
    return steps, is_end


def explore(scenario: Scenario, states_max: int = STATES_MAX) -> Search:
    """Visit every state of a scenario, up to the first violation.

    Raises:
        OverflowError: the scenario has more states than `states_max`.
    """
    search, world = Search(), noted(scenario, scenario.start())
    #: State -> its number; then of each number the state before it and the label between them.
    numbers, worlds = {world: 0}, [world]
    before: list[tuple[int, tuple[object, ...]]] = [(-1, ())]
    search.broken = broken_rule(scenario, world)
    number = 0
    while number < len(worlds) and search.broken is None:
        world = worlds[number]
        steps, is_end = next_steps(scenario, world)
        search.steps += len(steps)
        if is_end:
            answers = (actor.answer for actor in world.actors if isinstance(actor, Buyer))
            search.ends[tuple(answers)] += 1
            search.broken = broken_at_the_end(scenario, world)
            search.trace = list(_trace(before, number))
        for label, stepped in [] if search.broken else steps:
            after = noted(scenario, stepped, world)
            broken = wrong_answer(world, after)
            if numbers.setdefault(after, len(worlds)) != len(worlds) and not broken:
                continue
            worlds.append(after)
            before.append((number, label))
            if broken is None and (scenario.changes or after.partitions is not world.partitions):
                broken = broken_rule(scenario, after)
            if broken:
                search.broken = broken
                search.trace = list(_trace(before, len(worlds) - 1))
                break
        number += 1
        if len(worlds) > states_max:
            raise OverflowError(f"more than {states_max} states")
    search.states = len(worlds)
    if search.broken is None:
        search.trace = []
    return search


def _trace(
    before: list[tuple[int, tuple[object, ...]]], number: int
) -> Iterator[tuple[object, ...]]:
    labels = []
    while number > 0:
        number, label = before[number]
        labels.append(label)
    return reversed(labels)
