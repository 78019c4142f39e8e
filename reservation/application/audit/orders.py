"""Order audit: buyers' limits against orders, sets against statuses, CONFIRMED against the PG.

All of it changes while it is read. So a mismatch is read again, and is a problem only if it
persists unchanged.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from reservation.adapters.redis.audit_reader import AuditReader, BuyerState, OrderState
from reservation.adapters.sql.store import SqlStore
from reservation.application.readiness.data_loss import is_under_way
from reservation.domain.clock import Clock, as_wire
from reservation.domain.payment_timeouts import DEFAULT_LIMITS
from reservation.domain.reservation import PAID_ORDERS, Reservation
from reservation.domain.states import HOLDING, LIVE, PAID, Status

__all__ = ["SET_OF", "OrderAudit"]

#: Problems of one kind that are reported; the first ones suffice to find the cause.
PROBLEMS_MAX: Final = 20
#: Reads of a mismatch, and the pause between them: far longer than a script.
READS_MAX: Final = 3
READ_PAUSE_SECONDS: Final = 0.05
#: Orders of SQL, or buyers, compared at once.
PAGE_ORDERS: Final = 1_000

#: The sorted set of an order, by its status; none for the others.
SET_OF: Final = {
    Status.HELD: "deadlines",
    Status.PREPARED: "deadlines",
    Status.CONFIRMING: "confirming",
    Status.AWAITING_DEPOSIT: "deposits",
}
#: An order in one of these is sold for its payment, or the payment is undecided.
_SERVED: Final = (
    Status.CONFIRMING,
    Status.AWAITING_DEPOSIT,
    Status.CONFIRMED,
)


class OrderAudit:
    """Finds problems that the counters alone do not show."""

    def __init__(self, inspection: AuditReader, sql: SqlStore, *, clock: Clock) -> None:
        self._inspection = inspection
        self._sql = sql
        self._clock = clock

    async def compare(self, sale_id: str) -> tuple[str, ...]:
        """The problems, each in one sentence with the SKU, the order and its event."""
        buyers = await self._buyers(sale_id)
        sets = await self._sets(sale_id)
        return (*buyers, *sets, *await self.compare_money(sale_id))

    async def compare_money(self, sale_id: str) -> tuple[str, ...]:
        """The problems of orders and payments, which SQL alone shows."""
        payments = [
            f"order {row.order_id} (event {row.seq}) is CONFIRMED, its payment at the PG is "
            f"{row.payment or 'not in SQL'}"
            for row in await self._sql.orders.list_unpaid(sale_id, PROBLEMS_MAX)
        ]
        return (*payments, *await self._unserved(sale_id))

    async def _unserved(self, sale_id: str) -> list[str]:
        """Intents without an end, money without a sale, done refunds, and overdue accounts."""
        before: list[str] = []
        problems: list[str] = []
        for _ in range(READS_MAX):
            before, problems = problems, await self._unserved_now(sale_id)
            # A payment being finished is in SQL a moment before its order.
            if not problems or problems == before:
                return problems
            await asyncio.sleep(READ_PAUSE_SECONDS)
        return [sentence for sentence in problems if sentence in before]

    async def _unserved_now(self, sale_id: str) -> list[str]:
        intents = await self._sql.intents.list_unmet(sale_id)
        found = await self._inspection.reservations([intent.order_id for intent in intents])
        unmet = [
            f"order {intent.order_id} has a payment intent under fence {intent.fence}; "
            f"{_order_state(found.get(intent.order_id))}"
            for intent in intents
            if not is_under_way(intent, found.get(intent.order_id))
        ]
        unsold = await self._sql.payments.list_unsold(sale_id, PROBLEMS_MAX)
        found = await self._inspection.reservations([row.order_id for row in unsold])
        money = [
            f"order {row.order_id} is paid at the PG; {_order_state(order)}"
            for row in unsold
            if (order := found.get(row.order_id)) is None
            or order.payment_key != row.payment_key
            or order.status not in _SERVED
        ]
        given_back = await self._given_back(sale_id)
        return [*unmet[:PROBLEMS_MAX], *money, *given_back, *await self._overdue(sale_id)]

    async def _given_back(self, sale_id: str) -> list[str]:
        """Orders that are sold although their refund is done; no worker continues it."""
        rows = await self._sql.refunds.list_of_sold(sale_id, PROBLEMS_MAX)
        found = await self._inspection.reservations([row.order_id for row in rows])
        return [
            f"order {row.order_id} (event {row.seq}) is CONFIRMED, its payment at the PG is "
            "CANCELED and its refund is done"
            for row in rows
            # SQL gets the end of an order after that of its refund.
            if (order := found.get(row.order_id)) is not None and order.status is Status.CONFIRMED
        ]

    async def _overdue(self, sale_id: str) -> list[str]:
        """Accounts that the PG has neither shown as paid nor cancelled since their due date."""
        before_ms = self._clock.now_ms() - round(DEFAULT_LIMITS.alarm_seconds * 1000)
        rows = await self._sql.orders.list_overdue(sale_id, before_ms, PROBLEMS_MAX)
        found = await self._inspection.reservations([row.order_id for row in rows])
        return [
            f"order {row.order_id} (event {row.seq}) is AWAITING_DEPOSIT, and its account was due"
            f" at {as_wire(row.due_at_ms)}"
            for row in rows
            if (order := found.get(row.order_id)) is not None
            and order.status is Status.AWAITING_DEPOSIT
        ]

    async def _buyers(self, sale_id: str) -> list[str]:
        problems: list[str] = []
        # The outbox before SQL: an event that leaves it meanwhile is in SQL by then.
        seq, _ = await self._sql.events.cursor(sale_id)
        async for buyer_ids in self._inspection.buyers(sale_id, seq):
            problems += await self._miscounted(sale_id, buyer_ids)
            if len(problems) >= PROBLEMS_MAX:
                break
        async for rows in self._sql.orders.pages_with_buyers(sale_id):
            if len(problems) >= PROBLEMS_MAX:
                break
            page = list(dict.fromkeys(buyer_id for _, buyer_id in rows))
            by_sql = await self._sql.orders.count_by_buyer(sale_id, page)
            counts = await self._inspection.counts(sale_id, page)
            # Most have not changed since the read of SQL; the others' orders are read too.
            moved = [one for one in page if counts[one] != by_sql.get(one, {})]
            problems += await self._miscounted(sale_id, moved)
        return sorted(set(problems))[:PROBLEMS_MAX]

    async def _miscounted(self, sale_id: str, buyer_ids: Sequence[str]) -> list[str]:
        """The problems of these buyers that persist in the last two reads."""
        before: dict[str, list[str]] = {}
        problems: dict[str, list[str]] = {}
        for _ in range(READS_MAX):
            before = problems
            states = await self._inspection.states(sale_id, buyer_ids)
            problems = {
                one: wrong for one, state in states.items() if (wrong := _counts(one, state))
            }
            if not problems:
                return []
            buyer_ids = list(problems)
            await asyncio.sleep(READ_PAUSE_SECONDS)
        return [
            sentence
            for buyer_id, sentences in problems.items()
            if before.get(buyer_id) == sentences
            for sentence in sentences
        ]

    async def _sets(self, sale_id: str) -> list[str]:
        problems: list[str] = []
        async for order_ids in self._inspection.members(sale_id):
            problems += await self._misplaced(sale_id, order_ids)
            if len(problems) >= PROBLEMS_MAX:
                return problems[:PROBLEMS_MAX]
        after = ""
        while rows := await self._sql.orders.scan(
            sale_id, statuses=LIVE, after=after, limit=PAGE_ORDERS
        ):
            problems += await self._misplaced(sale_id, [row.order_id for row in rows])
            after = rows[-1].order_id
            if len(problems) >= PROBLEMS_MAX:
                break
        return sorted(set(problems))[:PROBLEMS_MAX]

    async def _misplaced(self, sale_id: str, order_ids: Sequence[str]) -> list[str]:
        before: dict[str, OrderState] = {}
        for attempt in range(READS_MAX):
            states = await self._inspection.orders(sale_id, order_ids)
            wrong = {order_id: state for order_id, state in states.items() if _is_wrong(state)}
            if attempt and before != wrong:
                wrong = {key: state for key, state in wrong.items() if before.get(key) == state}
            if not wrong:
                return []
            before, order_ids = wrong, list(wrong)
            await asyncio.sleep(READ_PAUSE_SECONDS)
        return [_placement_problem(order_id, state) for order_id, state in before.items()]


def _order_state(order: Reservation | None) -> str:
    return f"it is {order.status.value} in Redis" if order else "it is missing in Redis"


def _counts(buyer_id: str, state: BuyerState) -> list[str]:
    """The mismatches between the limit's counts of a buyer and the sum of the buyer's orders."""
    expected: dict[str, int] = {}
    last: dict[str, tuple[int, str]] = {}
    for order in state.orders:
        if order.status in PAID:
            expected[PAID_ORDERS] = expected.get(PAID_ORDERS, 0) + 1
            last[PAID_ORDERS] = max(last.get(PAID_ORDERS, (0, "")), (order.seq, order.order_id))
        for line in order.lines:
            if order.status in HOLDING or order.status is Status.CONFIRMED:
                expected[line.sku] = expected.get(line.sku, 0) + line.quantity
            last[line.sku] = max(last.get(line.sku, (0, "")), (order.seq, order.order_id))
    return [
        f"{sku}: buyer {buyer_id} has a limit count of {state.counted.get(sku, 0)}, "
        f"{expected.get(sku, 0)} by their orders; the last order is {last[sku][1]} (event "
        f"{last[sku][0]})"
        if sku in last
        else f"{sku}: buyer {buyer_id} has a limit count of {state.counted[sku]} and no order"
        for sku in sorted(state.counted.keys() | expected.keys())
        if state.counted.get(sku, 0) != expected.get(sku, 0)
    ]


def _is_wrong(state: OrderState) -> bool:
    return not state.status or state.sets != _expected(state)


def _expected(state: OrderState) -> frozenset[str]:
    name = SET_OF.get(Status(state.status))
    return frozenset({name} if name else ())


def _placement_problem(order_id: str, state: OrderState) -> str:
    if not state.status:
        return f"order {order_id} is missing in Redis, but live in SQL or in one of the sale's sets"
    have = ", ".join(sorted(state.sets)) or "none of the sets"
    want = ", ".join(sorted(_expected(state))) or "none of the sets"
    subject = f"order {order_id} (event {state.seq}) is {state.status}"
    return f"{subject} and in {have}, expected in {want}"
