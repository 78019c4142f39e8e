"""Projection of events onto rows: pure, in memory, one row per order for any number of events.

An invalid event is poison: it is unreadable, names an unknown order or item, takes a transition
that is not in the domain's table, or would make a counter negative. It changes nothing here, and
the caller stops before it.
"""

from typing import Annotated, Any, Final

import msgspec

from reservation.domain.events import Event, EventName
from reservation.domain.states import HOLDING, TRANSITIONS, SaleStatus, Status

__all__ = ["EventProjection", "InvalidEvent", "ItemState", "OrderState", "SaleState"]

#: The largest integer that BIGINT, JSON and Lua all represent exactly.
_COUNT_MAX: Final = 2**53
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Quantity = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_Delta = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
#: PostgreSQL's text accepts every character but NUL.
_Word = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]+$")]


class InvalidEvent(Exception):
    """The event is invalid; the message is one sentence with the reason."""


class SaleState(msgspec.Struct):
    """The sale's columns that events change."""

    name: str | None
    currency: str | None
    settings: str | None
    version: int
    switched: str


class ItemState(msgspec.Struct):
    """One row of `items`, in the order of its columns after the sale's id."""

    sku: str
    name: str
    price: int
    limit_per_buyer: int
    total: int
    available: int
    held: int
    sold: int
    listed: bool


class OrderState(msgspec.Struct):
    """One row of `orders`, in the order of its columns; `lines` are rows of their own."""

    order_id: str
    sale_id: str
    buyer_id: str
    status: Status
    amount: int
    currency: str
    order_name: str
    digest: str
    created_at_ms: int
    updated_at_ms: int
    expires_at_ms: int
    seq: int
    fence: int = 0
    payment_key: str | None = None
    claimed_at_ms: int | None = None
    lease_until_ms: int | None = None
    due_at_ms: int | None = None
    #: (sku, quantity, price), in the buyer's order.
    lines: tuple[tuple[str, int, int], ...] = ()


class _Prepared(msgspec.Struct, rename="camel"):
    origin: str = msgspec.field(name="from")
    to: Status
    buyer: _Word
    items: Annotated[list[tuple[_Word, _Quantity, _Count]], msgspec.Meta(min_length=1)]
    amount: _Count
    name: str
    digest: _Word
    expires_at: _Count


class _Moved(msgspec.Struct, rename="camel"):
    origin: Status = msgspec.field(name="from")
    to: Status
    fence: _Count | None = None
    payment_key: _Word | None = None
    lease_until: _Count | None = None
    due_at: _Count | None = None
    restock: bool = True
    version: _Count | None = None


class _Item(msgspec.Struct):
    sku: _Word
    name: str
    price: _Count
    total: _Count
    limit: _Quantity


class _SalePut(msgspec.Struct):
    version: _Count
    name: str
    currency: _Word
    items: list[_Item]


class _Switched(msgspec.Struct):
    status: SaleStatus


class _Restocked(msgspec.Struct):
    sku: str
    delta: _Delta
    total: _Count
    version: _Count | None = None


class _Transferred(msgspec.Struct, rename="camel"):
    peer: _Count
    sku: str
    number: _Quantity
    units: _Count
    up_to: _Count
    total: _Count
    version: _Count
    operation: str = ""


_PREPARED = msgspec.json.Decoder(_Prepared)
_MOVED = msgspec.json.Decoder(_Moved)
_SALE_PUT = msgspec.json.Decoder(_SalePut)
_SWITCHED = msgspec.json.Decoder(_Switched)
_RESTOCKED = msgspec.json.Decoder(_Restocked)
_TRANSFERRED = msgspec.json.Decoder(_Transferred)
_ANYTHING = msgspec.json.Decoder(dict[str, Any])

_AVAILABLE: Final = "available"
_HELD: Final = "held"
_SOLD: Final = "sold"

#: Which counter an order's units are in, by its status.
_COUNTER: Final = {
    status: _HELD if status in HOLDING else _SOLD if status is Status.CONFIRMED else _AVAILABLE
    for status in Status
}

_SWITCHABLE: Final = frozenset({SaleStatus.OPEN, SaleStatus.PAUSED, SaleStatus.CLOSED})


