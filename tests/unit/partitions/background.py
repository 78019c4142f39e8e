"""Everything that happens besides the calls: deadlines, the flusher, the worker, losses, rebuilds.

A loss closes its partition at once, because no process writes to another server before the marks
were compared. The partition then recovers in steps: SQL takes the surviving events, the partition
is compared with one peer after the other, and it opens under the next epoch.
"""

from collections.abc import Iterator

import msgspec

from tests.unit.partitions.sale import (
    HELD,
    Lot,
    Order,
    Partition,
    Reply,
    Sale,
    borrow,
    change_total,
    expire,
    is_due,
    moved,
    put,
)
from tests.unit.partitions.world import (
    Buyer,
    Operator,
    Scenario,
    Step,
    Transfer,
    World,
    next_row,
    save_event,
    with_actor,
    with_faults,
    write,
)

__all__ = ["faults", "needed_steps", "operator_steps"]

_replace = msgspec.structs.replace


def needed_steps(scenario: Scenario, world: World) -> Iterator[Step]:
    """Yield the steps of the processes in the background; all of them happen in the end."""
    for place, partition in enumerate(world.partitions):
        if world.trails[place]:
            yield ("flusher", "save an event", place), save_event(scenario, world, place)
        if partition.recovery is not None:
            yield from _recover(scenario, world, place)
            continue
        if is_due(partition):
            expired, _ = expire(scenario.sale, partition)
            yield ("worker", "expire", place), write(scenario, world, place, expired)
        if partition.change < world.change:
            yield from _apply_change(scenario, world, place, partition.change + 1, "worker")
    yield from _open_transfers(scenario, world)


def faults(scenario: Scenario, world: World) -> Iterator[Step]:
    """Yield the steps that may happen or not: deadlines that pass, servers that go back."""
    for place, partition in enumerate(world.partitions):
        for order in partition.orders:
            if order.status == HELD and not order.is_due and order.number in scenario.deadlines:
                orders = tuple(
                    Order(order.number, HELD, is_due=True) if other is order else other
                    for other in partition.orders
                )
                # Time passes without an event, so the trail does not grow.
                late = _replace(partition, orders=orders)
                after = _replace(world, partitions=put(world.partitions, place, late))
                yield ("time", "passes the deadline of order", order.number), after
        if world.faults.losses:
            yield from _losses(world, place)
        if world.faults.restores:
            yield _restore(scenario, world, place)
    if world.faults.repeats:
        yield from _repeats(scenario, world)


def _losses(world: World, place: int) -> Iterator[Step]:
    trail = world.trails[place]
    left = with_faults(world, losses=world.faults.losses - 1)
    for length, state in enumerate(trail):
        label = ("server", place, "loses events", len(trail) - length)
        yield label, _went_back(left, place, state, trail[:length])


def _went_back(world: World, place: int, state: Partition, trail: tuple[Partition, ...]) -> World:
    # SQL has the epoch, so it never repeats.
    lost = _replace(state, recovery=0, epoch=world.partitions[place].epoch)
    return _replace(
        world,
        partitions=put(world.partitions, place, lost),
        trails=put(world.trails, place, trail),
    )


def _restore(scenario: Scenario, world: World, place: int) -> Step:
    """Restore SQL and one server; the outboxes of the other servers still have their events."""
    left = with_faults(world, restores=world.faults.restores - 1)
    restored = _went_back(left, place, scenario.partitions[place], ())
    rows = tuple(row for row in world.rows if row.donor != place)
    return ("server", place, "and SQL are restored"), _replace(restored, rows=rows)


def _repeats(scenario: Scenario, world: World) -> Iterator[Step]:
    """Yield each borrow that arrives twice."""
    left = with_faults(world, repeats=world.faults.repeats - 1)
    for row in world.rows:
        last = _last_received(scenario.sale, world, row)
        if last is not None and row.number <= last:
            yield _worker_borrows(scenario, left, row)


def _last_received(sale: Sale, world: World, row: Transfer) -> int | None:
    """Return the receiver's last number of a row's kind, or None while the receiver is closed."""
    receiver = world.partitions[row.receiver]
    if receiver.recovery is not None:
        return None
    return receiver.received[sale.slot(row.donor, row.sku)].number


def _worker_borrows(scenario: Scenario, world: World, row: Transfer) -> Step:
    given = Reply("lent", row.number, row.units, row.up_to)
    receiver = world.partitions[row.receiver]
    borrowed, reply = borrow(scenario.sale, receiver, row.donor, row.sku, given, None)
    lot = (row.sku, row.number, row.units)
    label = ("worker", "borrow", row.receiver, row.donor, *lot, reply.word)
    return label, write(scenario, world, row.receiver, borrowed)


def _recover(scenario: Scenario, world: World, place: int) -> Iterator[Step]:
    """Yield the next step of a recovery; none while it cannot continue.

    The partition goes twice through its peers: it borrows again, then it repeats its lends.
    """
    sale, partition = scenario.sale, world.partitions[place]
    done = partition.recovery
    assert done is not None
    if world.trails[place] and done == 0:
        return
    if done % sale.partitions == place:
        done += 1
    if done >= 2 * sale.partitions:
        yield from _reopen(scenario, world, place)
        return
    second, peer = divmod(done, sale.partitions)
    repeats = bool(second) if sale.rules.borrows_before_repeating else not second
    compared: Partition | None
    if repeats:
        compared = _with_lends_repeated(sale, partition, place, world.partitions[peer], peer)
    else:
        compared = _with_loans_again(scenario, world, partition, place, peer)
    if compared is not None:
        if compared is not partition:
            world = write(scenario, world, place, compared)
        after = _with_recovery(world, place, done + 1)
        yield ("rebuild", place, "compares", peer), after


