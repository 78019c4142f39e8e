"""Small sales, with every interleaving of their buyers, of the background and of the faults."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest

from tests.unit.partitions.explorer import explore
from tests.unit.partitions.sale import Rules
from tests.unit.partitions.scenarios import FOR_EACH_RULE, order, scenario_of, with_rules
from tests.unit.partitions.sizes import LARGE, QUICK, small_sales
from tests.unit.partitions.world import Buyer, Operator, Scenario

#: One of this many small sales, in the quick test: about 9,000 states.
EVERY = 97

ALL_QUICK = FOR_EACH_RULE | QUICK


@pytest.mark.parametrize("name", ALL_QUICK)
def test_a_sale_keeps_its_promises(name: str) -> None:
    search = explore(ALL_QUICK[name])
    assert search.broken is None, str(search)


def explore_all(scenarios: Iterator[Scenario]) -> tuple[int, int]:
    """Return the number of sales and of their states."""
    sales = states = 0
    for scenario in scenarios:
        search = explore(scenario)
        assert search.broken is None, f"{scenario.partitions}, {scenario.sale.baskets}: {search}"
        sales, states = sales + 1, states + search.states
    return sales, states


def test_small_sales_keep_their_promises() -> None:
    sales, states = explore_all(islice(small_sales(), 0, None, EVERY))
    assert sales == 20
    assert states > 5_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_small_sales_keep_their_promises() -> None:
    sales, _ = explore_all(islice(small_sales(), None))
    assert sales == 1904


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", LARGE)
def test_a_large_sale_keeps_its_promises(name: str) -> None:
    search = explore(LARGE[name])
    assert search.broken is None, str(search)


def answers_of(scenario: Scenario) -> Counter[str]:
    """Return how often each answer occurs in the final states."""
    search = explore(scenario)
    assert search.broken is None, str(search)
    return Counter(answer for answers in search.ends for answer in answers)


@pytest.mark.parametrize("name", ["two SKUs", "one certificate for all", "a loss"])
def test_transfers_in_progress_need_not_prevent_a_certificate(name: str) -> None:
    """Units in transit can count like available ones: answers stay true, more of them certain."""
    proposed = Rules(adds_transit=True)
    before = answers_of(QUICK[name])
    after = answers_of(with_rules(QUICK[name], proposed))
    assert after["unavailable"] <= before["unavailable"]


@pytest.mark.parametrize(
    ("units", "wants"),
    [
        pytest.param(((1,), (1,)), (2,), id="two-units-of-two-partitions"),
        pytest.param(((1, 0), (0, 1)), (1, 1), id="two-SKUs-of-two-partitions"),
    ],
)
def test_two_collectors_may_both_find_the_sale_unavailable(
    units: tuple[tuple[int, ...], ...], wants: tuple[int, ...]
) -> None:
    """Each takes the units that the other one has, in every round; no order of SKUs prevents it."""
    search = explore(
        scenario_of(units, (order(0, *wants), order(1, *wants)), (Buyer(0), Buyer(1)), rounds=3)
    )
    assert search.broken is None, str(search)
    assert search.ends["unavailable", "unavailable"] > 0
    assert search.ends["held", "sold_out"] > 0


def test_a_withdrawal_without_a_reservation_may_never_arrive() -> None:
    """A change that is written in SQL first waits for units that a buyer takes meanwhile."""
    search = explore(
        scenario_of(((1,), (0,)), (order(0, 1),), (Buyer(0), Operator(1)), changes=(((-1,), (0,)),))
    )
    assert search.broken == "an operator's change never arrives", str(search)
