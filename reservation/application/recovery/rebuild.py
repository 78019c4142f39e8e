"""Rebuild: a sale that Redis lost, or has in an older state than SQL, is restored from SQL.

    new epoch in SQL        writes under the old one are refused from now on
    save the survivors      events that Redis still has and SQL lacks, as far as they follow
    fence off               Redis has the sale's settings, under an epoch known only to this rebuild
    clear, restore          items, orders, deadlines, payments in progress, buyers
    begin the outbox        `rebuilt`, right behind the last event that SQL has
    claim                   payments with an intent and without an end in SQL; an order that SQL
                            lacks too is made again from its intent
    hand over               the new epoch in Redis: the sale sells again

It may crash anywhere and be run again: until the last step the sale is `recovering`.
"""

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
import structlog

from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.sale_writer import SaleWriter, Writes
from reservation.adapters.sql.event_writer import ApplyKind
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.sales import EPOCH_BYTES, ItemRow, SaleHead, SaleRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import (
    ENDED_KEPT_MS,
    has_payment_history,
    item_fields,
    order_fields,
    restock_fields,
    sale_fields,
)
from reservation.application.payments.orphaned import OrphanedPayments
from reservation.application.readiness.data_loss import DataLossDetector
from reservation.application.recovery.reclaim import Reclaim
from reservation.domain.clock import Clock
from reservation.domain.errors import (
    SaleNotFound,
    SaleRecovering,
)
from reservation.domain.events import EventName
from reservation.domain.sale import Item
from reservation.domain.sale_settings import SaleDefinition, change_of, event_data_of
from reservation.domain.states import ENDED, HOLDING, LIVE, PAID, Status

__all__ = ["NotLost", "Rebuild", "RebuildReport"]

log = structlog.get_logger(__name__)

#: Orders read from SQL at once: about 3 MB.
PAGE_ORDERS: Final = 2_000
#: Restarts while a flusher still writes the batch that it read before the loss.
ROUNDS_MAX: Final = 5
#: Events of one batch saved from Redis: as many as the flusher takes.
SURVIVORS_AT_ONCE: Final = 1_000
#: Prefix that no epoch in SQL has.
_REBUILD_EPOCH: Final = "restoring:"


class NotLost(Exception):
    """Redis is ahead of SQL, or the sale is archived: there is nothing to rebuild."""


class RebuildReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result of a rebuild."""

    sale_id: str
    #: False if Redis already had the sale as SQL has it.
    rebuilt: bool
    #: The loss.
    why: str = ""
    epoch: str = ""
    #: The last event that SQL had.
    seq: int = 0
    orders: int = 0
    #: Orders whose payment was requested under a claim that SQL never got.
    claimed: tuple[str, ...] = ()
    #: Payments without an order that were refunded at the PG, by order.
    given_back: tuple[str, ...] = ()
    #: Payments whose outcome at the PG is still unknown: run the rebuild again.
    undecided: tuple[str, ...] = ()


class _Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One sale as SQL has it, and the epochs of this rebuild."""

    sale_id: str
    head: SaleHead
    row: SaleRow
    change: SaleDefinition
    operator: str
    epoch: str
    items: dict[str, ItemRow]

    @property
    def rebuild_epoch(self) -> str:
        return _REBUILD_EPOCH + self.epoch


