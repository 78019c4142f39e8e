"""Rebuild: a sale that Redis lost, or has in an older state than SQL, is restored from SQL.

    new epoch in SQL        no flusher writes what it read under the old one
    fence off               Redis has the sale under an epoch known only to this rebuild
    save the survivors      events that Redis still has and SQL lacks, as far as they follow
    clear, restore          items, orders, deadlines, payments in progress, buyers
    begin the outbox        `rebuilt`, right behind the last event that SQL has
    compare with peers      a partition alone: borrow again, then lend again what its peers have
    claim                   payments with an intent and without an end in SQL; an order that SQL
                            lacks too is made again from its intent
    report                  the number of lost events, in the log, a metric and the event `rebuilt`
    hand over               the new epoch in Redis: the sale sells again

It may crash anywhere and be run again: until the last step the sale is `recovering`. It reaches
only the life of the server with which it began: a replica that is promoted meanwhile may lack a
part of it.

A worker runs it by itself (`automatic.py`), an operator by a command. The worker's stops where the
data contradict each other; the operator's then uses the state in SQL.
"""

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

import msgspec
import structlog

from reservation import failpoints
from reservation.adapters.redis.client import RedisClient, bound_to
from reservation.adapters.redis.errors import StoreUnavailable
from reservation.adapters.redis.fences import REPAIRING_EPOCH, RESTORING_EPOCH, flushed_epoch
from reservation.adapters.redis.keys import Keys, is_lane
from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.sale_writer import RedisSaleHead, SaleWriter
from reservation.adapters.sql.payment_intents import UnmetIntent
from reservation.adapters.sql.rebuilds import RebuildRow
from reservation.adapters.sql.sales import EPOCH_BYTES, ItemRow, SaleHead
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import (
    sale_fields,
)
from reservation.application.payments.orphaned import OrphanedPayments
from reservation.application.readiness.data_loss import DataLossDetector
from reservation.application.recovery.beats import beating
from reservation.application.recovery.peers import PartitionPeers
from reservation.application.recovery.reclaim import Reclaim
from reservation.application.recovery.sale_copy import RebuildPlan, SaleCopy
from reservation.application.recovery.survivors import Survivors, Uncertain
from reservation.application.recovery.tombstones import RestoredTombstones
from reservation.domain.clock import Clock
from reservation.domain.errors import (
    SaleNotFound,
    SaleRecovering,
    Unavailable,
)
from reservation.domain.sale import Item
from reservation.domain.sale_settings import SaleDefinition, change_of
from reservation.telemetry.metrics import LOST_EVENTS, REBUILDS

__all__ = ["NotLost", "Rebuild", "RebuildReport"]

log = structlog.get_logger(__name__)

#: Orders named in one log line.
ORDERS_NAMED_MAX: Final = 50
#: Restarts while a flusher still writes the batch that it read before the loss.
ROUNDS_MAX: Final = 5


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
    #: Acknowledged events that neither SQL nor Redis has.
    lost_events: int = 0
    #: Orders whose payment was requested under a claim that SQL never got.
    claimed: tuple[str, ...] = ()
    #: Payments without an order that were refunded at the PG, by order.
    given_back: tuple[str, ...] = ()
    #: Payments whose outcome at the PG is still unknown: run the rebuild again.
    undecided: tuple[str, ...] = ()


