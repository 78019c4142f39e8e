"""Tombstones: replaces the orders that ended without a claim, in the order of their events.

    SQL        has the order's last event
    replace    Redis: the hash and the entry in the buyer's list become a tombstone
    read       SQL has the order; the tombstone proves that this is its last state
    restore    Redis: the tombstone becomes the hash again, and a script changes the order

Release 0.1.0 does not support tombstones, so they begin at level 2. One script checks and replaces
the orders of a batch, so a crash or a second worker changes nothing twice. The last two steps are
in `reservation.application.reservations.tombstones`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec
import structlog

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.tombstones import ORDERS_AT_ONCE, TombstoneStore
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import tombstone_of
from reservation.application.sales.catalog import Catalog
from reservation.domain.clock import Clock
from reservation.domain.events import Event, EventName
from reservation.domain.levels import LEVEL_OF_TOMBSTONES
from reservation.domain.rate_limit import BuyerLimits

__all__ = ["KEEP_MS_MIN", "TombstoneRounds", "keep_ms_of"]

log = structlog.get_logger(__name__)

#: Time from an order's deadline to its tombstone. A payment page that was opened before the
#: deadline lasts up to half an hour; few buyers return later.
KEEP_MS_MIN: Final = 45 * 60 * 1000
#: Events of one sale that one round reads.
EVENTS_AT_ONCE: Final = 1_000
#: Pages of events of one round, and orders replaced in it: under a second.
PAGES_MAX: Final = 20
ORDERS_MAX: Final = 1_000
#: The events that end an order, with or without a claim; the order's row shows which.
_ENDS: Final = (EventName.RELEASED, EventName.EXPIRED)
#: Pause between two reads of the level while it is too low.
LEVEL_SECONDS: Final = 30.0


def keep_ms_of(limits: BuyerLimits) -> int:
    """Time from an order's deadline to its tombstone.

    A buyer's rate is read from the buyer's orders, so an order stays as long as a limit counts it.
    """
    interval_ms, burst, _, period_ms, _ = limits.args()
    return max(KEEP_MS_MIN, round(interval_ms * burst), period_ms)


class _Sale(msgspec.Struct):
    """The progress in one sale, kept in this process only; it may be lost at any time."""

    epoch: str = ""
    #: The event up to which ended orders were replaced.
    seq: int = 0
    #: Server's time at which the next order is due.
    due_ms: int = 0
    #: The number of its last turn: the sale that waits longest comes first.
    turn: int = 0


#: The progress in a sale before its first round.
_NEW: Final = _Sale()


class TombstoneRounds:
    """Adds the tombstones of sales, in the order of their events.

    Args:
        connections: the server's clock.
        store: the tombstones.
        sql: the events and orders.
        catalog: the sales' epochs, and the sales that are closed or retired.
        clock: the time between two reads of the level.
        keep_ms: time from an order's deadline to its tombstone.
    """

    def __init__(
        self,
        connections: RedisClient,
        store: TombstoneStore,
        sql: SqlStore,
        catalog: Catalog,
        *,
        clock: Clock,
        keep_ms: int,
    ) -> None:
        self._connections = connections
        self._store = store
        self._sql = sql
        self._catalog = catalog
        self._clock = clock
        self._keep_ms = keep_ms
        self._sales: dict[str, _Sale] = {}
        self._turns = 0
        #: Levels only rise, so a level that suffices is not read again.
        self._may_write = False
        self._level_read_at = float("-inf")

    async def run_once(self, sale_ids: Iterable[str], flushed_seq: Callable[[str], int]) -> int:
        """Add the tombstones that are due in some of these sales.

        Args:
            sale_ids: the sales to check.
            flushed_seq: the last event of a sale that SQL has; an unchanged sale costs no call.

        Returns:
            The number of orders replaced.

        Raises:
            StoreUnavailable, StoreUncertain, SQLAlchemyError, OSError: a server does not answer.
        """
        due = [sale_id for sale_id in sale_ids if self._is_due(sale_id, flushed_seq(sale_id))]
        if not due or not await self._may_add():
            return 0
        made = pages = 0
        sales = {sale_id: self._sales.setdefault(sale_id, _Sale()) for sale_id in due}
        for sale_id, sale in sorted(sales.items(), key=lambda pair: pair[1].turn):
            if pages >= PAGES_MAX or made >= ORDERS_MAX:
                break
            # Counted now, so that an error delays no other sale.
            self._turns += 1
            sale.turn = self._turns
            while pages < PAGES_MAX and made < ORDERS_MAX:
                pages += 1
                made += await self._page(sale_id, sale)
                if not self._is_due(sale_id, flushed_seq(sale_id)):
                    break
        return made

    def _is_due(self, sale_id: str, flushed_seq: int) -> bool:
        if sale_id in self._catalog.closed or self._catalog.is_retired(sale_id):
            return False
        sale = self._sales.get(sale_id, _NEW)
        return sale.seq < flushed_seq and self._connections.server_now_ms(sale_id) >= sale.due_ms

    async def _may_add(self) -> bool:
        now = self._clock.monotonic()
        if not self._may_write and now - self._level_read_at >= LEVEL_SECONDS:
            self._level_read_at = now
            self._may_write = await self._sql.installation.level() >= LEVEL_OF_TOMBSTONES
        return self._may_write

    async def _page(self, sale_id: str, sale: _Sale) -> int:
        """Replace the orders that ended in the next page of the sale's events."""
        epoch = (await self._catalog.get(sale_id)).epoch
        if sale.epoch != epoch:
            seqs = await self._store.seqs([sale_id])
            sale.epoch, sale.seq = epoch, seqs.get(sale_id, 0)
        events = await self._sql.events.list_after(sale_id, sale.seq, EVENTS_AT_ONCE)
        now_ms = self._connections.server_now_ms(sale_id)
        ended, up_to, sale.due_ms = _of_age(events, sale.seq, now_ms - self._keep_ms)
        rows = await self._sql.orders.list_never_claimed(ended) if ended else []
        young = [row for row in rows if row.expires_at_ms + self._keep_ms > now_ms]
        if young:
            # Later events wait for these orders, so that one number is the progress of all.
            first = young[0]
            up_to, sale.due_ms = min(up_to, first.seq - 1), first.expires_at_ms
            rows = [row for row in rows if row.seq < first.seq]
        sale.due_ms += self._keep_ms
        made = await self._replace(sale_id, rows, epoch=epoch, up_to=up_to)
        sale.seq = up_to
        return made

    async def _replace(
        self, sale_id: str, rows: Sequence[OrderRow], *, epoch: str, up_to: int
    ) -> int:
        tombstones = [tombstone for row in rows if (tombstone := tombstone_of(row))]
        made = damaged = 0
        for first in range(0, len(tombstones), ORDERS_AT_ONCE):
            some = tombstones[first : first + ORDERS_AT_ONCE]
            is_last = first + ORDERS_AT_ONCE >= len(tombstones)
            added = await self._store.add(
                sale_id,
                some,
                epoch=epoch,
                keep_ms=self._keep_ms,
                up_to=up_to if is_last else 0,
            )
            made, damaged = made + added.made, damaged + added.damaged
        if damaged:
            log.warning("tombstones_not_added", sale_id=sale_id, orders=damaged)
        return made


def _of_age(events: Sequence[Event], seq: int, before_ms: int) -> tuple[list[str], int, int]:
    """The orders that ended before this time, the last event read, and the time of the next one."""
    ended: list[str] = []
    for event in events:
        if event.at_ms > before_ms:
            return ended, seq, event.at_ms
        if event.event in _ENDS:
            ended.append(event.order_id)
        seq = event.seq
    return ended, seq, 0