class EventProjection:
    """A sale's state in SQL, advanced by events.

    Args:
        sale_id: the sale of the events.
        sale: its columns.
        items: all of its items, by SKU.
        orders: the orders that the events name, as far as SQL has them.
    """

    def __init__(
        self,
        sale_id: str,
        *,
        sale: SaleState,
        items: dict[str, ItemState],
        orders: dict[str, OrderState],
    ) -> None:
        self.sale = sale
        self.items = items
        self.orders = orders
        self.sale_changed = False
        #: SKUs of changed items.
        self.changed_items: set[str] = set()
        #: Ids of changed orders, and of new ones.
        self.changed_orders: dict[str, None] = {}
        self.new_orders: list[str] = []
        #: Rows of `stock_movements`.
        self.movements: list[tuple[str, int, str, int, int, int, int]] = []
        #: Rows of `transfers`: the lends.
        self.lends: list[tuple[str, int, str, int, int, int, int, str]] = []
        #: Order, payment key and fence of ended attempts.
        self.ended_attempts: list[tuple[str, str, int]] = []
        self._sale_id = sale_id

    def add(self, event: Event) -> None:
        """Apply one event.

        Raises:
            InvalidEvent: the event is poison; nothing changed.
        """
        if not 0 <= event.at_ms <= _COUNT_MAX:
            raise InvalidEvent("the time is invalid")
        try:
            match event.event:
                case EventName.PREPARED:
                    self._prepare(event, _PREPARED.decode(event.data))
                case EventName.SALE_PUT:
                    self._put(event, _SALE_PUT.decode(event.data))
                case EventName.SALE_SWITCHED:
                    self._switch(_SWITCHED.decode(event.data))
                case EventName.RESTOCKED:
                    data = _RESTOCKED.decode(event.data)
                    self._change_total(event, data.sku, data.delta, data.total, data.version)
                case EventName.LENT | EventName.BORROWED:
                    self._transfer(event, _TRANSFERRED.decode(event.data))
                case EventName.REBUILT:
                    _ANYTHING.decode(event.data)
                case (
                    EventName.CLAIMED
                    | EventName.TAKEN_OVER
                    | EventName.CONFIRMED
                    | EventName.AWAITING_DEPOSIT
                    | EventName.DECLINED
                    | EventName.VOIDED
                    | EventName.RELEASED
                    | EventName.EXPIRED
                    | EventName.REFUNDED
                ):
                    self._move(event, _MOVED.decode(event.data))
                case _:
                    raise InvalidEvent("unknown event")
        except msgspec.MsgspecError as error:
            raise InvalidEvent(f"its data cannot be read: {error}") from error

    def _prepare(self, event: Event, data: _Prepared) -> None:
        if event.order_id in self.orders:
            raise InvalidEvent("the order already exists")
        if data.origin or data.to not in (Status.HELD, Status.PREPARED) or not event.order_id:
            raise InvalidEvent(
                f"invalid initial transition from {data.origin!r} to {data.to.value}"
            )
        if self.sale.currency is None:
            raise InvalidEvent("the sale has no currency yet")
        lines = tuple((sku, quantity, price) for sku, quantity, price in data.items)
        if len({sku for sku, _, _ in lines}) != len(lines):
            raise InvalidEvent("two lines have the same item")
        self._move_units(event.seq, lines, _AVAILABLE, _COUNTER[data.to], restock=True)
        self.orders[event.order_id] = OrderState(
            order_id=event.order_id,
            sale_id=self._sale_id,
            buyer_id=data.buyer,
            status=data.to,
            amount=data.amount,
            currency=self.sale.currency,
            # PostgreSQL's text cannot store NUL; the event keeps the original.
            order_name=data.name.replace("\0", ""),
            digest=data.digest,
            created_at_ms=event.at_ms,
            updated_at_ms=event.at_ms,
            expires_at_ms=data.expires_at,
            seq=event.seq,
            lines=lines,
        )
        self.new_orders.append(event.order_id)
        self.changed_orders[event.order_id] = None

    def _move(self, event: Event, data: _Moved) -> None:
        order = self.orders.get(event.order_id)
        if order is None or order.sale_id != self._sale_id:
            raise InvalidEvent("unknown order")
        if data.origin is not order.status:
            raise InvalidEvent(f"the order is {order.status.value}, not {data.origin.value}")
        takes_over = (
            event.event == EventName.TAKEN_OVER and data.origin is data.to is Status.CONFIRMING
        )
        if data.to not in TRANSITIONS[data.origin] and not takes_over:
            raise InvalidEvent(f"invalid transition from {data.origin.value} to {data.to.value}")
        payment_key = data.payment_key or order.payment_key
        if data.to is Status.CONFIRMING and not payment_key:
            raise InvalidEvent("the payment key is missing")
        self._move_units(
            event.seq, order.lines, _COUNTER[data.origin], _COUNTER[data.to], restock=data.restock
        )
        self._move_version(data.version)
        order.status = data.to
        order.updated_at_ms, order.seq = event.at_ms, event.seq
        order.fence = order.fence if data.fence is None else data.fence
        if event.event == EventName.CLAIMED:
            order.payment_key, order.claimed_at_ms = payment_key, event.at_ms
        if data.origin is Status.CONFIRMING and data.to is not Status.CONFIRMING and payment_key:
            self.ended_attempts.append((order.order_id, payment_key, order.fence))
        order.lease_until_ms = data.lease_until if data.to is Status.CONFIRMING else None
        order.due_at_ms = data.due_at if data.to is Status.AWAITING_DEPOSIT else None
        self.changed_orders[event.order_id] = None

    def _put(self, event: Event, data: _SalePut) -> None:
        wanted = {item.sku: item for item in data.items}
        for sku, item in self.items.items():
            taken = item.held + item.sold
            if taken > (wanted[sku].total if sku in wanted else 0):
                raise InvalidEvent(f"{sku} would have a total below held plus sold")
        for sku, change in wanted.items():
            item = self.items.setdefault(sku, _nothing_of(sku))
            item.name, item.price = change.name.replace("\0", ""), change.price
            item.limit_per_buyer, item.listed = change.limit, True
            self._add_units(event.seq, item, change.total - item.total)
            self.changed_items.add(sku)
        for sku, item in self.items.items():
            if sku not in wanted and item.listed:
                item.listed = False
                self._add_units(event.seq, item, -item.total)
                self.changed_items.add(sku)
        self.sale.name, self.sale.currency = data.name.replace("\0", ""), data.currency
        self.sale.version, self.sale.settings = data.version, event.data
        self.sale_changed = True

    def _switch(self, data: _Switched) -> None:
        if data.status not in _SWITCHABLE:
            raise InvalidEvent(f"invalid sale status {data.status.value}")
        self.sale.switched = data.status.value
        self.sale_changed = True

    def _transfer(self, event: Event, data: _Transferred) -> None:
        """Move units between this partition and a peer, as far as this partition has them."""
        if data.up_to < data.units:
            raise InvalidEvent(f"{data.sku}: {data.units} units of {data.up_to} in all")
        is_lend = event.event == EventName.LENT
        if is_lend and data.units < 1:
            raise InvalidEvent(f"{data.sku}: a lend of no unit")
        delta = -data.units if is_lend else data.units
        self._change_total(event, data.sku, delta, data.total, data.version)
        if is_lend:
            units = (data.number, data.units, data.up_to)
            lend = (self._sale_id, data.peer, data.sku, *units, event.seq, data.operation)
            self.lends.append(lend)

    def _change_total(
        self, event: Event, sku: str, delta: int, total: int, version: int | None
    ) -> None:
        item = self.items.get(sku)
        if item is None:
            raise InvalidEvent(f"unknown item {sku}")
        if item.total + delta != total:
            raise InvalidEvent(f"{sku}: total {item.total} plus {delta} is not {total}")
        if item.available + delta < 0:
            raise InvalidEvent(f"{sku}: fewer units are available than the event withdraws")
        self._add_units(event.seq, item, delta)
        self._move_version(version)

    def _move_version(self, version: int | None) -> None:
        """Take over the version of a change to a total that was not a PUT."""
        if version is not None:
            self.sale.version, self.sale_changed = version, True

    def _add_units(self, seq: int, item: ItemState, delta: int) -> None:
        item.total += delta
        item.available += delta
        self.changed_items.add(item.sku)
        if delta:
            self.movements.append((self._sale_id, seq, item.sku, delta, 0, 0, delta))

    def _move_units(
        self,
        seq: int,
        lines: tuple[tuple[str, int, int], ...],
        origin: str,
        to: str,
        *,
        restock: bool,
    ) -> None:
        """Move each line's units between two counters; checked before the first one moves."""
        for sku, quantity, _ in lines:
            item = self.items.get(sku)
            if item is None:
                raise InvalidEvent(f"unknown item {sku}")
            if origin != to and getattr(item, origin) < quantity:
                raise InvalidEvent(f"{sku}: fewer than {quantity} units are {origin}")
        if origin == to:
            return
        for sku, quantity, _ in lines:
            item = self.items[sku]
            deltas = {_AVAILABLE: 0, _HELD: 0, _SOLD: 0}
            deltas[origin] -= quantity
            # Units that are not restocked leave the sale.
            deltas[to] += quantity if restock else 0
            item.available += deltas[_AVAILABLE]
            item.held += deltas[_HELD]
            item.sold += deltas[_SOLD]
            item.total -= 0 if restock else quantity
            self.changed_items.add(sku)
            self.movements.append(
                (
                    self._sale_id,
                    seq,
                    sku,
                    deltas[_AVAILABLE],
                    deltas[_HELD],
                    deltas[_SOLD],
                    0 if restock else -quantity,
                )
            )


def _nothing_of(sku: str) -> ItemState:
    return ItemState(
        sku=sku,
        name="",
        price=0,
        limit_per_buyer=1,
        total=0,
        available=0,
        held=0,
        sold=0,
        listed=True,
    )
