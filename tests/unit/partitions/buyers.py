"""A buyer's call, one script per step: prepare, the collector, the certificate, the answer."""

from collections.abc import Iterator

import msgspec

from tests.unit.partitions.sale import (
    CONFIRMING,
    Partition,
    Reply,
    Rules,
    borrow,
    claim,
    expire,
    finish,
    is_due,
    lend,
    prepare,
    release,
    sold_again,
)
from tests.unit.partitions.world import (
    Buyer,
    Certificate,
    Scenario,
    Step,
    World,
    in_call,
    next_row,
    row_of,
    with_actor,
    with_faults,
    write,
)

__all__ = ["buyer_steps"]

_replace = msgspec.structs.replace


def buyer_steps(scenario: Scenario, world: World, index: int) -> Iterator[Step]:
    """Yield each next step of a buyer; none while it waits for another actor."""
    buyer = world.actors[index]
    assert isinstance(buyer, Buyer)
    if buyer.step == "done":
        return
    if buyer.step == "after":
        yield from _after(scenario, world, index, buyer)
        return
    name = f"buyer {index}"
    if world.faults.stops and in_call(buyer):
        stopped = _replace(_idle(buyer), step="done", answer="stopped")
        left = with_faults(world, stops=world.faults.stops - 1)
        yield (name, "stops"), with_actor(left, index, stopped)
    if buyer.step == "read" and buyer.reads == 0 and _is_served(scenario, world, index, buyer):
        yield (name, "shares the certificate"), _answer(world, index, buyer, "sold_out")
    step = _STEPS[buyer.step](scenario, world, index, buyer)
    if step is not None:
        label, after = step
        yield (name, *label), after


def _prepare(scenario: Scenario, world: World, index: int, buyer: Buyer) -> Step:
    home = scenario.sale.baskets[buyer.order].home
    partition, reply = prepare(scenario.sale, world.partitions[home], buyer.order)
    world = write(scenario, world, home, partition)
    label = ("prepare", home, reply.word)
    if reply.word == "due":
        after = _replace(buyer, step="expire", peer=0, sku=0)
        return label, with_actor(world, index, after)
    if reply.word == "dry" and buyer.round == scenario.rounds:
        return label, _answer(world, index, buyer, "unavailable")
    if reply.word == "dry":
        return label, _collect(scenario, world, index, buyer, reply)
    return label, _answer(world, index, buyer, reply.word)


def _collect(scenario: Scenario, world: World, index: int, buyer: Buyer, reply: Reply) -> World:
    """Continue after a reply of the home partition, which names the units that it lacks.

    A round goes once through the SKUs and the peers in ascending order. A round that would go back
    to an earlier SKU ends: another order took its units.
    """
    basket = scenario.sale.baskets[buyer.order]
    available = world.partitions[basket.home].available
    missing = tuple(
        max(0, wanted - has) for wanted, has in zip(basket.wants, available, strict=True)
    )
    sku = next((sku for sku, units in enumerate(missing) if units), None)
    if sku is None:
        # A transfer that a rebuild received could not take the hold.
        gathered = buyer.gathered or reply.word == "borrowed" or not scenario.has_losses
        after = _replace(_idle(buyer), step="prepare", round=buyer.round + 1, gathered=gathered)
        return with_actor(world, index, after)
    if sku < buyer.sku:
        return _next_round(scenario, world, index, buyer)
    peer = buyer.peer + 1 if reply.word != "dry" and sku == buyer.sku else 1
    after = _next_lend(scenario, _replace(_idle(buyer), missing=missing, sku=sku, peer=peer))
    return with_actor(world, index, after)


def _next_lend(scenario: Scenario, buyer: Buyer) -> Buyer:
    if buyer.peer < scenario.sale.partitions:
        return _replace(buyer, step="lend", given=None, epoch=0)
    return _replace(_idle(buyer), step="read")


def _lend(scenario: Scenario, world: World, index: int, buyer: Buyer) -> Step:
    sale = scenario.sale
    home = sale.baskets[buyer.order].home
    donor = (home + buyer.peer) % sale.partitions
    units = buyer.missing[buyer.sku]
    partition, reply = lend(sale, world.partitions[donor], home, buyer.sku, units)
    world = write(scenario, world, donor, partition)
    if reply.word == "lent":
        after = _replace(buyer, step="borrow", given=reply, epoch=partition.epoch)
    elif reply.word == "due":
        after = _replace(buyer, step="expire")
    else:
        after = _next_lend(scenario, _replace(buyer, peer=buyer.peer + 1))
    return ("lend", donor, reply), with_actor(world, index, after)


