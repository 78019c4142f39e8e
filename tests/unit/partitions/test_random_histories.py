"""Longer histories of larger sales: each step is drawn, and every state is judged."""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.partitions.explorer import next_steps, trace_text
from tests.unit.partitions.invariants import broken_at_the_end, broken_rule, noted, wrong_answer
from tests.unit.partitions.scenarios import acts, scenario_of
from tests.unit.partitions.world import Buyer, Faults, Operator, Scenario, Step, World

EXAMPLES, SOAK_EXAMPLES = 120, 5_000
#: Drawn steps; then the first possible step is taken until the history ends.
STEPS = 150
LAST_STEPS_MAX = 1_000

ENDS = st.sampled_from([(), (), ("release",), ("claim", "sell"), ("claim", "decline"), ("claim",)])
ACTIONS = st.lists(
    st.sampled_from(["take", "take", "release", "claim", "decline", "sell"]), max_size=6
)


@st.composite
def sales(draw: st.DrawFn) -> Scenario:
    """Draw a sale of 2 to 4 partitions, up to 6 buyers, 2 SKUs and an operator."""
    places, skus = draw(st.integers(2, 4)), draw(st.integers(1, 2))
    counts = st.lists(st.sampled_from([0, 0, 1, 2]), min_size=skus, max_size=skus).map(tuple)
    wants = st.lists(st.integers(0, 2), min_size=skus, max_size=skus).map(tuple).filter(any)
    units = draw(st.lists(counts, min_size=places, max_size=places).map(tuple))
    orders = draw(
        st.lists(st.tuples(st.integers(0, places - 1), wants), min_size=2, max_size=6).map(tuple)
    )
    actors: list[Buyer | Operator] = [
        acts(number, *draw(ACTIONS))
        if draw(st.integers(0, 2)) == 0
        else Buyer(number, after=draw(ENDS))
        for number in range(len(orders))
    ]
    actors = [
        Buyer(actor.order, step="done") if actor.step == "after" and not actor.after else actor
        for actor in actors
        if isinstance(actor, Buyer)
    ]
    changes = draw(
        st.lists(st.lists(counts, min_size=places, max_size=places).map(tuple), max_size=2)
    )
    actors += [Operator(number) for number in range(1, len(changes) + 1)]
    return scenario_of(
        units,
        orders,
        tuple(actors),
        buyers=draw(
            st.lists(st.integers(0, 3), min_size=len(orders), max_size=len(orders)).map(tuple)
        ),
        limit=draw(st.integers(2, 4)),
        deadlines=draw(st.frozensets(st.integers(0, len(orders) - 1))),
        faults=Faults(
            losses=draw(st.sampled_from([0, 0, 0, 1, 2])),
            stops=draw(st.integers(0, 1)),
            repeats=draw(st.integers(0, 2)),
        ),
        rounds=draw(st.integers(1, 3)),
        shares=draw(st.booleans()),
        changes=tuple(changes),
    )


def play(scenario: Scenario, draw: Random) -> None:
    """Take the drawn steps, then the needed ones until the end, and judge every state."""
    world = noted(scenario, scenario.start())
    trace: list[tuple[object, ...]] = []

    def judge(broken: str | None) -> None:
        assert broken is None, f"{broken}\n{trace_text(trace)}"

    def take(before: World, steps: list[Step]) -> World:
        label, after = draw.choice(steps)
        trace.append(label)
        after = noted(scenario, after, before)
        judge(wrong_answer(before, after) or broken_rule(scenario, after))
        return after

    for _ in range(STEPS):
        steps, _ = next_steps(scenario, world)
        if not steps:
            break
        world = take(world, steps)
    for _ in range(LAST_STEPS_MAX):
        steps, is_end = next_steps(scenario, world)
        if is_end:
            judge(broken_at_the_end(scenario, world))
            return
        world = take(world, steps[:1])
    judge("the history does not end")


SEEDS = st.integers(0, 2**32)
SLOW_TO_DRAW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=SLOW_TO_DRAW)
@given(sales(), SEEDS)
def test_a_random_history_keeps_the_promises(scenario: Scenario, seed: int) -> None:
    play(scenario, Random(seed))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@settings(max_examples=SOAK_EXAMPLES, deadline=None, suppress_health_check=SLOW_TO_DRAW)
@given(sales(), SEEDS)
def test_many_random_histories_keep_the_promises(scenario: Scenario, seed: int) -> None:
    play(scenario, Random(seed))
