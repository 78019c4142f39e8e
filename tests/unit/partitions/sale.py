"""One sale over several partitions: immutable states, and each script as a pure function.

A script sees one partition and returns the partition afterwards with its reply, as a Lua script in
one slot does. Counters are tuples with one entry per SKU. `lent` and `received` have one entry per
peer and SKU, at `peer * skus + sku`.
"""

import msgspec

__all__ = [
    "ALL_RULES",
    "CONFIRMING",
    "HELD",
    "NOTHING_LENT",
    "REFILLS",
    "SOLD",
    "Basket",
    "Lot",
    "Order",
    "Partition",
    "Reply",
    "Rules",
    "Sale",
    "borrow",
    "change_total",
    "claim",
    "empty_partition",
    "expire",
    "finish",
    "is_due",
    "lend",
    "moved",
    "prepare",
    "put",
    "release",
    "sold_again",
    "units_of",
]

HELD, CONFIRMING, SOLD = "HELD", "CONFIRMING", "SOLD"

#: The causes that add to `available`. Each of them counts as a refill. `late_claim` adds nothing,
#: but lifts the deadline of a hold that is due, which a certificate must detect, too.
REFILLS = frozenset({"release", "expire", "decline", "borrow", "change", "late_claim"})


class Rules(msgspec.Struct, frozen=True):
    """The rules of the design, each with a switch."""

    #: A certificate consists of two readings of every partition.
    reads_twice: bool = True
    compares_refills: bool = True
    compares_epochs: bool = True
    counts_due: bool = True
    counts_transit: bool = True
    #: Proposed: units in transit count like available ones, so that a transfer in progress does
    #: not prevent the certificate of a basket that is larger.
    adds_transit: bool = False
    #: A partition that recovers refuses to be read.
    reads_only_open: bool = True
    #: A certificate begins after the call that it answers.
    fresh_certificates: bool = True
    #: A certificate serves only baskets that want as much or more.
    certificates_by_size: bool = True
    refills: frozenset[str] = REFILLS
    #: A borrow is sent after SQL has the lend.
    saves_lends: bool = True
    #: SQL has each event of the donor up to the lend, not only the row of the transfer.
    saves_events_before: bool = True
    #: The units of a borrow are those of SQL's row, not those that the collector remembers.
    borrows_saved_units: bool = True
    #: The receiver takes no number twice.
    checks_numbers: bool = True
    #: The receiver takes the difference of all units lent up to a number and all that it received.
    takes_differences: bool = True
    #: The borrow takes the hold of the order that waits for it.
    holds_in_borrow: bool = True
    #: The hold that a borrow takes is subject to the buyer's limit.
    limits_borrows: bool = True
    #: An order that exists is not taken again.
    knows_orders: bool = True
    #: A partition that recovers repeats the lends that its peers have received.
    repeats_lends: bool = True
    #: It first borrows again, because it may have lent on the same units.
    borrows_before_repeating: bool = True
    #: A partition that recovers borrows again only lends that SQL has.
    borrows_again_saved: bool = True
    #: A worker finishes a transfer only after the call of its collector has ended.
    workers_wait: bool = True
    #: A partition takes only the operator's change after its last one.
    checks_changes: bool = True
    #: An operator's withdrawal is written in SQL after SQL has the reservation of its units.
    saves_reservations: bool = True
    #: A partition that lacks an operator's change stays closed.
    catches_up: bool = True


ALL_RULES = Rules()


class Basket(msgspec.Struct, frozen=True):
    """The request of one order: the buyer's home partition, and the units wanted of each SKU."""

    home: int
    wants: tuple[int, ...]
    buyer: int


class Sale(msgspec.Struct, frozen=True):
    """The constants of a sale; the number of an order is its place in `baskets`."""

    partitions: int
    skus: int
    baskets: tuple[Basket, ...]
    rules: Rules = ALL_RULES
    #: Units of one SKU that a buyer may hold or own.
    limit: int = 9

    def slot(self, peer: int, sku: int) -> int:
        """Return the place of a peer and SKU in `lent` and `received`."""
        return peer * self.skus + sku


class Order(msgspec.Struct, frozen=True):
    """An order that holds or owns its units. An order that has ended is not kept."""

    number: int
    status: str
    is_due: bool = False


class Lot(msgspec.Struct, frozen=True):
    """All transfers of one donor, receiver and SKU: the last number, and the sum of their units."""

    number: int
    units: int


NOTHING_LENT = Lot(0, 0)