def _expire(scenario: Scenario, world: World, index: int, buyer: Buyer) -> Step:
    """End the holds that made a script answer `due`, then repeat that script."""
    place = (scenario.sale.baskets[buyer.order].home + buyer.peer) % scenario.sale.partitions
    partition, reply = expire(scenario.sale, world.partitions[place])
    world = write(scenario, world, place, partition)
    step = "lend" if buyer.peer else "prepare"
    after = _replace(buyer, step=step) if buyer.peer else _replace(_idle(buyer), step=step)
    return ("expire", place, reply.word), with_actor(world, index, after)


def _borrow(scenario: Scenario, world: World, index: int, buyer: Buyer) -> Step | None:
    sale, given = scenario.sale, buyer.given
    assert given is not None
    home = sale.baskets[buyer.order].home
    donor = (home + buyer.peer) % sale.partitions
    row = row_of(world, donor, home, buyer.sku, given.number)
    if row is None and sale.rules.saves_lends:
        lender = world.partitions[donor]
        if lender.recovery is not None or lender.epoch == buyer.epoch:
            return None
        return ("the lend is lost", donor), _next_round(scenario, world, index, buyer)
    if row is not None and sale.rules.borrows_saved_units:
        given = _replace(given, units=row.units, up_to=row.up_to)
    receiver = world.partitions[home]
    last = receiver.received[sale.slot(donor, buyer.sku)].number
    earlier = next_row(world, donor, home, buyer.sku, last)
    if earlier is not None and earlier.number < given.number:
        return None
    partition, reply = borrow(sale, receiver, donor, buyer.sku, given, buyer.order)
    label = ("borrow", home, donor, given, reply.word)
    world = write(scenario, world, home, partition)
    if reply.word in {"borrowed", "done"}:
        return label, _collect(scenario, world, index, buyer, reply)
    return label, _answer(world, index, buyer, reply.word)


def _is_served(scenario: Scenario, world: World, index: int, buyer: Buyer) -> bool:
    """Whether the last certificate answers this call as well."""
    certificate = world.certificate
    if certificate is None:
        return False
    rules = scenario.sale.rules
    wanted = scenario.sale.baskets[buyer.order].wants[certificate.sku]
    enough = wanted >= certificate.units or not rules.certificates_by_size
    is_fresh = certificate.began >> index & 1 or not rules.fresh_certificates
    return bool(wanted and enough and is_fresh)


def _read(scenario: Scenario, world: World, index: int, buyer: Buyer) -> Step:
    """Make the next reading of the certificate; the last one decides."""
    sale, rules = scenario.sale, scenario.sale.rules
    second, place = divmod(buyer.reads, sale.partitions)
    partition = world.partitions[place]
    label = ("read", place, partition.available)
    if partition.recovery is not None and rules.reads_only_open:
        return label, _answer(world, index, buyer, "recovering")
    if is_due(partition) and rules.counts_due:
        expired, _ = expire(sale, partition)
        world = write(scenario, world, place, expired)
        return (*label, "expire"), _next_round(scenario, world, index, buyer)
    if buyer.reads == 0:
        began = sum(in_call(actor) << place for place, actor in enumerate(world.actors))
        buyer = _replace(buyer, began=began if scenario.shares else 0)
    if second and not _is_same(scenario, buyer.first[place], partition):
        return (*label, "changed"), _next_round(scenario, world, index, buyer)
    buyer = _summed(scenario, buyer, partition)
    if place + 1 < sale.partitions:
        return label, with_actor(world, index, buyer)
    wants = sale.baskets[buyer.order].wants
    short = tuple(
        _is_short(rules, *counts) for counts in zip(buyer.sums, wants, buyer.net, strict=True)
    )
    if second:
        short = tuple(first and now for first, now in zip(buyer.short, short, strict=True))
    if not any(short):
        return (*label, "no certificate"), _next_round(scenario, world, index, buyer)
    if rules.reads_twice and not second:
        return label, with_actor(world, index, _replace(buyer, short=short, sums=(), net=()))
    if scenario.shares:
        sku = short.index(True)
        certificate = Certificate(sku, wants[sku], buyer.began)
        world = _replace(world, certificate=certificate)
    return (*label, "sold_out"), _answer(world, index, buyer, "sold_out")


