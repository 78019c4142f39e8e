"""Sale state: a fold of one sale's events, each one checked and then applied.

The scripts write one event per change, numbered without a gap, in the very step that makes the
change. So the outbox is the order in which everything happened, and folding it is enough to know
the state of every order, item and buyer after each number.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import msgspec

from reservation.domain.events import GENESIS, EventName, chain_of
from reservation.domain.payment import FORGOTTEN, PaymentOutcome, Reason
from reservation.domain.states import UNPAID, HoldPolicy, SaleStatus
from reservation.verification.model import event_data as facts_of
from reservation.verification.model.event_data import (
    AVAILABLE,
    EDGES,
    ENDS,
    Basket,
    Edge,
    Moved,
    Prepared,
    counter_of,
)
from reservation.verification.model.violations import Broken, Violation

__all__ = ["Item", "Order", "SaleState"]

_prepared, _moved = facts_of.PREPARED.decode, facts_of.MOVED.decode


class Item:
    """One item's counters, price and limit."""

    __slots__ = ("available", "held", "limit", "price", "sold", "total")

    def __init__(self, total: int, price: int, limit: int) -> None:
        self.total, self.price, self.limit = total, price, limit
        self.available, self.held, self.sold = total, 0, 0

    @property
    def row(self) -> tuple[int, int, int, int]:
        """`total`, `available`, `held`, `sold`."""
        return self.total, self.available, self.held, self.sold

    @property
    def oversold(self) -> bool:
        """Whether more is held and sold than there is."""
        return self.available < 0 or self.held < 0 or self.sold < 0

    def move(self, quantity: int, origin: str, target: str) -> None:
        """Take units from one counter to another."""
        if origin == "held":
            self.held -= quantity
        elif origin == "sold":
            self.sold -= quantity
        else:
            self.available -= quantity
        if target == "sold":
            self.sold += quantity
        elif target == "held":
            self.held += quantity
        else:
            self.available += quantity


class Order(msgspec.Struct, eq=False, gc=False):
    """One order in the state that its events gave it."""

    status: str
    buyer: str
    lines: Basket
    amount: int
    expires_at: int
    fence: int = 0
    #: The payment key of the current or last attempt; empty after a void.
    key: str = ""
    #: The end of each payment key's attempt: the event's name.
    ends: dict[str, str] | None = None