class Rebuild:
    """Restores sales."""

    def __init__(
        self,
        restorer: SaleWriter,
        keys: Keys,
        outbox: RedisOutbox,
        sql: SqlStore,
        data_loss: DataLossDetector,
        reclaim: Reclaim,
        orphans: OrphanedPayments,
        *,
        clock: Clock,
    ) -> None:
        self._restorer = restorer
        self._keys = keys
        self._outbox = outbox
        self._sql = sql
        self._data_loss = data_loss
        self._reclaim = reclaim
        self._orphans = orphans
        self._clock = clock

    async def run(
        self,
        sale_id: str,
        *,
        operator: str,
        force: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> RebuildReport:
        """Restore one sale.

        Args:
            sale_id: the sale.
            operator: who asks for it, for the record.
            force: rebuild even without a loss; events that SQL lacks are discarded.
            on_progress: called with the number of restored orders and the total.

        Raises:
            SaleNotFound: SQL does not know it.
            NotLost: Redis is ahead of SQL, which is no loss.
            SaleRecovering: another rebuild of this sale has begun.
        """
        head = (await self._sql.sales.heads()).get(sale_id)
        if head is None:
            if (row := await self._sql.sales.get(sale_id)) and row.retired_at_ms is not None:
                raise NotLost(f"{sale_id} is archived: only SQL has it")
            raise SaleNotFound
        why, found = await self._data_loss.gap_of(sale_id, head)
        if why is None and not force:
            # Even if Redis is ahead: a payment that a rebuild could not place needs a retry.
            given_back, undecided = await self._orphans.of(sale_id)
            ahead = found.seq - head.seq if found else 0
            if ahead > 0 and not given_back and not undecided:
                why = f"Redis is ahead of SQL by {ahead} events and has lost no data"
                raise NotLost(f"{sale_id}: {why}; the flusher writes them to SQL")
            return RebuildReport(
                sale_id=sale_id, rebuilt=False, given_back=given_back, undecided=undecided
            )
        epoch = secrets.token_hex(EPOCH_BYTES)
        await self._sql.sales.set_epoch(sale_id, epoch, instead_of=head.epoch)
        if not force and found is not None and found.epoch == head.epoch:
            await self._save_survivors(sale_id, head.seq)
        plan, restored = await self._restore_all(
            sale_id, epoch, operator, on_progress or _ignore_progress
        )
        claimed, unplaced = await self._reclaim.reclaim(sale_id, plan.rebuild_epoch)
        await self._sql.refunds.reopen(sale_id)
        await self._restorer.hand_over(sale_id, epoch=plan.rebuild_epoch, to_epoch=plan.epoch)
        log.warning("sale_rebuilt", sale_id=sale_id, seq=plan.head.seq, orders=restored)
        given_back, undecided = await self._orphans.resolve_all(unplaced)
        return RebuildReport(
            sale_id=sale_id,
            rebuilt=True,
            why=why or "forced",
            epoch=plan.epoch,
            seq=plan.head.seq,
            orders=restored,
            claimed=tuple(claimed),
            given_back=given_back,
            undecided=undecided,
        )

    async def _save_survivors(self, sale_id: str, after_seq: int) -> None:
        """Write to SQL the events that only Redis has: holds and payments that were not lost.

        Events that do not follow SQL's last event stay out, as with the flusher.
        """
        while events := await self._outbox.after(sale_id, after_seq, SURVIVORS_AT_ONCE):
            outcome = await self._sql.events.apply(sale_id, events)
            log.info(
                "surviving_events_saved", sale_id=sale_id, count=outcome.written, kind=outcome.kind
            )
            if outcome.kind is not ApplyKind.APPLIED:
                return
            after_seq = events[-1].seq

    async def _restore_all(
        self, sale_id: str, epoch: str, operator: str, on_progress: Callable[[int, int], None]
    ) -> tuple[_Plan, int]:
        """Restore everything up to the outbox; again if SQL advanced meanwhile."""
        for _ in range(ROUNDS_MAX):
            plan = await self._fence_off(sale_id, epoch)
            await self._restorer.clear(sale_id, epoch=plan.rebuild_epoch)
            await self._restore_items(plan)
            restored = await self._restore_orders(plan, on_progress)
            await self._restore_buyers(plan)
            head = (await self._sql.sales.heads())[sale_id]
            if (head.seq, head.chain) == (plan.head.seq, plan.head.chain):
                await self._begin_outbox(plan, operator)
                return plan, restored
        raise NotLost(f"{sale_id}: events are still being flushed to SQL; is another Redis in use?")

    async def _fence_off(self, sale_id: str, epoch: str) -> _Plan:
        """Fence the sale off and plan its restore: no other process can change it in Redis now.

        Raises:
            SaleRecovering: SQL has the epoch of another rebuild by now: that one continues.
        """
        for _ in range(ROUNDS_MAX):
            # Read before SQL: a rebuild that begins in between is seen by one of the two.
            existing = await self._restorer.epoch(sale_id)
            plan = await self._plan(sale_id, epoch)
            if plan.head.epoch != epoch:
                break
            with suppress(SaleRecovering):
                await self._restorer.fence_off(
                    sale_id, _sale_fields(plan), epoch=plan.rebuild_epoch, instead_of=existing
                )
                return plan
        raise SaleRecovering(retryAfter=0)

    async def _plan(self, sale_id: str, epoch: str) -> _Plan:
        head = (await self._sql.sales.heads())[sale_id]
        row = await self._sql.sales.get(sale_id)
        if row is None:
            raise SaleNotFound
        if row.settings is None:
            change, operator = msgspec.json.decode(row.document, type=SaleDefinition), "rebuild"
            items = {item.sku: _new_item(item) for item in change.items}
        else:
            change, operator = change_of(row.settings)
            items = await self._sql.sales.list_items(sale_id)
        return _Plan(
            sale_id=sale_id,
            head=head,
            row=row,
            change=change,
            operator=operator,
            epoch=epoch,
            items=items,
        )

    async def _restore_items(self, plan: _Plan) -> None:
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
        await self._restorer.write(plan.sale_id, writes, epoch=plan.rebuild_epoch)

    async def _restore_orders(self, plan: _Plan, on_progress: Callable[[int, int], None]) -> int:
        statuses = set(LIVE) | {Status.CONFIRMED}
        if self._clock.now_ms() < plan.change.closes_at_ms + ENDED_KEPT_MS:
            statuses |= ENDED
        total = await self._sql.orders.count(plan.sale_id, statuses)
        done, after = 0, ""
        on_progress(done, total)
        while rows := await self._sql.orders.scan(
            plan.sale_id, statuses=statuses, after=after, limit=PAGE_ORDERS
        ):
            paid = [row.order_id for row in rows if has_payment_history(row)]
            stories = await self._sql.events.list_payment_events(paid)
            writes = Writes()
            for row in rows:
                self._add_order(writes, row, order_fields(row, stories.get(row.order_id, ())))
                writes = await self._flush_when_full(plan, writes)
            await self._restorer.write(plan.sale_id, writes, epoch=plan.rebuild_epoch)
            done, after = done + len(rows), rows[-1].order_id
            on_progress(done, total)
        return done

    def _add_order(self, writes: Writes, row: OrderRow, fields: dict[str, str]) -> None:
        names = self._keys.of(row.sale_id)
        writes.hset(names.order(row.order_id), fields)
        writes.zadd(names.buyer_orders(row.buyer_id), row.order_id, row.created_at_ms)
        match Status(row.status):
            case Status.HELD | Status.PREPARED:
                writes.zadd(names.deadlines, row.order_id, row.expires_at_ms)
            case Status.CONFIRMING:
                # The lease holder writes under the old epoch and is refused: the settler asks the
                # PG at once.
                writes.zadd(names.confirming, row.order_id, row.updated_at_ms)
            case Status.AWAITING_DEPOSIT:
                writes.zadd(names.deposits, row.order_id, row.due_at_ms or row.expires_at_ms)
            case _:
                pass

    async def _restore_buyers(self, plan: _Plan) -> None:
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

    async def _flush_when_full(self, plan: _Plan, writes: Writes) -> Writes:
        if not writes.full:
            return writes
        await self._restorer.write(plan.sale_id, writes, epoch=plan.rebuild_epoch)
        return Writes()

    async def _begin_outbox(self, plan: _Plan, operator: str) -> None:
        if plan.row.settings is None:
            event = EventName.SALE_PUT
            data = event_data_of(plan.change, version=1, epoch=plan.epoch, operator=plan.operator)
        else:
            event = EventName.REBUILT
            data = msgspec.json.encode({"epoch": plan.epoch, "operator": operator}).decode()
        await self._restorer.begin_outbox(
            plan.sale_id,
            epoch=plan.rebuild_epoch,
            after_seq=plan.head.seq,
            event=event.value,
            data=data,
        )


def _ignore_progress(_done: int, _total: int) -> None:
    pass


def _new_item(item: Item) -> ItemRow:
    return ItemRow(
        sku=item.sku,
        name=item.name,
        price=item.price,
        limit_per_buyer=item.limit_per_buyer,
        total=item.total,
        available=item.total,
        held=0,
        sold=0,
    )


def _sale_fields(plan: _Plan) -> dict[str, str]:
    return sale_fields(plan.row, plan.change, plan.operator, plan.items) | {
        "seq": str(plan.head.seq),
        "chain": plan.head.chain,
    }
