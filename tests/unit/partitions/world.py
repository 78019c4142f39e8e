"""World: the partitions of a sale, SQL, and the calls in progress, at one instant.

Redis has the partitions. SQL has the events of each partition up to some earlier state; the states
since then are the partition's trail, oldest first. A server that loses events returns to
a state of its trail, because a rebuild restores everything that SQL has.
"""

import msgspec

from tests.unit.partitions.sale import Partition, Reply, Sale

__all__ = [
    "Buyer",
    "Certificate",
    "Faults",
    "Operator",
    "Scenario",
    "Step",
    "Transfer",
    "World",
    "in_call",
    "in_transit",
    "is_short",
    "next_row",
    "row_of",
    "save_event",
    "with_actor",
    "with_faults",
    "write",
]


class Transfer(msgspec.Struct, frozen=True):
    """One row of SQL's table `transfers`."""

    donor: int
    receiver: int
    sku: int
    number: int
    units: int
    #: The units of all lends up to this number.
    up_to: int


class Buyer(msgspec.Struct, frozen=True):
    """One buyer: first a call of prepare with its collector, then the actions in `after`."""

    order: int
    #: start, then while the call waits prepare, lend, expire, borrow or read; then after, done.
    step: str = "start"
    #: Actions of the buyer with the hold: release, claim, sell, decline, take. An operator who
    #: withdraws units holds them like a buyer, claims them, and commits the change.
    after: tuple[str, ...] = ()
    answer: str = ""
    round: int = 0
    #: Units that the home partition lacks, per SKU, by its last reply.
    missing: tuple[int, ...] = ()
    sku: int = 0
    #: Distance from the home partition to the next donor.
    peer: int = 1
    #: The transfer that the collector waits for, and the donor's epoch when it was lent.
    given: Reply | None = None
    epoch: int = 0
    #: Readings made for the certificate: one per partition, twice.
    reads: int = 0
    #: Epoch and refills of each partition at the first reading.
    first: tuple[tuple[int, int], ...] = ()
    #: Sums over the partitions of this reading, per SKU: available, and lent less received.
    sums: tuple[int, ...] = ()
    net: tuple[int, ...] = ()
    #: Which SKUs were short at the first reading.
    short: tuple[bool, ...] = ()
    #: The calls in progress when the certificate began.
    began: int = 0
    #: Whether the sale was short of a wanted SKU at an instant of this call.
    was_short: bool = False
    #: Whether the last borrow completed the basket.
    gathered: bool = False


class Operator(msgspec.Struct, frozen=True):
    """An operator's change: written in SQL, then sent to one partition after the other."""

    number: int = 1
    step: str = "write"
    position: int = 0


class Certificate(msgspec.Struct, frozen=True):
    """A finished certificate: a SKU, the units that the sale could not serve, and its calls."""

    sku: int
    units: int
    began: int


class Faults(msgspec.Struct, frozen=True):
    """How many faults of each kind may still happen."""

    #: Servers that go back in time.
    losses: int = 0
    #: Collectors that stop between two steps.
    stops: int = 0
    #: Borrows that arrive again.
    repeats: int = 0
    #: SQL and one server are both restored from a backup that has the first state.
    restores: int = 0


class World(msgspec.Struct, frozen=True):
    """Everything at one instant."""

    partitions: tuple[Partition, ...]
    actors: tuple[Buyer | Operator, ...]
    trails: tuple[tuple[Partition, ...], ...]
    rows: tuple[Transfer, ...] = ()
    #: The number of the operator's last change in SQL.
    change: int = 0
    certificate: Certificate | None = None
    faults: Faults = Faults()


class Scenario(msgspec.Struct, frozen=True):
    """The initial state of a search, and the faults that may happen in it."""

    sale: Sale
    partitions: tuple[Partition, ...]
    actors: tuple[Buyer | Operator, ...]
    #: Orders whose deadline may pass.
    deadlines: frozenset[int] = frozenset()
    faults: Faults = Faults()
    #: Rounds of a collector before it answers `unavailable`.
    rounds: int = 1
    #: Whether a certificate serves several calls.
    shares: bool = False
    #: The operator's changes: units per partition and SKU.
    changes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    #: Of each change the order that reserves the units to withdraw; None for other changes.
    reservations: tuple[int | None, ...] = ()

    @property
    def has_losses(self) -> bool:
        """Whether a server may lose events."""
        return self.faults.losses + self.faults.restores > 0

    def start(self) -> World:
        """Return the first state."""
        return World(
            self.partitions,
            self.actors,
            ((),) * self.sale.partitions,
            faults=self.faults,
        )


#: A step's label: who, then the action with its arguments.
Step = tuple[tuple[object, ...], World]

