"""Scenarios: small sales in which each rule of the design is needed.

Each scenario gives the units of its partitions, its orders, and its actors. An actor of `acts` is
another buyer, who takes and gives back a hold by its home partition alone.
"""

import msgspec

from tests.unit.partitions.sale import (
    ALL_RULES,
    Basket,
    Order,
    Partition,
    Rules,
    Sale,
    empty_partition,
    prepare,
)
from tests.unit.partitions.world import Buyer, Faults, Operator, Scenario

__all__ = ["FOR_EACH_RULE", "acts", "order", "scenario_of", "seeks", "with_rules"]


def order(home: int, *wants: int) -> tuple[int, tuple[int, ...]]:
    """Return an order by the buyer's home partition and the units of each SKU."""
    return home, wants


def seeks(number: int) -> Buyer:
    """Return a buyer whose collector found nothing and now makes its certificate."""
    return Buyer(number, step="read")


def acts(number: int, *after: str) -> Buyer:
    """Return a buyer that acts on its home partition without a collector."""
    return Buyer(number, step="after", after=after)


def scenario_of(
    units: tuple[tuple[int, ...], ...],
    orders: tuple[tuple[int, tuple[int, ...]], ...],
    actors: tuple[Buyer | Operator, ...],
    *,
    held: tuple[int, ...] = (),
    due: tuple[int, ...] = (),
    buyers: tuple[int, ...] | None = None,
    limit: int = 9,
    rules: Rules = ALL_RULES,
    **options: object,
) -> Scenario:
    """Return a scenario.

    Args:
        units: per partition, the units of each SKU, of which the `held` orders take theirs.
        orders: each by a buyer of its own, if `buyers` does not name the buyers.
        held: orders with a hold at the start.
        due: held orders whose deadline has passed.
    """
    names = buyers or range(len(orders))
    baskets = tuple(
        Basket(home, wants, buyer) for buyer, (home, wants) in zip(names, orders, strict=True)
    )
    sale = Sale(len(units), len(units[0]), baskets, rules, limit)
    partitions = [empty_partition(sale, each) for each in units]
    for number in held:
        home = baskets[number].home
        partitions[home], _ = prepare(sale, partitions[home], number)
    first = tuple(_with_due(partition, due) for partition in partitions)
    return msgspec.structs.replace(Scenario(sale, first, actors), **options)


def _with_due(partition: Partition, due: tuple[int, ...]) -> Partition:
    orders = tuple(
        Order(held.number, held.status, is_due=held.number in due) for held in partition.orders
    )
    return msgspec.structs.replace(partition, orders=orders)


def with_rules(scenario: Scenario, rules: Rules) -> Scenario:
    """Return the scenario under other rules."""
    return msgspec.structs.replace(
        scenario, sale=msgspec.structs.replace(scenario.sale, rules=rules)
    )


ONE = order(0, 1)
FAR = order(1, 1)

