"""Sales of up to three partitions, three buyers and four units, one SKU or two."""

from collections.abc import Iterator
from itertools import combinations_with_replacement, product

from tests.unit.partitions.scenarios import acts, order, scenario_of
from tests.unit.partitions.world import Buyer, Faults, Operator, Scenario

__all__ = ["LARGE", "QUICK", "small_sales"]

PARTITIONS, BUYERS, UNITS = 3, 3, 4

LEAVES = Buyer(0, after=("release",))
DECLINES = Buyer(1, after=("claim", "decline"))
PAYS = Buyer(2, after=("claim", "sell"))
#: Three buyers: one releases the hold, one's payment is declined, one pays.
ALL_ENDS = (LEAVES, DECLINES, PAYS)
STAY = (Buyer(0), Buyer(1), Buyer(2))

#: Up to 15,000 states each.
QUICK = {
    "deadlines": scenario_of(
        ((2,), (1,), (1,)),
        (order(0, 2), order(1, 2), order(2, 1)),
        ALL_ENDS,
        deadlines=frozenset({0, 1, 2}),
    ),
    "baskets that need two partitions": scenario_of(
        ((2,), (1,), (1,)), (order(0, 2), order(1, 2), order(2, 2)), ALL_ENDS
    ),
    "three buyers of one partition without stock": scenario_of(
        ((2,), (2,), (0,)), (order(2, 3), order(2, 2), order(2, 2)), ALL_ENDS, rounds=2
    ),
    "two SKUs": scenario_of(
        ((1, 0), (0, 1), (1, 1)),
        (order(0, 1, 1), order(1, 1, 1), order(2, 0, 1)),
        ALL_ENDS,
        deadlines=frozenset({0, 1}),
    ),
    "one certificate for all": scenario_of(
        ((1,), (1,), (0,)), (order(0, 1), order(2, 2), order(2, 1)), ALL_ENDS, shares=True
    ),
    "a collector that stops": scenario_of(
        ((1,), (1,), (1,)),
        (order(0, 2), order(1, 2), order(2, 1)),
        STAY,
        faults=Faults(stops=1, repeats=1),
    ),
    "two orders of one buyer": scenario_of(
        ((0,), (2,), (2,)),
        (order(0, 2), order(0, 2), order(1, 1)),
        ALL_ENDS,
        buyers=(0, 0, 1),
        limit=2,
    ),
    "a loss": scenario_of(
        ((1,), (1,)), (order(0, 2), order(1, 1)), (LEAVES, Buyer(1)), faults=Faults(losses=1)
    ),
    "a loss during a payment": scenario_of(
        ((0,), (2,)),
        (order(0, 1), order(1, 2)),
        (Buyer(0, after=("claim", "sell")), Buyer(1)),
        faults=Faults(losses=1),
    ),
}

#: Up to 300,000 states each.
LARGE = {
    "a loss": scenario_of(
        ((1,), (1,), (1,)),
        (order(0, 2), order(1, 1), order(2, 1)),
        STAY,
        faults=Faults(losses=1),
    ),
    "two losses": scenario_of(
        ((1,), (1,)),
        (order(0, 2), order(1, 1)),
        (LEAVES, Buyer(1)),
        faults=Faults(losses=2),
    ),
    "a loss and deadlines": scenario_of(
        ((1,), (2,)),
        (order(0, 2), order(1, 2)),
        (Buyer(0, after=("claim", "sell")), Buyer(1)),
        deadlines=frozenset({0, 1}),
        faults=Faults(losses=1),
    ),
    "SQL and a server are restored, and a loss": scenario_of(
        ((0,), (1,), (0,)),
        (order(0, 1), order(2, 1)),
        (LEAVES, Buyer(1)),
        faults=Faults(restores=1, losses=1),
    ),
    "an operator, a loss and deadlines": scenario_of(
        ((0,), (1,)),
        (order(0, 1), order(1, 1)),
        (Buyer(0), acts(1, "take", "release"), Operator(1)),
        deadlines=frozenset({0, 1}),
        changes=(((1,), (1,)),),
        faults=Faults(losses=1),
    ),
    "two rounds": scenario_of(
        ((2,), (1,), (1,)),
        (order(0, 2), order(1, 2), order(2, 1)),
        ALL_ENDS,
        rounds=2,
    ),
    "two SKUs in two rounds": scenario_of(
        ((1, 0), (0, 1), (1, 1)),
        (order(0, 1, 1), order(1, 1, 1), order(2, 1, 1)),
        ALL_ENDS,
        rounds=2,
    ),
}


def small_sales() -> Iterator[Scenario]:
    """Yield each sale of three buyers who release, decline and keep, up to the buyers' order."""
    units = [
        each for each in product(range(UNITS + 1), repeat=PARTITIONS) if 0 < sum(each) <= UNITS
    ]
    baskets = list(product(range(PARTITIONS), (1, 2)))
    actors = (LEAVES, Buyer(1), Buyer(2))
    for each in units:
        for orders in combinations_with_replacement(baskets, BUYERS):
            yield scenario_of(
                tuple((has,) for has in each),
                tuple(order(home, wanted) for home, wanted in orders),
                actors,
            )
