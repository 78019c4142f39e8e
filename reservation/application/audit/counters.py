"""Counter audit: Redis' counters at one instant against the fold of every event up to it.

The counters are read atomically with the number of the last event. SQL supplies the fold of its
events; the rest is folded here from the outbox. Redis is never blocked for longer than one small
script, for any number of orders.
"""

from collections.abc import Iterable
from typing import Final

import msgspec

from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.sale_store import Counters, SaleStore
from reservation.adapters.sql.store import SqlStore
from reservation.domain.clock import Clock
from reservation.domain.errors import SaleNotFound, Unavailable
from reservation.domain.events import Event, EventName, chain_of
from reservation.domain.states import HOLDING, Status

__all__ = ["AuditReport", "CounterAudit", "SkuAudit"]

#: Events read at once: a reply of about 3 MB.
PAGE_EVENTS: Final = 5_000
#: Events that one audit reads from the outbox; a longer lag is a problem of SQL.
TAIL_EVENTS_MAX: Final = 2_000_000
#: Attempts that lose the race with a trim of the outbox: the next one sees SQL's newer state.
ROUNDS_MAX: Final = 5


class SkuAudit(msgspec.Struct, frozen=True, kw_only=True):
    """One item: Redis' counters, and whether the events agree."""

    sku: str
    total: int
    available: int
    held: int
    #: Part of `held`: orders whose payment is in progress.
    confirming: int
    sold: int
    ok: bool


class AuditReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an audit."""

    ok: bool
    checked_at_ms: int
    #: Events that SQL does not have yet: a lag, not an error.
    lag: int
    skus: tuple[SkuAudit, ...]
    problems: tuple[str, ...]


class _Fold:
    """The counters folded from the events."""

    def __init__(self) -> None:
        self.skus: dict[str, dict[str, int]] = {}
        self.orders: dict[str, tuple[Status, tuple[tuple[str, int], ...]]] = {}
        self.seq = 0
        self.chain = ""
        self.problems: list[str] = []

    def counters(self, sku: str) -> dict[str, int]:
        return self.skus.setdefault(
            sku, {"total": 0, "available": 0, "held": 0, "confirming": 0, "sold": 0}
        )

    def move(self, order_id: str, to: Status, *, restock: bool = True) -> None:
        status, lines = self.orders[order_id]
        for sku, quantity in lines:
            counters = self.counters(sku)
            counters[_counter(status)] -= quantity
            counters[_counter(to)] += quantity
            counters["confirming"] -= quantity if status is Status.CONFIRMING else 0
            counters["confirming"] += quantity if to is Status.CONFIRMING else 0
            if not restock:
                counters["available"] -= quantity
                counters["total"] -= quantity
        self.orders[order_id] = (to, lines)


def _counter(status: Status | None) -> str:
    if status in HOLDING:
        return "held"
    return "sold" if status is Status.CONFIRMED else "available"


class _OrderData(msgspec.Struct):
    """The fields of an order's event that the fold uses."""

    to: Status
    #: Empty for an order's first event.
    came_from: str = msgspec.field(name="from", default="")
    items: list[tuple[str, int, int]] = []
    restock: bool = True


class _ItemData(msgspec.Struct):
    sku: str
    total: int


class _SaleData(msgspec.Struct):
    items: list[_ItemData]


class _RestockData(msgspec.Struct):
    sku: str
    delta: int


class _TransferData(msgspec.Struct):
    sku: str
    units: int