_CALL_STEPS = frozenset({"prepare", "lend", "expire", "borrow", "read"})


def in_call(actor: Buyer | Operator) -> bool:
    """Whether an actor waits for the answer to its prepare."""
    return isinstance(actor, Buyer) and actor.step in _CALL_STEPS


def with_actor(world: World, index: int, actor: Buyer | Operator) -> World:
    """Return the world with one actor replaced."""
    actors = (*world.actors[:index], actor, *world.actors[index + 1 :])
    return msgspec.structs.replace(world, actors=actors)


def with_faults(world: World, **used: int) -> World:
    """Return the world with other numbers of faults left."""
    return msgspec.structs.replace(world, faults=msgspec.structs.replace(world.faults, **used))


def write(scenario: Scenario, world: World, place: int, partition: Partition) -> World:
    """Return the world after a script's writes to one partition.

    Without losses SQL has each event at once: the delay could change no reply.
    """
    before = world.partitions[place]
    if partition is before:
        return world
    partitions = (*world.partitions[:place], partition, *world.partitions[place + 1 :])
    if not scenario.has_losses:
        rows = world.rows + _new_rows(scenario.sale, place, before, partition)
        return msgspec.structs.replace(world, partitions=partitions, rows=rows)
    rows = world.rows
    if not scenario.sale.rules.saves_events_before:
        rows += _new_rows(scenario.sale, place, before, partition)
    trail = (*world.trails[place], before)
    trails = (*world.trails[:place], trail, *world.trails[place + 1 :])
    return msgspec.structs.replace(world, partitions=partitions, rows=rows, trails=trails)


def _new_rows(sale: Sale, donor: int, before: Partition, after: Partition) -> tuple[Transfer, ...]:
    if before.lent is after.lent:
        return ()
    lots = enumerate(zip(before.lent, after.lent, strict=True))
    return tuple(
        Transfer(donor, *divmod(slot, sale.skus), new.number, new.units - old.units, new.units)
        for slot, (old, new) in lots
        if new.number > old.number
    )


def save_event(scenario: Scenario, world: World, place: int) -> World:
    """Return the world after SQL took the next event of a partition."""
    trail = world.trails[place]
    after = (*trail, world.partitions[place])[1]
    rows = world.rows
    if scenario.sale.rules.saves_events_before:
        rows += _new_rows(scenario.sale, place, trail[0], after)
    trails = (*world.trails[:place], trail[1:], *world.trails[place + 1 :])
    return msgspec.structs.replace(world, rows=rows, trails=trails)


def row_of(world: World, donor: int, receiver: int, sku: int, number: int) -> Transfer | None:
    """Return SQL's row of a transfer, if SQL has the lend."""
    for row in world.rows:
        if (row.donor, row.receiver, row.sku, row.number) == (donor, receiver, sku, number):
            return row
    return None


def next_row(world: World, donor: int, receiver: int, sku: int, last: int) -> Transfer | None:
    """Return SQL's first transfer after the last one that the receiver has."""
    if not world.rows:
        return None
    kind = (donor, receiver, sku)
    later = [
        row
        for row in world.rows
        if row.number > last and (row.donor, row.receiver, row.sku) == kind
    ]
    return min(later, key=lambda row: row.number, default=None)


def in_transit(sale: Sale, partitions: tuple[Partition, ...], sku: int) -> int:
    """Return the units of one SKU that were lent and not received yet."""
    units = 0
    for partition in partitions:
        for lent in partition.lent[sku :: sale.skus]:
            units += lent.units
        for received in partition.received[sku :: sale.skus]:
            units -= received.units
    return units


def is_short(sale: Sale, partitions: tuple[Partition, ...], number: int) -> bool:
    """Whether the sale has too few units of a wanted SKU: available, due and in transit."""
    for partition in partitions:
        if partition.recovery is not None:
            return False
    return any(
        _is_short_of(sale, partitions, sku, wanted)
        for sku, wanted in enumerate(sale.baskets[number].wants)
        if wanted
    )


def _is_short_of(sale: Sale, partitions: tuple[Partition, ...], sku: int, wanted: int) -> bool:
    available = sum([partition.available[sku] for partition in partitions])
    if available >= wanted or _has_due(sale, partitions, sku):
        return False
    transit = in_transit(sale, partitions, sku)
    return available + transit < wanted if sale.rules.adds_transit else transit == 0


def _has_due(sale: Sale, partitions: tuple[Partition, ...], sku: int) -> bool:
    for partition in partitions:
        for order in partition.orders:
            if order.is_due and sale.baskets[order.number].wants[sku]:
                return True
    return False