class Rebuild:
    """Restores sales."""

    def __init__(
        self,
        connections: RedisClient,
        restorer: SaleWriter,
        keys: Keys,
        outbox: RedisOutbox,
        sql: SqlStore,
        data_loss: DataLossDetector,
        peers: PartitionPeers,
        reclaim: Reclaim,
        orphans: OrphanedPayments,
        tombstones: RestoredTombstones,
        *,
        clock: Clock,
    ) -> None:
        self._connections = connections
        self._restorer = restorer
        self._keys = keys
        self._sql = sql
        self._data_loss = data_loss
        self._peers = peers
        self._reclaim = reclaim
        self._orphans = orphans
        self._clock = clock
        self._survivors = Survivors(restorer, outbox, sql)
        self._copy = SaleCopy(restorer, keys, sql, tombstones, clock=clock)

    async def run(
        self,
        sale_id: str,
        *,
        operator: str,
        force: bool = False,
        certain: bool = False,
        gives_back: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> RebuildReport:
        """Restore one sale.

        Args:
            sale_id: the sale.
            operator: who requested it; recorded.
            force: rebuild even without a loss. Events are discarded from the first that does not
                follow in SQL, as in any rebuild.
            certain: stop where Redis and SQL contradict each other.
            gives_back: wait for the PG, and refund the payments without an order. The orphan loop
                does so otherwise.
            on_progress: called with the number of restored orders and the total.

        Raises:
            SaleNotFound: SQL does not have it.
            NotLost: Redis is ahead of SQL, so nothing is lost.
            SaleRecovering: another rebuild of this sale has begun.
            Uncertain: they contradict each other, and `certain` is set; or a partition lacks units
                that its peers have received of it. The sale stays closed.
            StoreUnavailable: a server does not answer; or, with `certain`, another process may
                still write to another server.
            Unavailable: SQL was restored from a backup and not compared with the gateway yet; or,
                with `certain`, its sales are not opened yet. The copies of orders in Redis are
                needed for a comparison, and an operator may repeat it.
        """
        await self._refuse_while_restored(certain=certain)
        lives = await self._connections.lives()
        with bound_to(lives.values()):
            head = (await self._sql.sales.heads([sale_id])).get(sale_id)
            if head is None:
                row = await self._sql.sales.get(sale_id)
                if row is not None and row.retired_at_ms is not None:
                    raise NotLost(f"{sale_id} is archived: only SQL has it")
                raise SaleNotFound
            why, found = await self._data_loss.gap_of(sale_id, head)
            if why is None and not force:
                return await self._not_rebuilt(sale_id, head, found, gives_back=gives_back)
            older = await self._older_epoch(sale_id, head)
            if certain:
                await self._refuse_two_servers(sale_id, lives)
                await self._refuse_contradictions(sale_id, head, found, older)
            rebuild = await self._begin(sale_id, head, found, why or "forced")
            async with beating(self._sql.rebuilds, rebuild):
                report, unplaced = await self._run(
                    rebuild,
                    operator=operator,
                    certain=certain,
                    older=older,
                    on_progress=on_progress or _ignore_progress,
                )
        if not gives_back:
            return report
        given_back, undecided = await self._orphans.resolve_all(unplaced)
        return msgspec.structs.replace(report, given_back=given_back, undecided=undecided)

    async def repair_fence(self, sale_id: str) -> str:
        """The epoch by which a repair fences off the sale; empty if none does.

        Raises:
            StoreUnavailable, StoreUncertain: the server does not answer.
        """
        epoch = await self._restorer.epoch(sale_id)
        return epoch if epoch.startswith(REPAIRING_EPOCH) else ""

    async def end_handed_over(self, row: RebuildRow) -> None:
        """Record the end of a rebuild whose process died right after its last step.

        Otherwise the rebuild of a later loss would continue this one.

        Raises:
            StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError: a server does not answer.
        """
        lives = await self._connections.lives()
        with bound_to(lives.values()):
            head = (await self._sql.sales.heads([row.sale_id])).get(row.sale_id)
            if head is not None:
                if head.epoch != row.epoch:
                    return  # Another rebuild has begun.
                why, found = await self._data_loss.gap_of(row.sale_id, head)
                if why is not None or found is None:
                    return
            # A sale without a head was retired, and a sale with a loss is never retired.
        await self._sql.rebuilds.end(row.sale_id, row.epoch, self._clock.now_ms())
        log.info("rebuild_end_recorded", sale_id=row.sale_id)

    async def _refuse_while_restored(self, *, certain: bool) -> None:
        restore = await self._sql.restores.pending()
        if restore is None:
            return
        if restore.compared_at_ms is None:
            raise Unavailable(
                "The database was restored from a backup: `reservation restore compare` first."
            )
        if certain:
            raise Unavailable("The database was restored from a backup: an operator rebuilds.")

    async def _not_rebuilt(
        self, sale_id: str, head: SaleHead, found: RedisSaleHead | None, *, gives_back: bool
    ) -> RebuildReport:
        # Even if Redis is ahead: a payment that a rebuild could not place needs a retry.
        given_back, undecided = await self._orphans.of(sale_id) if gives_back else ((), ())
        ahead = found.seq - head.seq if found else 0
        if ahead > 0 and not given_back and not undecided:
            why = f"Redis is ahead of SQL by {ahead} events and has lost no data"
            raise NotLost(f"{sale_id}: {why}; the flusher writes them to SQL")
        return RebuildReport(
            sale_id=sale_id, rebuilt=False, given_back=given_back, undecided=undecided
        )

    async def _refuse_two_servers(self, sale_id: str, lives: Mapping[str, str]) -> None:
        """Stop while another process may write the sale to another server.

        A worker that is cut off with a former master would take the sale from the others.
        """
        node = self._connections.node_of(sale_id)
        if node is None:
            raise StoreUnavailable("the sale's slot has no master")
        life = lives.get(node.identity)
        if life is None or await self._data_loss.writing_elsewhere(life, node.identity):
            raise StoreUnavailable("another process uses another server")

    async def _older_epoch(self, sale_id: str, head: SaleHead) -> str | None:
        """The epoch that ended when the sale's present one began, if a rebuild began it."""
        last = await self._sql.rebuilds.last(sale_id)
        return last.from_epoch if last is not None and last.epoch == head.epoch else None

    async def _refuse_contradictions(
        self, sale_id: str, head: SaleHead, found: RedisSaleHead | None, older: str | None
    ) -> None:
        """Stop before the first write where no later attempt could be right.

        An epoch that SQL does not have may be a later one, if SQL went back in time: its events are
        then the only ones. A former master or an old file has no event that SQL lacks, or has the
        epoch that the last rebuild ended.
        """
        epoch = flushed_epoch(found.epoch) if found is not None else ""
        if found is None or epoch == older or epoch.startswith(RESTORING_EPOCH):
            pass
        elif epoch != head.epoch:
            if not await self._survivors.follow(sale_id, found):
                raise Uncertain(f"SQL has neither the epoch in Redis nor its event {found.seq}")
        elif head.seq:
            there = found.chain if found.seq == head.seq else found.chain_at(head.seq)
            if there not in (None, head.chain):
                raise Uncertain(f"event {head.seq} in Redis differs from SQL")
        counters = await self._sql.sales.counters(sale_id)
        for sku, item in (counters.skus if counters else {}).items():
            if item.total != item.available + item.held + item.sold or item.available < 0:
                raise Uncertain(f"{sku}: the orders in SQL do not add up to its total")

    async def _begin(
        self, sale_id: str, head: SaleHead, found: RedisSaleHead | None, why: str
    ) -> RebuildRow:
        marks = (await self._sql.events.list_unproven_marks()).get(sale_id, ())
        seqs = [mark.seq for mark in marks if mark.epoch == head.epoch]
        wanted = RebuildRow(
            sale_id=sale_id,
            epoch=secrets.token_hex(EPOCH_BYTES),
            from_epoch=head.epoch,
            reason=why,
            beat=0,
            acknowledged_seq=max(seqs, default=0),
            saved_seq=None,
            began_at_ms=self._clock.now_ms(),
            ended_at_ms=None,
        )
        # If the server has SQL's epoch, that rebuild handed over and died right after.
        continues = found is None or found.epoch != head.epoch
        return await self._sql.rebuilds.begin(wanted, instead_of=head.epoch, continues=continues)

    async def _run(
        self,
        rebuild: RebuildRow,
        *,
        operator: str,
        certain: bool,
        older: str | None,
        on_progress: Callable[[int, int], None],
    ) -> tuple[RebuildReport, list[UnmetIntent]]:
        sale_id = rebuild.sale_id
        failpoints.reach("rebuild:after_epoch", sale_id)
        existing = await self._close_in_redis(rebuild)
        failpoints.reach("rebuild:after_fence", sale_id)
        await self._survivors.save(rebuild, existing, certain=certain, superseded=older)
        if rebuild.saved_seq is None:
            # Later events are this rebuild's own.
            saved_seq, _ = await self._sql.events.cursor(sale_id)
            await self._sql.rebuilds.note_saved(sale_id, rebuild.epoch, saved_seq)
            rebuild = msgspec.structs.replace(rebuild, saved_seq=saved_seq)
        failpoints.reach("rebuild:after_survivors", sale_id)
        await self._survivors.discard_unknown(rebuild)
        plan, restored = await self._restore_all(rebuild, operator, on_progress)
        failpoints.reach("rebuild:after_outbox", sale_id)
        if is_lane(sale_id):
            await self._peers.compare(sale_id, plan.rebuild_epoch)
            failpoints.reach("rebuild:after_peers", sale_id)
        claimed, unplaced = await self._reclaim.reclaim(sale_id, plan.epoch)
        await self._sql.refunds.reopen(sale_id)
        failpoints.reach("rebuild:after_claims", sale_id)
        # Before the sale reopens: a crash in between reports the loss twice, not never.
        self._report_loss(plan, unplaced)
        await self._restorer.hand_over(sale_id, epoch=plan.rebuild_epoch, to_epoch=plan.epoch)
        failpoints.reach("rebuild:after_hand_over", sale_id)
        await self._sql.rebuilds.end(sale_id, plan.epoch, self._clock.now_ms())
        REBUILDS.inc()
        log.warning("sale_rebuilt", sale_id=sale_id, seq=plan.head.seq, orders=restored)
        report = RebuildReport(
            sale_id=sale_id,
            rebuilt=True,
            why=plan.reason,
            epoch=plan.epoch,
            seq=plan.head.seq,
            orders=restored,
            lost_events=plan.lost_events,
            claimed=tuple(claimed),
        )
        return report, unplaced

    def _report_loss(self, plan: RebuildPlan, unplaced: list[UnmetIntent]) -> None:
        """Report the loss: acknowledged events, and the orders known by a payment."""
        LOST_EVENTS.inc(plan.lost_events)
        log.warning(
            "sale_lost_events",
            sale_id=plan.sale_id,
            events=plan.lost_events,
            after=plan.head.seq,
            reason=plan.reason,
            orders=[intent.order_id for intent in unplaced[:ORDERS_NAMED_MAX]],
        )

    async def _close_in_redis(self, rebuild: RebuildRow) -> str:
        """Fence off the surviving data, which then stays as it is; return its epoch.

        Without the sale's hash nothing needs a fence: every script refuses the sale.
        """
        sale_id = rebuild.sale_id
        for _ in range(ROUNDS_MAX):
            existing = await self._restorer.epoch(sale_id)
            if not existing:
                return existing
            head = (await self._sql.sales.heads([sale_id])).get(sale_id)
            if head is None or head.epoch != rebuild.epoch:
                break
            with suppress(SaleRecovering):
                await self._restorer.fence_off(
                    sale_id, {}, epoch=RESTORING_EPOCH + rebuild.epoch, instead_of=existing
                )
                return existing
        raise SaleRecovering(retryAfter=0)

    async def _restore_all(
        self, rebuild: RebuildRow, operator: str, on_progress: Callable[[int, int], None]
    ) -> tuple[RebuildPlan, int]:
        """Restore everything up to the outbox; again if SQL advanced meanwhile."""
        sale_id = rebuild.sale_id
        for _ in range(ROUNDS_MAX):
            plan, existing = await self._fence_off(rebuild)
            if existing or await self._restorer.has_keys(sale_id):
                await self._copy.clear(plan)
            failpoints.reach("rebuild:after_clear", sale_id)
            await self._copy.restore_items(plan)
            restored = await self._copy.restore_orders(plan, on_progress)
            await self._copy.restore_buyers(plan)
            failpoints.reach("rebuild:after_orders", sale_id)
            head = (await self._sql.sales.heads([sale_id]))[sale_id]
            if (head.seq, head.chain) == (plan.head.seq, plan.head.chain):
                await self._copy.begin_outbox(plan, operator)
                return plan, restored
        raise NotLost(f"{sale_id}: events are still being flushed to SQL; is another Redis in use?")

    async def _fence_off(self, rebuild: RebuildRow) -> tuple[RebuildPlan, str]:
        """Plan the restore and write the sale's settings, under the epoch of this rebuild.

        Returns:
            The plan, and the epoch under which Redis had the sale; empty if it had none.

        Raises:
            SaleRecovering: SQL has the epoch of another rebuild by now: that one continues.
        """
        sale_id = rebuild.sale_id
        for _ in range(ROUNDS_MAX):
            # Read before SQL: a rebuild that begins in between is seen by one of the two.
            existing = await self._restorer.epoch(sale_id)
            plan = await self._plan(rebuild)
            if plan.head.epoch != rebuild.epoch:
                break
            with suppress(SaleRecovering):
                await self._restorer.fence_off(
                    sale_id, _sale_fields(plan), epoch=plan.rebuild_epoch, instead_of=existing
                )
                return plan, existing
        raise SaleRecovering(retryAfter=0)

    async def _plan(self, rebuild: RebuildRow) -> RebuildPlan:
        sale_id = rebuild.sale_id
        head = (await self._sql.sales.heads([sale_id]))[sale_id]
        row = await self._sql.sales.get(sale_id)
        if row is None:
            raise SaleNotFound
        if row.settings is None:
            change, operator = msgspec.json.decode(row.document, type=SaleDefinition), "rebuild"
            items = {item.sku: _new_item(item) for item in change.items}
        else:
            change, operator = change_of(row.settings)
            items = await self._sql.sales.list_items(sale_id)
        restore = await self._sql.restores.last()
        return RebuildPlan(
            sale_id=sale_id,
            head=head,
            row=row,
            change=change,
            operator=operator,
            epoch=rebuild.epoch,
            items=items,
            reason=rebuild.reason,
            holds_due_before_ms=restore.restored_at_ms if restore is not None else 0,
            lost_events=max(0, rebuild.acknowledged_seq - (rebuild.saved_seq or 0)),
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


def _sale_fields(plan: RebuildPlan) -> dict[str, str]:
    fields = sale_fields(plan.row, plan.change, plan.operator, plan.items)
    if is_lane(plan.sale_id):
        # Counted anew: readings of two epochs are never compared.
        fields["refills"] = "0"
    return fields | {"seq": str(plan.head.seq), "chain": plan.head.chain}