def _with_recovery(world: World, place: int, recovery: int | None) -> World:
    """Return the world with the progress of a recovery, which is not an event."""
    before = world.partitions[place]
    epoch = before.epoch + (recovery is None)
    partition = _replace(before, recovery=recovery, epoch=epoch)
    return _replace(world, partitions=put(world.partitions, place, partition))


def _reopen(scenario: Scenario, world: World, place: int) -> Iterator[Step]:
    partition = world.partitions[place]
    if scenario.sale.rules.catches_up and partition.change < world.change:
        yield from _apply_change(scenario, world, place, partition.change + 1, "rebuild")
    else:
        yield ("rebuild", place, "opens"), _with_recovery(world, place, None)


def _with_lends_repeated(
    sale: Sale, donor: Partition, place: int, receiver: Partition, peer: int
) -> Partition | None:
    """Return the donor with each lend that the receiver has; None where it lacks the units."""
    if not sale.rules.repeats_lends:
        return donor
    for sku in range(sale.skus):
        slot = sale.slot(peer, sku)
        had, has = receiver.received[sale.slot(place, sku)], donor.lent[slot]
        units = had.units - has.units
        if had.number <= has.number:
            continue
        if units > donor.available[sku]:
            return None
        donor = moved(donor, sku, -units, lent=put(donor.lent, slot, had))
    return donor


def _with_loans_again(
    scenario: Scenario, world: World, receiver: Partition, place: int, peer: int
) -> Partition:
    """Return the receiver with each transfer of a peer that it lacks and SQL has."""
    sale = scenario.sale
    for sku in range(sale.skus):
        slot = sale.slot(peer, sku)
        if not sale.rules.borrows_again_saved:
            lot = world.partitions[peer].lent[sale.slot(place, sku)]
            units = lot.units - receiver.received[slot].units
            if units > 0:
                receiver = moved(receiver, sku, units, received=put(receiver.received, slot, lot))
            continue
        lot = receiver.received[slot]
        while row := next_row(world, peer, place, sku, lot.number):
            units = row.up_to - lot.units if sale.rules.takes_differences else row.units
            lot = Lot(row.number, lot.units + units)
            received = put(receiver.received, slot, lot)
            receiver = moved(receiver, sku, units, received=received)
    return receiver


def _open_transfers(scenario: Scenario, world: World) -> Iterator[Step]:
    """Yield the worker's borrow of each transfer that is open."""
    for row in world.rows:
        last = _last_received(scenario.sale, world, row)
        if last is None or row is not next_row(world, row.donor, row.receiver, row.sku, last):
            continue
        if not scenario.sale.rules.workers_wait or not _is_awaited(scenario, world, row):
            yield _worker_borrows(scenario, world, row)


def _is_awaited(scenario: Scenario, world: World, row: Transfer) -> bool:
    """Whether a collector will send the borrow of this transfer."""
    for actor in world.actors:
        if not isinstance(actor, Buyer) or actor.step != "borrow" or actor.given is None:
            continue
        home = scenario.sale.baskets[actor.order].home
        donor = (home + actor.peer) % scenario.sale.partitions
        lent = (donor, home, actor.sku, actor.given.number)
        if lent == (row.donor, row.receiver, row.sku, row.number):
            return True
    return False


def operator_steps(scenario: Scenario, world: World, index: int) -> Iterator[Step]:
    """Yield the next step of an operator's change."""
    operator = world.actors[index]
    assert isinstance(operator, Operator)
    if operator.step == "write" and world.change + 1 == operator.number:
        sent = with_actor(world, index, _replace(operator, step="send"))
        yield ("operator", "write", operator.number), _replace(sent, change=operator.number)
    if operator.step != "send":
        return
    place, number = operator.position, operator.number
    if world.partitions[place].recovery is not None:
        return
    if scenario.sale.rules.checks_changes and world.partitions[place].change + 1 < number:
        return
    is_last = place + 1 == scenario.sale.partitions
    operator = _replace(operator, position=place + 1, step="done" if is_last else "send")
    if world.partitions[place].change >= number and scenario.sale.rules.checks_changes:
        yield ("operator", "change", number, place, "done"), with_actor(world, index, operator)
    for label, after in _apply_change(scenario, world, place, number, "operator"):
        yield label, with_actor(after, index, operator)


def _apply_change(
    scenario: Scenario, world: World, place: int, number: int, who: str
) -> Iterator[Step]:
    """Yield the step of a partition that takes a change; none where it cannot."""
    before = world.partitions[place]
    deltas = scenario.changes[number - 1][place]
    reservation = (*scenario.reservations, *(None,) * number)[number - 1]
    changed, _ = change_total(scenario.sale, before, number, deltas, reservation)
    if changed is not before:
        yield (who, "change", number, place), write(scenario, world, place, changed)
