"""Tombstones in a rebuild: an order that ended long ago without a claim is restored as one.

Only the order's row decides, so that each page and the buyers' counts agree: no event comes during
a rebuild, but an intent may. An order with an intent is restored in full before it is claimed.
"""

from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from reservation.adapters.redis.keys import Keys, buyer_field, order_field
from reservation.adapters.redis.tombstones import TOMBSTONE_SEQ
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import tombstone_of
from reservation.domain.clock import Clock
from reservation.domain.levels import LEVEL_OF_TOMBSTONES
from reservation.domain.states import ENDED, Status

__all__ = ["EndedBefore", "HashFields", "RestoredTombstones"]

#: A hash in Redis, and the fields to set.
HashFields = tuple[str, dict[str, str]]

#: Buyers of one page: each page reads all orders of the sale, and fits in memory.
BUYERS_AT_ONCE: Final = 100_000


class EndedBefore(msgspec.Struct):
    """The tombstones of one restore."""

    #: Orders whose deadline passed by then have a tombstone; None if no order has one.
    before_ms: int | None
    #: The last buyer whose count was written.
    after_buyer: str = ""


class RestoredTombstones:
    """Writes the tombstones of a sale.

    Args:
        keys: the names in Redis.
        sql: the orders.
        clock: the time.
        keep_ms: time from an order's deadline to its tombstone.
    """

    def __init__(self, keys: Keys, sql: SqlStore, *, clock: Clock, keep_ms: int) -> None:
        self._keys = keys
        self._sql = sql
        self._clock = clock
        self._keep_ms = keep_ms

    async def begin(self, statuses: Collection[Status]) -> EndedBefore:
        """Fix the time up to which orders have a tombstone, for all pages of a restore.

        Args:
            statuses: of the orders to restore; without the ended ones there is no tombstone.
        """
        level = await self._sql.installation.level()
        if level < LEVEL_OF_TOMBSTONES or not ENDED.issubset(statuses):
            return EndedBefore(None)
        return EndedBefore(self._clock.now_ms() - self._keep_ms)

    def split(
        self, sale: EndedBefore, rows: Sequence[OrderRow]
    ) -> tuple[list[HashFields], list[OrderRow]]:
        """The tombstones of a page of orders, and the orders that have none."""
        before_ms = sale.before_ms
        if before_ms is None:
            return [], list(rows)
        tombstones: list[HashFields] = []
        others: list[OrderRow] = []
        for row in rows:
            tombstone = tombstone_of(row) if row.expires_at_ms <= before_ms else None
            if tombstone is None:
                others.append(row)
                continue
            bucket = self._keys.of(row.sale_id).ended(row.buyer_id)
            tombstones.append((bucket, {order_field(row.order_id): tombstone.text}))
        return tombstones, others

    async def counts(self, sale_id: str, sale: EndedBefore) -> list[HashFields]:
        """The counts of the next buyers; empty at the end."""
        if sale.before_ms is None:
            return []
        found = await self._sql.orders.count_never_claimed(
            sale_id, expired_by_ms=sale.before_ms, after=sale.after_buyer, limit=BUYERS_AT_ONCE
        )
        names = self._keys.of(sale_id)
        counts: list[HashFields] = []
        if found and not sale.after_buyer:
            # The worker begins again at the first event, and replaces the orders that stayed.
            counts.append((names.sale, {TOMBSTONE_SEQ: "0"}))
        for buyer_id, count in found.items():
            counts.append((names.ended(buyer_id), {buyer_field(buyer_id): str(count)}))
            sale.after_buyer = buyer_id
        return counts