def _is_short(rules: Rules, available: int, wanted: int, transit: int) -> bool:
    if rules.adds_transit:
        return available + transit < wanted
    return available < wanted and (transit == 0 or not rules.counts_transit)


def _is_same(scenario: Scenario, first: tuple[int, int], partition: Partition) -> bool:
    rules, (epoch, refills) = scenario.sale.rules, first
    if rules.compares_epochs and epoch != partition.epoch:
        return False
    return refills == partition.refills or not rules.compares_refills


def _summed(scenario: Scenario, buyer: Buyer, partition: Partition) -> Buyer:
    sale = scenario.sale
    sums = buyer.sums or (0,) * sale.skus
    net = buyer.net or (0,) * sale.skus
    first = buyer.first
    if buyer.reads < sale.partitions:
        first = (*first, (partition.epoch, partition.refills))
    return _replace(
        buyer,
        reads=buyer.reads + 1,
        first=first,
        sums=tuple(a + b for a, b in zip(sums, partition.available, strict=True)),
        net=tuple(before + _net(scenario, partition, sku) for sku, before in enumerate(net)),
    )


def _net(scenario: Scenario, partition: Partition, sku: int) -> int:
    lots = slice(sku, None, scenario.sale.skus)
    lent = sum(lot.units for lot in partition.lent[lots])
    return lent - sum(lot.units for lot in partition.received[lots])


def _next_round(scenario: Scenario, world: World, index: int, buyer: Buyer) -> World:
    if buyer.round + 1 == scenario.rounds:
        return _answer(world, index, buyer, "unavailable")
    after = _replace(_idle(buyer), step="prepare", round=buyer.round + 1)
    return with_actor(world, index, after)


def _idle(buyer: Buyer) -> Buyer:
    """Return a buyer without the data of earlier steps, so that equal states are equal."""
    return Buyer(
        buyer.order,
        buyer.step,
        buyer.after,
        buyer.answer,
        buyer.round,
        was_short=buyer.was_short,
        gathered=buyer.gathered,
    )


def _answer(world: World, index: int, buyer: Buyer, answer: str) -> World:
    step = "after" if answer == "held" and buyer.after else "done"
    return with_actor(world, index, _replace(_idle(buyer), step=step, answer=answer))


def _after(scenario: Scenario, world: World, index: int, buyer: Buyer) -> Iterator[Step]:
    """Yield the buyer's next action with its hold, once the home partition is open."""
    sale, action = scenario.sale, buyer.after[0]
    home = sale.baskets[buyer.order].home
    if action == "commit":
        yield from _commit(scenario, world, index, buyer)
        return
    partition, reply = _ACTIONS[action](scenario, world.partitions[home], buyer.order)
    if reply.word == "recovering":
        return
    rest = buyer.after[1:]
    after = _replace(buyer, after=rest, step="after" if rest else "done")
    done = with_actor(write(scenario, world, home, partition), index, after)
    yield (f"buyer {index}", action, home, reply.word), done


def _commit(scenario: Scenario, world: World, index: int, operator: Buyer) -> Iterator[Step]:
    """Write an operator's withdrawal in SQL, whose units the operator has reserved."""
    home = scenario.sale.baskets[operator.order].home
    partition = world.partitions[home]
    if partition.recovery is not None:
        return
    if world.trails[home] and scenario.sale.rules.saves_reservations:
        return
    numbers = [order.number for order in partition.orders if order.status == CONFIRMING]
    is_reserved = operator.order in numbers
    done = with_actor(world, index, _replace(operator, after=(), step="done"))
    change = world.change + is_reserved
    yield (f"operator {index}", "commit", is_reserved), _replace(done, change=change)


def _sell(scenario: Scenario, partition: Partition, number: int) -> tuple[Partition, Reply]:
    after, reply = finish(scenario.sale, partition, number, paid=True)
    if reply.word != "lost":
        return after, reply
    return sold_again(scenario.sale, partition, number)


_STEPS = {
    "start": _prepare,
    "prepare": _prepare,
    "lend": _lend,
    "expire": _expire,
    "borrow": _borrow,
    "read": _read,
}
_ACTIONS = {
    "take": lambda scenario, *order: prepare(scenario.sale, *order),
    "release": lambda scenario, *order: release(scenario.sale, *order),
    "claim": lambda scenario, *order: claim(scenario.sale, *order),
    "decline": lambda scenario, *order: finish(scenario.sale, *order, paid=False),
    "sell": _sell,
}