class Partition(msgspec.Struct, frozen=True):
    """The state of one partition."""

    total: tuple[int, ...]
    available: tuple[int, ...]
    lent: tuple[Lot, ...]
    received: tuple[Lot, ...]
    orders: tuple[Order, ...] = ()
    refills: int = 0
    epoch: int = 1
    #: The operator's change that the partition took last.
    change: int = 0
    #: None while the partition is open; else how many comparisons with peers it has made.
    recovery: int | None = None


class Reply(msgspec.Struct, frozen=True):
    """The answer of a script: a word, and for a lend its number and units."""

    word: str
    number: int = 0
    units: int = 0
    #: The units of all lends up to this number.
    up_to: int = 0


def empty_partition(sale: Sale, available: tuple[int, ...]) -> Partition:
    """Return a partition without orders and transfers."""
    lots = (NOTHING_LENT,) * (sale.partitions * sale.skus)
    return Partition(available, available, lots, lots)


def units_of(sale: Sale, partition: Partition, sku: int) -> int:
    """Return the units of one SKU that are held or sold in a partition."""
    return sum(sale.baskets[order.number].wants[sku] for order in partition.orders)


def is_due(partition: Partition) -> bool:
    """Whether the deadline of a hold has passed."""
    return any(order.is_due for order in partition.orders)


def _order(partition: Partition, number: int) -> Order | None:
    return next((order for order in partition.orders if order.number == number), None)


def _plus(left: tuple[int, ...], right: tuple[int, ...], sign: int = 1) -> tuple[int, ...]:
    return tuple(a + sign * b for a, b in zip(left, right, strict=True))


def put(values: tuple, place: int, value: object) -> tuple:
    """Return a tuple with one entry replaced."""
    return (*values[:place], value, *values[place + 1 :])


def _refilled(sale: Sale, partition: Partition, cause: str) -> int:
    return partition.refills + (cause in sale.rules.refills)


def _over_limit(sale: Sale, partition: Partition, basket: Basket) -> bool:
    owned = (0,) * sale.skus
    for order in partition.orders:
        if sale.baskets[order.number].buyer == basket.buyer:
            owned = _plus(owned, sale.baskets[order.number].wants)
    return any(
        wanted and has + wanted > sale.limit
        for has, wanted in zip(owned, basket.wants, strict=True)
    )


def prepare(
    sale: Sale, partition: Partition, number: int, *, limits: bool = True
) -> tuple[Partition, Reply]:
    """Take the hold of one order: held, limit, due or dry."""
    if partition.recovery is not None:
        return partition, Reply("recovering")
    if sale.rules.knows_orders and _order(partition, number):
        return partition, Reply("held")
    basket = sale.baskets[number]
    if limits and _over_limit(sale, partition, basket):
        return partition, Reply("limit")
    left = _plus(partition.available, basket.wants, -1)
    if min(left) < 0:
        return partition, Reply("due" if is_due(partition) else "dry")
    orders = (*partition.orders, Order(number, HELD))
    orders = tuple(sorted(orders, key=lambda order: order.number))
    return msgspec.structs.replace(partition, available=left, orders=orders), Reply("held")


def _ended(sale: Sale, partition: Partition, order: Order, cause: str) -> Partition:
    return msgspec.structs.replace(
        partition,
        available=_plus(partition.available, sale.baskets[order.number].wants),
        orders=tuple(other for other in partition.orders if other is not order),
        refills=_refilled(sale, partition, cause),
    )


def expire(sale: Sale, partition: Partition) -> tuple[Partition, Reply]:
    """End each hold that is due."""
    if partition.recovery is not None:
        return partition, Reply("recovering")
    for order in partition.orders:
        if order.is_due:
            partition = _ended(sale, partition, order, "expire")
    return partition, Reply("expired")


def release(sale: Sale, partition: Partition, number: int) -> tuple[Partition, Reply]:
    """End a hold at the buyer's wish."""
    order = _order(partition, number)
    if partition.recovery is not None:
        return partition, Reply("recovering")
    if order is None or order.status != HELD:
        return partition, Reply("present" if order else "not_found")
    return _ended(sale, partition, order, "release"), Reply("released")


def _with_order(partition: Partition, order: Order, refills: int) -> Partition:
    orders = tuple(order if other.number == order.number else other for other in partition.orders)
    return msgspec.structs.replace(partition, orders=orders, refills=refills)


def claim(sale: Sale, partition: Partition, number: int) -> tuple[Partition, Reply]:
    """Lift the deadline of a hold whose payment begins."""
    order = _order(partition, number)
    if partition.recovery is not None:
        return partition, Reply("recovering")
    if order is None or order.status != HELD:
        return partition, Reply("present" if order else "not_found")
    refills = partition.refills
    if order.is_due:
        refills = _refilled(sale, partition, "late_claim")
    return _with_order(partition, Order(number, CONFIRMING), refills), Reply("claimed")