#: Each with at most a few thousand states.
FOR_EACH_RULE = {
    # A unit is always available, in turn at either partition.
    "a unit in turn at two partitions": scenario_of(
        ((1,), (1,)),
        (ONE, ONE, FAR),
        (
            Buyer(0),
            acts(1, "release", "take", "release", "take", "release"),
            acts(2, "take", "release", "take", "release", "take"),
        ),
        held=(1,),
    ),
    "a unit in turn by expiry": scenario_of(
        ((1,), (1,)),
        (ONE, ONE, FAR),
        (seeks(0), acts(1, "take"), acts(2, "take", "take")),
        held=(1,),
        deadlines=frozenset({1, 2}),
    ),
    "a unit in turn by declined payments": scenario_of(
        ((1,), (1,)),
        (ONE, ONE, FAR),
        (
            seeks(0),
            acts(1, "claim", "decline", "take", "claim", "decline"),
            acts(2, "take", "claim", "decline", "take"),
        ),
        held=(1,),
    ),
    "a unit in turn by operators": scenario_of(
        ((1,), (1,)),
        (ONE, ONE, FAR, ONE, FAR),
        (
            seeks(0),
            acts(1, "release"),
            acts(2, "take"),
            acts(3, "take"),
            acts(4, "take"),
            Operator(1),
        ),
        held=(1,),
        changes=(((1,), (1,)),),
    ),
    "a unit in turn by losses": scenario_of(
        ((1,), (1,)),
        (ONE, ONE, FAR),
        (seeks(0), acts(1, "take", "take", "release"), acts(2, "take", "take")),
        faults=Faults(losses=2),
    ),
    "payments that begin after the deadline": scenario_of(
        ((2,), (2,)),
        (ONE, ONE, ONE, FAR, FAR),
        (seeks(0), acts(1, "claim"), acts(2, "release"), acts(3, "claim"), acts(4, "claim")),
        held=(1, 2, 3, 4),
        due=(3,),
        deadlines=frozenset({1, 4}),
    ),
    "two buyers and a unit far from one": scenario_of(
        ((1,), (0,)), (ONE, FAR), (Buyer(0), Buyer(1))
    ),
    "one unit and three buyers": scenario_of(
        ((1,), (0,), (0,)),
        (ONE, FAR, order(2, 1)),
        (Buyer(0), Buyer(1), Buyer(2)),
    ),
    "a collector stops": scenario_of(
        ((2,), (0,)),
        (FAR, FAR),
        (Buyer(0), Buyer(1)),
        faults=Faults(stops=1, repeats=1),
    ),
    "two orders of one buyer": scenario_of(
        ((0,), (2,)), (ONE, ONE), (Buyer(0), Buyer(1)), buyers=(0, 0), limit=1
    ),
    "a call and its repeat": scenario_of(((0,), (2,)), (ONE,), (Buyer(0), Buyer(0))),
    "a certificate for several calls": scenario_of(
        ((1,), (1,)),
        (ONE, FAR, ONE, FAR),
        (Buyer(0), Buyer(1), acts(2, "release", "take"), acts(3, "release")),
        held=(2, 3),
        shares=True,
    ),
    "baskets of two sizes": scenario_of(
        ((1,), (0,)), (order(1, 2), FAR), (Buyer(0), Buyer(1)), shares=True
    ),
    "the server of a released hold goes back": scenario_of(
        ((0,), (1,)),
        (ONE, FAR),
        (Buyer(0), acts(1, "release")),
        held=(1,),
        faults=Faults(losses=1),
    ),
    "the server of a lend goes back": scenario_of(
        ((0,), (1,)), (ONE, FAR), (Buyer(0), Buyer(1)), faults=Faults(losses=1)
    ),
    "lends of two sizes under one number": scenario_of(
        ((0,), (2,)),
        (ONE, order(0, 2), order(1, 2)),
        (Buyer(0), Buyer(1), acts(2, "release")),
        held=(2,),
        faults=Faults(losses=1),
    ),
    "the servers of a receiver and its donor go back": scenario_of(
        ((1,), (1,)),
        (ONE, ONE, FAR),
        (Buyer(0), acts(1, "release"), acts(2, "release")),
        held=(1, 2),
        faults=Faults(losses=2),
    ),
    "SQL and a donor are restored": scenario_of(
        ((0,), (1,)), (ONE, FAR), (Buyer(0), Buyer(1)), faults=Faults(restores=1)
    ),
    "SQL and a donor are restored, and its receiver goes back": scenario_of(
        ((0,), (2,)),
        (ONE, ONE),
        (Buyer(0), Buyer(1)),
        faults=Faults(losses=1, restores=1),
    ),
    "SQL and a partition that lent on are restored": scenario_of(
        ((0,), (1,), (0,)),
        (ONE, order(2, 1)),
        (Buyer(0, after=("release",)), Buyer(1)),
        faults=Faults(restores=1),
    ),
    "two changes of operators": scenario_of(
        ((0,), (0,)),
        (ONE,),
        (Buyer(0), Operator(1), Operator(2)),
        changes=(((1,), (1,)), ((1,), (0,))),
    ),
    "a withdrawal of an operator": scenario_of(
        ((1,), (1,)),
        (ONE, order(0, 2)),
        (Buyer(0, after=("release",)), Buyer(1, after=("claim", "commit"))),
        changes=(((-2,), (0,)),),
        reservations=(1,),
    ),
    "a withdrawal of an operator and a loss": scenario_of(
        ((1,), (1,)),
        (ONE, ONE),
        (acts(0, "release"), Buyer(1, after=("claim", "commit"))),
        held=(0,),
        changes=(((-1,), (0,)),),
        reservations=(1,),
        faults=Faults(losses=1),
    ),
    "a change of an operator and a loss": scenario_of(
        ((0,), (0,)),
        (ONE,),
        (Buyer(0), Operator(1)),
        changes=(((1,), (1,)),),
        faults=Faults(losses=1),
    ),
}
