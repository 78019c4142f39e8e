"""Tombstone audit: each bucket of tombstones against the orders in SQL.

A bucket is read at one instant, and its orders in SQL after that. An order may be restored and
change in between, so a difference is read again.
"""

import asyncio
from typing import Final

from reservation.adapters.redis.keys import ORDER_FIELD_CHARS, buyer_field, order_field
from reservation.adapters.redis.tombstones import TombstoneStore
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import tombstone_of

__all__ = ["TombstoneAudit"]

#: Problems that are reported; the first ones suffice to find the cause.
PROBLEMS_MAX: Final = 20
#: Reads of a difference, and the pause between them: far longer than a script.
READS_MAX: Final = 3
READ_PAUSE_SECONDS: Final = 0.05


class TombstoneAudit:
    """Audits the tombstones of a sale.

    The record audit finds an order that has neither its hash nor a tombstone.
    """

    def __init__(self, store: TombstoneStore, sql: SqlStore) -> None:
        self._store = store
        self._sql = sql

    async def compare(self, sale_id: str) -> tuple[str, ...]:
        """The differences, each in one sentence."""
        buckets = await self._store.buckets(sale_id)
        if not buckets:
            return ()
        problems: list[str] = []
        if not await self._store.seqs([sale_id]):
            problems.append("the sale has tombstones, but its hash has no tombstone_seq")
        for name in buckets:
            problems += await self._persisting(sale_id, name)
            if len(problems) >= PROBLEMS_MAX:
                break
        return tuple(problems[:PROBLEMS_MAX])

    async def _persisting(self, sale_id: str, name: str) -> list[str]:
        problems = await self._differences(sale_id, name)
        for _ in range(READS_MAX - 1):
            if not problems:
                break
            await asyncio.sleep(READ_PAUSE_SECONDS)
            again = set(await self._differences(sale_id, name))
            problems = [problem for problem in problems if problem in again]
        return problems

    async def _differences(self, sale_id: str, name: str) -> list[str]:
        fields = await self._store.bucket(name)
        order_ids = {
            f"{sale_id}-{field}": text
            for field, text in fields.items()
            if len(field) == ORDER_FIELD_CHARS
        }
        rows = {row.order_id: row for row in await self._sql.orders.get_many(order_ids)}
        counts = {field: text for field, text in fields.items() if len(field) != ORDER_FIELD_CHARS}
        expected: dict[str, int] = {}
        problems: list[str] = []
        for order_id, text in order_ids.items():
            row = rows.get(order_id)
            if row is None or not self._store.is_bucket_of(sale_id, name, row.buyer_id):
                problems.append(f"{name} has a tombstone of {order_field(order_id)}, SQL has none")
                continue
            count = expected.get(buyer_field(row.buyer_id), 0)
            expected[buyer_field(row.buyer_id)] = count + 1
            tombstone = tombstone_of(row)
            if tombstone is None or tombstone.text != text:
                problems.append(
                    f"order {order_id} (event {row.seq}) is {row.status} in SQL, its tombstone is "
                    f"{text!r}"
                )
        problems += [
            f"{name} counts {counts.get(field, 'no')} tombstones of the buyer {field}, "
            f"expected {expected.get(field, 0)}"
            for field in sorted(counts.keys() | expected.keys())
            if counts.get(field) != str(expected.get(field, 0))
        ]
        return problems