def finish(sale: Sale, partition: Partition, number: int, *, paid: bool) -> tuple[Partition, Reply]:
    """Sell the units of a claimed order, or give them back."""
    order = _order(partition, number)
    if partition.recovery is not None:
        return partition, Reply("recovering")
    if order is None or order.status != CONFIRMING:
        return partition, Reply("lost")
    if paid:
        return _with_order(partition, Order(number, SOLD), partition.refills), Reply("sold")
    return _ended(sale, partition, order, "decline"), Reply("declined")


def sold_again(sale: Sale, partition: Partition, number: int) -> tuple[Partition, Reply]:
    """Remake a paid order that the partition has lost; without stock its payment is refunded."""
    taken, reply = prepare(sale, partition, number)
    if reply.word != "held":
        return partition, Reply(reply.word if reply.word == "recovering" else "refunded")
    return _with_order(taken, Order(number, SOLD), taken.refills), Reply("sold")


def lend(
    sale: Sale, partition: Partition, receiver: int, sku: int, units: int
) -> tuple[Partition, Reply]:
    """Give up to this many units to a receiver under the next number: lent, due or dry."""
    if partition.recovery is not None:
        return partition, Reply("recovering")
    units = min(units, partition.available[sku])
    if units == 0:
        return partition, Reply("due" if is_due(partition) else "dry")
    slot = sale.slot(receiver, sku)
    lot = partition.lent[slot]
    after = Lot(lot.number + 1, lot.units + units)
    lender = moved(partition, sku, -units, lent=put(partition.lent, slot, after))
    return lender, Reply("lent", after.number, units, after.units)


def moved(partition: Partition, sku: int, units: int, **changes: object) -> Partition:
    """Return a partition with more units of one SKU available, or fewer, and other changes."""
    return msgspec.structs.replace(
        partition,
        total=put(partition.total, sku, partition.total[sku] + units),
        available=put(partition.available, sku, partition.available[sku] + units),
        **changes,
    )


def borrow(
    sale: Sale, partition: Partition, donor: int, sku: int, given: Reply, waiting: int | None
) -> tuple[Partition, Reply]:
    """Receive one transfer, and take the hold of the order that waits for it, if it now can.

    Args:
        given: the number and the units of the transfer.
        waiting: the order that waits; None for a worker that finishes an open transfer.

    Returns:
        `done` for a transfer that was received before, else `borrowed`, or `held` or `limit` for
        the waiting order.
    """
    if partition.recovery is not None:
        return partition, Reply("recovering")
    slot = sale.slot(donor, sku)
    lot = partition.received[slot]
    if sale.rules.checks_numbers and given.number <= lot.number:
        return partition, Reply("done")
    units = given.up_to - lot.units if sale.rules.takes_differences else given.units
    after = Lot(max(lot.number, given.number), lot.units + units)
    received = put(partition.received, slot, after)
    refills = _refilled(sale, partition, "borrow")
    borrowed = moved(partition, sku, units, received=received, refills=refills)
    if waiting is None or not sale.rules.holds_in_borrow:
        return borrowed, Reply("borrowed")
    taken, reply = prepare(sale, borrowed, waiting, limits=sale.rules.limits_borrows)
    return taken, reply if reply.word in {"held", "limit"} else Reply("borrowed")


def change_total(
    sale: Sale,
    partition: Partition,
    number: int,
    deltas: tuple[int, ...],
    reservation: int | None = None,
) -> tuple[Partition, Reply]:
    """Apply an operator's change: done, gap or too_low.

    Args:
        reservation: the order that holds the units to withdraw; it ends, and they leave the sale.

    Returns:
        `gap` while an earlier change is missing, `too_low` if units to withdraw are not there.
    """
    if sale.rules.checks_changes and number != partition.change + 1:
        return partition, Reply("done" if number <= partition.change else "gap")
    order = None if reservation is None else _order(partition, reservation)
    available, refills = partition.available, partition.refills
    if order is None:
        available = _plus(available, deltas)
        if min(available) < 0:
            return partition, Reply("too_low")
        refills = _refilled(sale, partition, "change") if any(deltas) else refills
    return msgspec.structs.replace(
        partition,
        total=_plus(partition.total, deltas),
        available=available,
        orders=tuple(other for other in partition.orders if other is not order),
        refills=refills,
        change=max(partition.change, number),
    ), Reply("done")