class SaleState:
    """The state of one sale after the last event that it was given.

    Args:
        deadlines: whether times are judged too; false for a test that sets deadlines by hand.
    """

    def __init__(self, *, deadlines: bool = True) -> None:
        self.items: dict[str, Item] = {}
        self.orders: dict[str, Order] = {}
        #: Units that count against a buyer's limit, by SKU and buyer.
        self.taken: defaultdict[str, dict[str, int]] = defaultdict(dict)
        #: Orders that hold nothing and were not paid, by buyer.
        self._unpaid: defaultdict[str, int] = defaultdict(int)
        self.status = SaleStatus.OPEN.value
        self.policy = HoldPolicy.PREPARE
        self.opens_at = self.closes_at = 0
        #: A partition's last number and the sum of its units, by direction, peer and SKU.
        self.transfers: dict[tuple[str, int, str], tuple[int, int]] = {}
        self.version = self.seq = 0
        self.chain = GENESIS
        #: Each basket once: most buyers want the same one, and there are millions of them.
        self._baskets: dict[Basket, Basket] = {}
        self._deadlines = deadlines
        self._own: dict[str, Callable[[str], None]] = {
            EventName.SALE_PUT: self._put,
            EventName.SALE_SWITCHED: self._switch,
            EventName.RESTOCKED: self._restock,
            EventName.LENT: partial(self._transfer, "lent", -1),
            EventName.BORROWED: partial(self._transfer, "received", 1),
            EventName.REBUILT: self._rebuilt,
        }

    def unpaid(self, buyer: str) -> int:
        """How many orders of this buyer hold nothing and were not paid."""
        return self._unpaid.get(buyer, 0)

    def follow(
        self, seq: int, event: str, order_id: str, at_ms: int, data: str, chain: str
    ) -> None:
        """Check that an event is the next one.

        Raises:
            Violation: it is not, or its chain value does not follow from the one before. One that
                is `REPEATED` must not be applied; after the others the sale continues from it.
        """
        before, due = self.chain, self.seq + 1
        if seq < due:
            raise Violation(Broken.REPEATED, f"event {seq} comes after event {self.seq}")
        self.seq, self.chain = seq, chain
        if seq != due:
            raise Violation(Broken.GAP, f"event {due} is missing: the next event is {seq}")
        if chain != chain_of(before, seq, event, order_id, at_ms, data):
            raise Violation(Broken.CHAIN, f"the chain value of event {seq} does not follow")

    def apply(self, event: str, order_id: str, at_ms: int, data: str) -> Order | None:
        """Apply an event; returns the order that it moved, if any.

        Raises:
            Violation: it breaks a promise. It is still applied as far as possible, so that one
                fault does not appear as a hundred.
        """
        try:
            if event == "prepared":
                return self._prepare(order_id, at_ms, _prepared(data))
            if event not in self._own:
                return self._move(event, order_id, at_ms, _moved(data))
            self._own[event](data)
        except msgspec.MsgspecError as error:
            raise Violation(Broken.UNREADABLE, f"{event}: its data: {error}") from error
        return None

    def _prepare(self, order_id: str, at_ms: int, facts: Prepared) -> Order:
        if order_id in self.orders:
            raise Violation(Broken.TRANSITION, f"{order_id} is prepared twice")
        if facts.origin or facts.to != ("HELD" if self.policy == "prepare" else "PREPARED"):
            raise Violation(
                Broken.TRANSITION, f"{order_id} begins as {facts.to} from {facts.origin!r}"
            )
        lines = self._baskets.setdefault(facts.items, facts.items)
        order = self.orders[order_id] = Order(
            facts.to, facts.buyer, lines, facts.amount, facts.expires_at
        )
        self._unpaid[facts.buyer] += facts.to in UNPAID
        amount, fault = 0, None
        for sku, quantity, price in lines:
            item = self.items.get(sku)
            if item is None:
                raise Violation(Broken.UNKNOWN_ITEM, f"{order_id}: {sku} is not on sale")
            amount += price * quantity
            if price != item.price and not facts.remade:
                fault = Violation(Broken.PRICE, f"{order_id}: {sku} at {price}, not {item.price}")
        fault = self._take(order_id, order, holds=facts.to == "HELD") or fault
        if amount != facts.amount:
            fault = Violation(Broken.PRICE, f"{order_id}: {facts.amount} for {amount}")
        timed = self._deadlines and not facts.remade
        if fault is None and timed and not self._open_at(at_ms):
            fault = Violation(Broken.TIME, f"{order_id} is prepared while the sale is not open")
        if fault:
            raise fault
        return order

    def _open_at(self, at_ms: int) -> bool:
        return self.status == "open" and self.opens_at <= at_ms < self.closes_at

    def _take(self, order_id: str, order: Order, *, holds: bool) -> Violation | None:
        """Take an order's units from `available`; returns the violation, if any."""
        fault = None
        buyer = order.buyer
        for sku, quantity, _ in order.lines:
            item = self.items.get(sku)
            if item is None:
                return Violation(Broken.UNKNOWN_ITEM, f"{order_id}: {sku} is not on sale")
            taken = self.taken[sku]
            has = taken.get(buyer, 0) + quantity
            if has > item.limit:
                fault = Violation(
                    Broken.LIMIT,
                    f"{order_id}: its buyer has {has} of {sku}, the limit is {item.limit}",
                )
            if item.available < quantity:
                fault = Violation(
                    Broken.OVERSOLD,
                    f"{order_id} takes {quantity} {sku}, {item.available} are available",
                )
            if holds:
                item.available -= quantity
                item.held += quantity
                taken[buyer] = has
        return fault

    def _move(self, event: str, order_id: str, at_ms: int, facts: Moved) -> Order:
        order = self.orders.get(order_id)
        if order is None:
            raise Violation(Broken.UNKNOWN_ORDER, f"{event}: {order_id} was not prepared")
        to, fence, fault = facts.to, facts.fence, None
        edge = EDGES.get((event, facts.origin, to))
        if edge is None or facts.origin != order.status:
            fault = _transition_fault(event, order_id, order, facts)
            edge = Edge(counter_of(order.status), counter_of(to), step=0, timed=False)
        elif fence is not None and not _follows(fence, order.fence, edge.step):
            due = f"at least {order.fence + 1}" if edge.step else order.fence
            fault = Violation(Broken.FENCE, f"{event}: {order_id}, fence {fence}, expected {due}")
        elif edge.timed and self._deadlines:
            fault = self._time_fault(event, order_id, order, at_ms)
        self._unpaid[order.buyer] += (to in UNPAID) - (order.status in UNPAID)
        order.status = to
        if fence is not None:
            order.fence = fence
        if event == "claimed":
            order.key = facts.payment_key
        elif event == "confirmed":
            if not order.key and fault is None:
                fault = Violation(Broken.UNPAID, f"{order_id} is sold without a payment")
        elif order.key and event != "taken_over":
            _end_attempt(order, event, facts.cause)
        if edge.origin != edge.target:
            moved = self._move_units(order_id, order, edge, facts)
            fault = fault or moved
        if not facts.restock:
            fault = fault or self._version_fault(facts.version)
        if fault:
            raise fault
        return order

    def _time_fault(self, event: str, order_id: str, order: Order, at_ms: int) -> Violation | None:
        """An order that expires early, or that is held again outside of the sale's window."""
        if event == "expired":
            early = order.expires_at - at_ms
            reason = f"{order_id} expires {early} ms before its deadline"
            return Violation(Broken.TIME, reason) if early > 0 else None
        if self._open_at(at_ms):
            return None
        return Violation(Broken.TIME, f"{order_id} is held again while the sale is not open")

    def _move_units(
        self, order_id: str, order: Order, edge: Edge, facts: Moved
    ) -> Violation | None:
        if edge.origin == AVAILABLE:
            return self._take(order_id, order, holds=True)
        fault = None
        for sku, quantity, _ in order.lines:
            item = self.items.get(sku)
            if item is None:
                return Violation(Broken.UNKNOWN_ITEM, f"{order_id}: {sku} is not on sale")
            item.move(quantity, edge.origin, edge.target)
            if edge.target == AVAILABLE:
                taken = self.taken[sku]
                taken[order.buyer] = taken.get(order.buyer, 0) - quantity
                if not facts.restock:
                    item.available -= quantity
                    item.total -= quantity
            if item.available < 0 or item.held < 0 or item.sold < 0:
                fault = Violation(Broken.OVERSOLD, f"{sku} after {order_id}: {item.row}")
        return fault

    def _put(self, data: str) -> None:
        facts = facts_of.SALE_PUT.decode(data)
        self.opens_at, self.closes_at = facts.opens_at, facts.closes_at
        self.policy = facts.hold_policy
        before, self.items = self.items, {}
        fault = self._version_fault(facts.version)
        for row in facts.items:
            item = self.items[row.sku] = Item(row.total, row.price, row.limit)
            standing = before.pop(row.sku, None)
            if standing is not None:
                item.held, item.sold = standing.held, standing.sold
                item.available = item.total - item.held - item.sold
            if item.oversold:
                fault = Violation(
                    Broken.OVERSOLD, f"{row.sku}: total below held plus sold: {item.row}"
                )
        for sku, item in before.items():
            if item.held + item.sold:
                fault = Violation(
                    Broken.COUNTERS, f"{sku} is removed with units in use: {item.row}"
                )
        if fault:
            raise fault

    def _version_fault(self, version: int) -> Violation | None:
        """A change of the settings or of a total must raise the version by one."""
        due, self.version = self.version + 1, version
        if not version or version == due:
            return None
        return Violation(Broken.COUNTERS, f"the sale's version is {version}, expected {due}")

    def _switch(self, data: str) -> None:
        self.status = facts_of.SWITCHED.decode(data).status.value

    def _restock(self, data: str) -> None:
        facts = facts_of.RESTOCKED.decode(data)
        self._change_total("restocked", facts.sku, facts.delta, facts.total, facts.version)

    def _transfer(self, direction: str, sign: int, data: str) -> None:
        """Apply units lent to a peer or received from one; numbers of one peer and SKU increase."""
        facts = facts_of.TRANSFERRED.decode(data)
        key = (direction, facts.peer, facts.sku)
        number, units = self.transfers.get(key, (0, 0))
        self.transfers[key] = (facts.number, facts.up_to)
        self._change_total(direction, facts.sku, sign * facts.units, facts.total, facts.version)
        # After a restore of the donor, the receiver may skip numbers.
        follows = facts.number == number + 1 if direction == "lent" else facts.number > number
        if not follows or facts.up_to != units + facts.units:
            raise Violation(
                Broken.COUNTERS,
                f"{facts.sku} {direction}: number {facts.number} up to {facts.up_to} units"
                f" after number {number} up to {units}",
            )

    def _change_total(self, event: str, sku: str, delta: int, total: int, version: int) -> None:
        item = self.items.get(sku)
        if item is None:
            raise Violation(Broken.UNKNOWN_ITEM, f"{event}: {sku} is not on sale")
        item.available += delta
        item.total += delta
        fault = self._version_fault(version)
        if fault:
            raise fault
        if item.oversold:
            raise Violation(Broken.OVERSOLD, f"{sku} after {event}: {item.row}")
        if item.total != total:
            raise Violation(
                Broken.COUNTERS,
                f"{sku} after {event}: the event's total is {total}, the counters are {item.row}",
            )

    def _rebuilt(self, data: str) -> None:
        """Redis was restored from SQL: the sale's state is unchanged."""


def _follows(fence: int, before: int, step: int) -> bool:
    """A claim gets a fence above all fences in SQL, including those of claims that Redis lost."""
    return fence > before if step else fence == before


def _end_attempt(order: Order, event: str, cause: str) -> None:
    """Record the outcome of the order's payment; a forgotten attempt allows its key to be reused.

    A void returns the order to its state before the claim; later events do not end that payment.
    """
    voided = Reason.read(event, {"cause": cause}) if event == PaymentOutcome.VOIDED else None
    if voided is None or voided.cause not in FORGOTTEN:
        order.ends = {**(order.ends or {}), order.key: event}
    if event == PaymentOutcome.VOIDED:
        order.key = ""


def _transition_fault(event: str, order_id: str, order: Order, facts: Moved) -> Violation:
    if facts.origin != order.status and {order.status, facts.to} <= ENDS:
        return Violation(
            Broken.SECOND_END, f"{order_id} is {order.status} and also becomes {facts.to}"
        )
    if facts.origin != order.status:
        return Violation(
            Broken.TRANSITION,
            f"{event}: {order_id} leaves {facts.origin}, but is {order.status}",
        )
    return Violation(
        Broken.TRANSITION, f"{event} moves {order_id} from {facts.origin} to {facts.to}"
    )