class CounterAudit:
    """Audits the counters of sales."""

    def __init__(
        self, sales: SaleStore, sql: SqlStore, outbox: RedisOutbox, *, clock: Clock
    ) -> None:
        self._sales = sales
        self._sql = sql
        self._outbox = outbox
        self._clock = clock

    async def compare(self, sale_id: str) -> AuditReport:
        """Check one sale.

        Raises:
            SaleNotFound: neither Redis nor SQL has it.
            Unavailable: the outbox was trimmed during every attempt.
        """
        for _ in range(ROUNDS_MAX):
            fold = await self._from_sql(sale_id)
            flushed = fold.seq
            counters = await self._sales.counters(sale_id)
            if counters is None:
                if flushed == 0:
                    raise SaleNotFound
                return self._lost(flushed)
            lacking = await self._add_tail(sale_id, fold, counters.seq)
            if lacking is None:
                return self._compare(fold, counters, flushed)
            # An event leaves the outbox only once SQL has it; beyond SQL's cursor it is lost.
            if (await self._sql.events.cursor(sale_id))[0] < lacking:
                return self._without(lacking, counters.seq - flushed)
        raise Unavailable(retryAfter=1)

    async def _from_sql(self, sale_id: str) -> _Fold:
        found = await self._sql.sales.counters(sale_id)
        fold = _Fold()
        if found is None:
            return fold
        fold.seq, fold.chain = found.flushed_seq, found.chain
        for sku, counters in found.skus.items():
            fold.counters(sku).update(
                total=counters.total,
                available=counters.available,
                held=counters.held,
                confirming=counters.confirming,
                sold=counters.sold,
            )
        return fold

    async def _add_tail(self, sale_id: str, fold: _Fold, until: int) -> int | None:
        """Fold the outbox onto SQL's state; or return the missing event and fold none."""
        needed: list[Event] = []
        after = fold.seq
        while after < until and len(needed) < TAIL_EVENTS_MAX:
            page = await self._outbox.after(sale_id, after, PAGE_EVENTS)
            if not page or page[0].seq != after + 1:
                return after + 1
            needed += page
            after = page[-1].seq
        tail = [event for event in needed if event.seq <= until]
        await self._load_orders(fold, tail)
        for event in tail:
            _apply(fold, event)
        return None

    async def _load_orders(self, fold: _Fold, tail: Iterable[Event]) -> None:
        """Load the orders of the tail as of SQL's state, before the tail's own events."""
        first: dict[str, Event] = {}
        for event in tail:
            if event.order_id:
                first.setdefault(event.order_id, event)
        for order_id, event in first.items():
            if event.event == EventName.PREPARED:
                continue
            row = await self._sql.orders.get(order_id)
            if row is not None:
                # The flusher may have advanced since: then the event has the previous status.
                behind = row.seq <= fold.seq
                status = row.status if behind else _order_data(event).came_from
                lines = tuple((line.sku, line.quantity) for line in row.lines)
                fold.orders[order_id] = (Status(status), lines)

    def _lost(self, flushed: int) -> AuditReport:
        problem = f"Redis has no such sale, SQL has {flushed} of its events: rebuild it"
        return self._only(problem, lag=0)

    def _without(self, event: int, lag: int) -> AuditReport:
        return self._only(f"event {event} is neither in SQL nor in the outbox", lag=lag)

    def _only(self, problem: str, *, lag: int) -> AuditReport:
        """The report of a sale whose counters cannot be compared."""
        return AuditReport(
            ok=False, checked_at_ms=self._clock.now_ms(), lag=lag, skus=(), problems=(problem,)
        )

    def _compare(self, fold: _Fold, counters: Counters, flushed: int) -> AuditReport:
        problems = list(fold.problems)
        if counters.last_outbox_id != f"{counters.seq}-0":
            problems.append(
                f"the outbox ends at {counters.last_outbox_id}, the sale's head at {counters.seq}-0"
            )
        if flushed > counters.seq:
            problems.append(f"SQL is ahead: it has event {flushed}, Redis ends at {counters.seq}")
        elif fold.seq == counters.seq and fold.chain != counters.chain:
            problems.append(f"the hash chain breaks at event {counters.seq}")
        rows: list[SkuAudit] = []
        for sku, (total, available, held, sold) in counters.stocks.items():
            expected = fold.counters(sku)
            given = {"total": total, "available": available, "held": held, "sold": sold}
            wrong = [
                f"{sku}: {name} is {value}, {expected[name]} by the events"
                for name, value in given.items()
                if value != expected[name]
            ]
            if total != available + held + sold or min(given.values()) < 0:
                wrong.append(f"{sku}: {total} is not {available} + {held} + {sold}")
            problems += wrong
            rows.append(
                SkuAudit(
                    sku=sku,
                    total=total,
                    available=available,
                    held=held,
                    confirming=expected["confirming"],
                    sold=sold,
                    ok=not wrong,
                )
            )
        return AuditReport(
            ok=not problems,
            checked_at_ms=self._clock.now_ms(),
            lag=max(0, counters.seq - flushed),
            skus=tuple(rows),
            problems=tuple(problems),
        )


def _apply(fold: _Fold, event: Event) -> None:
    expected = chain_of(
        fold.chain,
        seq=event.seq,
        event=event.event,
        order_id=event.order_id,
        at_ms=event.at_ms,
        data=event.data,
    )
    if event.chain != expected:
        fold.problems.append(f"the hash chain breaks at event {event.seq}")
    fold.seq, fold.chain = event.seq, event.chain
    match event.event:
        case EventName.SALE_PUT:
            _apply_sale(fold, msgspec.json.decode(event.data, type=_SaleData))
        case EventName.RESTOCKED:
            change = msgspec.json.decode(event.data, type=_RestockData)
            counters = fold.counters(change.sku)
            counters["total"] += change.delta
            counters["available"] += change.delta
        case EventName.LENT | EventName.BORROWED:
            moved = msgspec.json.decode(event.data, type=_TransferData)
            units = moved.units if event.event == EventName.BORROWED else -moved.units
            counters = fold.counters(moved.sku)
            counters["total"] += units
            counters["available"] += units
        case EventName.SALE_SWITCHED | EventName.REBUILT:
            pass
        case _:
            _apply_order(fold, event)


def _apply_sale(fold: _Fold, sale: _SaleData) -> None:
    for item in sale.items:
        counters = fold.counters(item.sku)
        counters["available"] += item.total - counters["total"]
        counters["total"] = item.total


def _order_data(event: Event) -> _OrderData:
    return msgspec.json.decode(event.data, type=_OrderData)


def _apply_order(fold: _Fold, event: Event) -> None:
    data = _order_data(event)
    if event.event == EventName.PREPARED:
        lines = tuple((sku, quantity) for sku, quantity, _ in data.items)
        fold.orders[event.order_id] = (Status.PREPARED, lines)
    if event.order_id not in fold.orders:
        fold.problems.append(f"event {event.seq} belongs to an order that SQL lacks")
        return
    fold.move(event.order_id, data.to, restock=data.restock)
