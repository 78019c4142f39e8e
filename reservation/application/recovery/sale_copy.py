"""Copies a sale from SQL to Redis, under the epoch of a rebuild: items, orders and buyers."""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from reservation.adapters.redis.fences import RESTORING_EPOCH
from reservation.adapters.redis.keys import Keys, is_lane
from reservation.adapters.redis.sale_writer import SaleWriter, Writes
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.sales import ItemRow, SaleHead, SaleRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import (
    ENDED_KEPT_MS,
    has_payment_history,
    item_fields,
    order_fields,
    restock_fields,
    transfer_fields,
)
from reservation.application.recovery.tombstones import HashFields, RestoredTombstones
from reservation.domain.clock import Clock
from reservation.domain.events import EventName
from reservation.domain.sale_settings import SaleDefinition, event_data_of
from reservation.domain.states import ENDED, HOLDING, LIVE, PAID, Status

__all__ = ["RebuildPlan", "SaleCopy"]

#: Orders read from SQL at once: about 3 MB.
PAGE_ORDERS: Final = 2_000


class RebuildPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One sale as SQL has it, and the epochs of this rebuild."""

    sale_id: str
    head: SaleHead
    row: SaleRow
    change: SaleDefinition
    operator: str
    epoch: str
    items: dict[str, ItemRow]
    reason: str
    #: Holds from before this instant are due at once: SQL was restored then from a backup, after
    #: which they may have ended. 0 if SQL was never restored.
    holds_due_before_ms: int
    lost_events: int

    @property
    def rebuild_epoch(self) -> str:
        return RESTORING_EPOCH + self.epoch


class SaleCopy:
    """Writes a sale's records to Redis; each step may be repeated."""

    def __init__(
        self,
        restorer: SaleWriter,
        keys: Keys,
        sql: SqlStore,
        tombstones: RestoredTombstones,
        *,
        clock: Clock,
    ) -> None:
        self._restorer = restorer
        self._keys = keys
        self._sql = sql
        self._tombstones = tombstones
        self._clock = clock

    async def clear(self, plan: RebuildPlan) -> None:
        """Remove the sale's keys, except its hash."""
        await self._restorer.clear(
            plan.sale_id,
            epoch=plan.rebuild_epoch,
            orders=self._sql.orders.pages_with_buyers(plan.sale_id),
            skus=plan.items,
        )

    async def restore_items(self, plan: RebuildPlan) -> None:
        """Restore the items, the restocks that were made, and the transfers of a partition."""
        names = self._keys.of(plan.sale_id)
        writes = Writes()
        for sku, item in plan.items.items():
            counters = {
                name: getattr(item, name) for name in ("total", "available", "held", "sold")
            }
            writes.hset(names.stock(sku), counters | item_fields(item))
        done = restock_fields(await self._sql.events.list_restocks(plan.sale_id))
        for operation, digest in done.items():
            writes.hset(names.operations, {operation: digest})
            writes = await self._flush_when_full(plan, writes)
        if is_lane(plan.sale_id):
            lots = transfer_fields(await self._sql.transfers.last_of(plan.sale_id))
            for field, text in lots.items():
                writes.hset(names.transfers, {field: text})
                writes = await self._flush_when_full(plan, writes)
        await self._restorer.write(plan.sale_id, writes, epoch=plan.rebuild_epoch)

    async def restore_orders(
        self, plan: RebuildPlan, on_progress: Callable[[int, int], None]
    ) -> int:
        """Restore the orders; return their number."""
        statuses = set(LIVE) | {Status.CONFIRMED}
        if self._clock.now_ms() < plan.change.closes_at_ms + ENDED_KEPT_MS:
            statuses |= ENDED
        total = await self._sql.orders.count(plan.sale_id, statuses)
        ended = await self._tombstones.begin(statuses)
        done, after = 0, ""
        on_progress(done, total)
        while rows := await self._sql.orders.scan(
            plan.sale_id, statuses=statuses, after=after, limit=PAGE_ORDERS
        ):
            paid = [row.order_id for row in rows if has_payment_history(row)]
            stories = await self._sql.events.list_payment_events(paid)
            writes = Writes()
            tombstones, others = self._tombstones.split(ended, rows)
            await self._write_hashes(plan, tombstones)
            for row in others:
                self._add_order(plan, writes, row, order_fields(row, stories.get(row.order_id, ())))
                writes = await self._flush_when_full(plan, writes)
            await self._restorer.write(plan.sale_id, writes, epoch=plan.rebuild_epoch)
            done, after = done + len(rows), rows[-1].order_id
            on_progress(done, total)
        while counts := await self._tombstones.counts(plan.sale_id, ended):
            await self._write_hashes(plan, counts)
        return done

    async def _write_hashes(self, plan: RebuildPlan, hashes: Sequence[HashFields]) -> None:
        writes = Writes()
        for key, fields in hashes:
            writes.hset(key, fields)
            writes = await self._flush_when_full(plan, writes)
        await self._restorer.write(plan.sale_id, writes, epoch=plan.rebuild_epoch)

    def _add_order(
        self, plan: RebuildPlan, writes: Writes, row: OrderRow, fields: dict[str, str]
    ) -> None:
        names = self._keys.of(row.sale_id)
        writes.hset(names.order(row.order_id), fields)
        writes.zadd(names.buyer_orders(row.buyer_id), row.order_id, row.created_at_ms)
        match Status(row.status):
            case Status.HELD | Status.PREPARED:
                is_due = row.created_at_ms < plan.holds_due_before_ms
                due_at_ms = row.created_at_ms if is_due else row.expires_at_ms
                writes.zadd(names.deadlines, row.order_id, due_at_ms)
            case Status.CONFIRMING:
                # The lease holder writes under the old epoch and is refused: the settler queries
                # the PG at once.
                writes.zadd(names.confirming, row.order_id, row.updated_at_ms)
            case Status.AWAITING_DEPOSIT:
                writes.zadd(names.deposits, row.order_id, row.due_at_ms or row.expires_at_ms)
            case _:
                pass

    async def restore_buyers(self, plan: RebuildPlan) -> None:
        """Restore the units that count against each buyer's limit."""
        names = self._keys.of(plan.sale_id)
        writes = Writes()
        after = ""
        # A buyer on several pages is written with each, with the same counts.
        while rows := await self._sql.orders.scan(
            plan.sale_id, statuses={*HOLDING, *PAID}, after=after, limit=PAGE_ORDERS
        ):
            after = rows[-1].order_id
            buyer_ids = list(dict.fromkeys(row.buyer_id for row in rows))
            all_counts = await self._sql.orders.count_by_buyer(plan.sale_id, buyer_ids)
            for buyer_id, counts in all_counts.items():
                writes.hset(names.buyer(buyer_id), counts)
                writes = await self._flush_when_full(plan, writes)
        await self._restorer.write(plan.sale_id, writes, epoch=plan.rebuild_epoch)

    async def _flush_when_full(self, plan: RebuildPlan, writes: Writes) -> Writes:
        if not writes.full:
            return writes
        await self._restorer.write(plan.sale_id, writes, epoch=plan.rebuild_epoch)
        return Writes()

    async def begin_outbox(self, plan: RebuildPlan, operator: str) -> None:
        """Append the event of the rebuild right behind the last event in SQL."""
        if plan.row.settings is None:
            event = EventName.SALE_PUT
            data = event_data_of(plan.change, version=1, epoch=plan.epoch, operator=plan.operator)
        else:
            event = EventName.REBUILT
            data = msgspec.json.encode(
                {"epoch": plan.epoch, "operator": operator, "lostEvents": plan.lost_events}
            ).decode()
        await self._restorer.begin_outbox(
            plan.sale_id,
            epoch=plan.rebuild_epoch,
            after_seq=plan.head.seq,
            event=event.value,
            data=data,
        )
