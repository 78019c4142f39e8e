"""Buyers' limits against orders, the sorted sets against statuses, CONFIRMED against the PG.

All of it moves while it is read. So what does not agree is read again, and is a problem only if
it stays so although nothing about it changed.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from reservation.domain.states import HOLDING, LIVE, Status
from reservation.persistence.ledger import Ledger
from reservation.redis.inspection import Inspection, OrderState

__all__ = ["SET_OF", "OrderAudit"]

#: Problems of one kind that are told; the first ones say where to look.
PROBLEMS_MAX: Final = 20
#: Looks at what does not agree, and the pause between them: far longer than a script.
LOOKS: Final = 3
LOOK_SECONDS: Final = 0.05
#: Orders of SQL looked at together.
PAGE_ORDERS: Final = 1_000

#: The set that an order is in, by its status; none for the others.
SET_OF: Final = {
    Status.HELD: "deadlines",
    Status.PREPARED: "deadlines",
    Status.CONFIRMING: "confirming",
    Status.AWAITING_DEPOSIT: "deposits",
}


class OrderAudit:
    """Checks what the counters alone do not show."""

    def __init__(self, inspection: Inspection, ledger: Ledger) -> None:
        self._inspection = inspection
        self._ledger = ledger

    async def __call__(self, sale_id: str) -> tuple[str, ...]:
        """What is wrong, each in one sentence with the SKU, the order and its event."""
        buyers = await self._buyers(sale_id)
        sets = await self._sets(sale_id)
        payments = [
            f"order {row.order_id} (event {row.seq}) is CONFIRMED, and the PG's payment is "
            f"{row.payment or 'not in SQL'}"
            for row in await self._ledger.confirmed_unpaid(sale_id, PROBLEMS_MAX)
        ]
        return (*buyers, *sets, *payments)

    async def _buyers(self, sale_id: str) -> list[str]:
        problems: list[str] = []
        by_sql = await self._ledger.buyer_counts(sale_id)
        unseen = set(by_sql)
        async for buyer_ids in self._inspection.buyers(sale_id):
            counts = await self._inspection.counts(sale_id, buyer_ids)
            for buyer_id in buyer_ids:
                # Most have not moved since SQL was read; the others are looked at one by one.
                if counts[buyer_id] != by_sql.get(buyer_id, {}):
                    problems += await self._buyer(sale_id, buyer_id)
            unseen.difference_update(buyer_ids)
            if len(problems) >= PROBLEMS_MAX:
                break
        for buyer_id in sorted(unseen):
            problems += await self._buyer(sale_id, buyer_id)
            if len(problems) >= PROBLEMS_MAX:
                break
        return sorted(set(problems))[:PROBLEMS_MAX]

    async def _buyer(self, sale_id: str, buyer_id: str) -> list[str]:
        told: list[str] = []
        before: list[str] = []
        for _ in range(LOOKS):
            before = told
            state = await self._inspection.buyer(sale_id, buyer_id)
            expected: dict[str, int] = {}
            last: dict[str, tuple[int, str]] = {}
            for order in state.orders:
                for line in order.lines:
                    if order.status in HOLDING or order.status is Status.CONFIRMED:
                        expected[line.sku] = expected.get(line.sku, 0) + line.quantity
                    last[line.sku] = max(last.get(line.sku, (0, "")), (order.seq, order.order_id))
            told = [
                f"{sku}: buyer {buyer_id} has {state.counted.get(sku, 0)} by the limit's count and "
                f"{expected.get(sku, 0)} by their orders; the last is {last[sku][1]} (event "
                f"{last[sku][0]})"
                if sku in last
                else f"{sku}: buyer {buyer_id} has {state.counted[sku]} by the limit's count and no"
                " order"
                for sku in sorted(state.counted.keys() | expected.keys())
                if state.counted.get(sku, 0) != expected.get(sku, 0)
            ]
            if not told:
                return []
            await asyncio.sleep(LOOK_SECONDS)
        return told if told == before else []

    async def _sets(self, sale_id: str) -> list[str]:
        problems: list[str] = []
        async for order_ids in self._inspection.members(sale_id):
            problems += await self._misplaced(sale_id, order_ids)
            if len(problems) >= PROBLEMS_MAX:
                return problems[:PROBLEMS_MAX]
        after = ""
        while rows := await self._ledger.live_orders(
            sale_id, statuses=LIVE, after=after, limit=PAGE_ORDERS
        ):
            problems += await self._misplaced(sale_id, [row.order_id for row in rows])
            after = rows[-1].order_id
            if len(problems) >= PROBLEMS_MAX:
                break
        return sorted(set(problems))[:PROBLEMS_MAX]

    async def _misplaced(self, sale_id: str, order_ids: Sequence[str]) -> list[str]:
        before: dict[str, OrderState] = {}
        for look in range(LOOKS):
            states = await self._inspection.orders(sale_id, order_ids)
            wrong = {order_id: state for order_id, state in states.items() if _is_wrong(state)}
            if look and before != wrong:
                wrong = {key: state for key, state in wrong.items() if before.get(key) == state}
            if not wrong:
                return []
            before, order_ids = wrong, list(wrong)
            await asyncio.sleep(LOOK_SECONDS)
        return [_sentence(order_id, state) for order_id, state in before.items()]


def _is_wrong(state: OrderState) -> bool:
    return not state.status or state.sets != _expected(state)


def _expected(state: OrderState) -> frozenset[str]:
    name = SET_OF.get(Status(state.status))
    return frozenset({name} if name else ())


def _sentence(order_id: str, state: OrderState) -> str:
    if not state.status:
        return f"order {order_id} is not in Redis, and SQL or one of the sale's sets has it as live"
    have = ", ".join(sorted(state.sets)) or "none of the sets"
    want = ", ".join(sorted(_expected(state))) or "none of the sets"
    what = f"order {order_id} (event {state.seq}) is {state.status}"
    return f"{what} and in {have}; it belongs in {want}"
