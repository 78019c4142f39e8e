"""Survivors of a loss: SQL gets the events that only Redis has, as far as they follow SQL's."""

from typing import Final

import structlog

from reservation.adapters.redis.errors import UnexpectedReply
from reservation.adapters.redis.fences import RESTORING_EPOCH, flushed_epoch
from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.sale_writer import RedisSaleHead, SaleWriter
from reservation.adapters.sql.event_writer import ApplyKind, next_chain
from reservation.adapters.sql.rebuilds import RebuildRow
from reservation.adapters.sql.store import SqlStore
from reservation.domain.errors import BrokenInvariant, SaleRecovering

__all__ = ["Survivors", "Uncertain"]

log = structlog.get_logger(__name__)

#: Events of one batch saved from Redis: as many as the flusher takes.
SURVIVORS_AT_ONCE: Final = 1_000


class Uncertain(Exception):
    """The data contradict each other, so an operator must decide; the sale stays closed."""


class Survivors:
    """Saves what survived in Redis, and removes what cannot be saved."""

    def __init__(self, restorer: SaleWriter, outbox: RedisOutbox, sql: SqlStore) -> None:
        self._restorer = restorer
        self._outbox = outbox
        self._sql = sql

    async def follow(self, sale_id: str, found: RedisSaleHead) -> bool:
        """Whether SQL has Redis' last event, or the outbox has the one after SQL's last.

        Redis must have another epoch than SQL, so that no flusher writes meanwhile.
        """
        if await self._sql.events.has(sale_id, found.seq, found.chain):
            return True
        seq, chain = await self._sql.events.cursor(sale_id)
        events = await self._outbox.after(sale_id, seq, 1)
        return any(one.seq == seq + 1 and one.chain == next_chain(chain, one) for one in events)

    async def save(
        self, rebuild: RebuildRow, existing: str, *, certain: bool, superseded: str | None
    ) -> None:
        """Write to SQL the events that only Redis has: holds and payments that were not lost.

        Events that do not follow SQL's last event stay out, as with the flusher.

        Args:
            rebuild: this one.
            existing: the epoch under which Redis had them.
            certain: stop if an event does not follow, unless a later one took its place.
            superseded: an epoch that ended with an earlier rebuild, which saved its events.
        """
        sale_id = rebuild.sale_id
        strict = certain and _must_follow(rebuild, flushed_epoch(existing), superseded)
        after_seq, _ = await self._sql.events.cursor(sale_id)
        at_once = SURVIVORS_AT_ONCE
        while True:
            try:
                events = await self._outbox.after(sale_id, after_seq, at_once)
            except (BrokenInvariant, KeyError, ValueError, UnexpectedReply) as error:
                if at_once > 1:
                    # Those before the unreadable one follow.
                    at_once = 1
                    continue
                if strict:
                    raise Uncertain(f"the outbox is unreadable: {error}") from error
                log.warning("surviving_events_unreadable", sale_id=sale_id, reason=str(error))
                break
            if not events:
                break
            # Of a batch with a gap SQL takes nothing; the events before the gap follow.
            whole = [one for seq, one in enumerate(events, after_seq + 1) if one.seq == seq]
            events = whole or events
            outcome = await self._sql.events.apply(sale_id, events, epoch=rebuild.epoch)
            if outcome.kind is ApplyKind.OTHER_EPOCH:
                raise SaleRecovering(retryAfter=0)
            log.info(
                "surviving_events_saved",
                sale_id=sale_id,
                count=outcome.written,
                kind=outcome.kind.name,
            )
            if outcome.kind is not ApplyKind.APPLIED:
                if strict:
                    raise Uncertain(f"event {outcome.seq} in Redis: {outcome.reason}")
                break
            after_seq = events[-1].seq
        if strict:
            head = await self._restorer.read_head(sale_id, 0)
            if head and not await self._sql.events.has(sale_id, head.seq, head.chain):
                raise Uncertain(f"SQL lacks event {head.seq} in Redis, and so does the outbox")

    async def discard_unknown(self, rebuild: RebuildRow) -> None:
        """Remove the orders of events that SQL lacks; the others are removed by their ids in SQL.

        If SQL has the last event of Redis, it has every order of it. The sale's hash keeps that
        event until the restore, so an interrupted removal is repeated.
        """
        sale_id = rebuild.sale_id
        head = await self._restorer.read_head(sale_id, 0)
        if head is None:
            known = not await self._restorer.has_keys(sale_id)
        else:
            known = await self._sql.events.has(sale_id, head.seq, head.chain)
        if known:
            return
        log.warning("unknown_orders_discarded", sale_id=sale_id, seq=head.seq if head else None)
        fence = RESTORING_EPOCH + rebuild.epoch if await self._restorer.epoch(sale_id) else ""
        await self._restorer.clear_unknown(sale_id, epoch=fence)


def _must_follow(rebuild: RebuildRow, epoch: str, superseded: str | None) -> bool:
    """Whether the events of this epoch may be the only ones after SQL's last.

    An epoch that SQL does not have may be a later one: SQL itself may have lost events.
    """
    if epoch in ("", rebuild.from_epoch) or epoch.startswith(RESTORING_EPOCH):
        # Once all survivors are saved, the events are the rebuild's own.
        return rebuild.saved_seq is None
    return epoch != superseded
