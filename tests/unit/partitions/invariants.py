"""Rules that every state of a sale keeps, and those that hold once every process has ended."""

import functools

import msgspec

from tests.unit.partitions.background import needed_steps
from tests.unit.partitions.buyers import buyer_steps
from tests.unit.partitions.sale import Basket, Partition, Sale, units_of
from tests.unit.partitions.world import (
    Buyer,
    Operator,
    Scenario,
    World,
    in_call,
    in_transit,
    is_short,
)

__all__ = ["broken_at_the_end", "broken_rule", "noted", "wrong_answer"]

#: A sole buyer needs at most this many steps; more of them are a loop.
SOLE_STEPS_MAX = 200
SOLE_ROUNDS = 3


def noted(scenario: Scenario, world: World, before: World | None = None) -> World:
    """Return the world with each call noted for which the sale is short at this instant.

    Args:
        before: the noted world one step earlier.
    """
    moved = before is None or world.partitions is not before.partitions
    actors = None
    for index, actor in enumerate(world.actors):
        if not isinstance(actor, Buyer) or actor.was_short or not in_call(actor):
            continue
        has_begun = before is None or not in_call(before.actors[index])
        if (moved or has_begun) and is_short(scenario.sale, world.partitions, actor.order):
            actors = actors or list(world.actors)
            actors[index] = msgspec.structs.replace(actor, was_short=True)
    if actors is None:
        return world
    return msgspec.structs.replace(world, actors=tuple(actors))


def wrong_answer(before: World, after: World) -> str | None:
    """Return the rule that a new answer breaks."""
    for old, new in zip(before.actors, after.actors, strict=True):
        if new is old or not isinstance(new, Buyer) or not isinstance(old, Buyer):
            continue
        if new.answer == old.answer:
            continue
        if new.answer == "sold_out" and not new.was_short:
            return "sold_out was false at every instant of the call"
        if new.gathered and new.answer in {"sold_out", "unavailable"}:
            return "another order took the units that were borrowed for a waiting one"
    return None


def broken_rule(scenario: Scenario, world: World) -> str | None:
    """Return the rule that a state breaks."""
    sale, partitions = scenario.sale, world.partitions
    for partition in partitions:
        broken = _broken_in_partition(sale, partition)
        if broken:
            return broken
    if _has_received_too_much(sale, partitions):
        return "a partition received more than its peer lent"
    if any(partition.recovery is not None for partition in partitions):
        return None
    for sku in range(sale.skus):
        units = sum(partition.total[sku] for partition in partitions)
        if units + in_transit(sale, partitions, sku) != _total(scenario, world, sku):
            return "the totals and the units in transit are not the total of the sale"
    return _missing_change(world)


def _has_received_too_much(sale: Sale, partitions: tuple[Partition, ...]) -> bool:
    for donor, lender in enumerate(partitions):
        if lender.recovery is not None:
            continue
        for slot, lent in enumerate(lender.lent):
            borrower = partitions[slot // sale.skus]
            if borrower.recovery is None:
                received = borrower.received[sale.slot(donor, slot % sale.skus)]
                if received.units > lent.units or received.number > lent.number:
                    return True
    return False


def _broken_in_partition(sale: Sale, partition: Partition) -> str | None:
    for sku in range(sale.skus):
        taken, available = units_of(sale, partition, sku), partition.available[sku]
        if available < 0:
            return "available is below zero"
        if partition.total[sku] != taken + available:
            return "total is not available, held and sold"
    if not partition.orders:
        return None
    numbers = [order.number for order in partition.orders]
    if len(set(numbers)) != len(numbers):
        return "an order has two holds"
    for order in partition.orders:
        buyer = sale.baskets[order.number].buyer
        mine = [sale.baskets[n].wants for n in numbers if sale.baskets[n].buyer == buyer]
        if max(sum(units) for units in zip(*mine, strict=True)) > sale.limit:
            return "a buyer has more than the limit"
    return None


def _total(scenario: Scenario, world: World, sku: int) -> int:
    """Return the units that the sale has: its first ones and those of the changes that arrived."""
    changed = sum(
        deltas[place][sku]
        for number, deltas in enumerate(scenario.changes, start=1)
        for place, partition in enumerate(world.partitions)
        if number <= partition.change
    )
    return sum(partition.total[sku] for partition in scenario.partitions) + changed


def _missing_change(world: World) -> str | None:
    answered = max(
        (
            actor.number
            for actor in world.actors
            if isinstance(actor, Operator) and actor.step == "done"
        ),
        default=0,
    )
    if any(partition.change < answered for partition in world.partitions):
        return "an open partition lacks an operator's change that was answered"
    return None


def broken_at_the_end(scenario: Scenario, world: World) -> str | None:
    """Return the rule that is broken when no process has a step left."""
    sale, partitions = scenario.sale, world.partitions
    if any(partition.recovery is not None for partition in partitions):
        return "a partition stays closed"
    if any(partition.change < world.change for partition in partitions):
        return "an operator's change never arrives"
    if any(actor.step != "done" for actor in world.actors):
        return "a call waits forever"
    if any(in_transit(sale, partitions, sku) for sku in range(sale.skus)):
        return "a transfer stays open"
    return _last_buyers_answer(sale, partitions)


@functools.lru_cache(maxsize=100_000)
def _last_buyers_answer(sale: Sale, partitions: tuple[Partition, ...]) -> str | None:
    """Send one buyer of every kind to every partition, each alone."""
    single = [tuple(int(sku == one) for sku in range(sale.skus)) for one in range(sale.skus)]
    for wants in {*single, (1,) * sale.skus}:
        enough = all(
            sum(partition.available[sku] for partition in partitions) >= units
            for sku, units in enumerate(wants)
        )
        for home in range(sale.partitions):
            answer = _sole_answer(sale, partitions, Basket(home, wants, buyer=-1))
            if answer != ("held" if enough else "sold_out"):
                return f"the last buyer of {wants} at partition {home} got {answer}"
    return None


def _sole_answer(sale: Sale, partitions: tuple[Partition, ...], basket: Basket) -> str:
    number = len(sale.baskets)
    alone = msgspec.structs.replace(sale, baskets=(*sale.baskets, basket))
    scenario = Scenario(alone, partitions, (Buyer(number),), rounds=SOLE_ROUNDS)
    world = scenario.start()
    for _ in range(SOLE_STEPS_MAX):
        step = next(buyer_steps(scenario, world, 0), None) or next(
            needed_steps(scenario, world), None
        )
        if step is None:
            break
        world = step[1]
    actor = world.actors[0]
    return actor.answer if isinstance(actor, Buyer) else ""
