"""Paginated list of sales from one snapshot shared by all requests."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Collection
from itertools import islice
from typing import Final

import msgspec
import structlog

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.fences import RETIRING_EPOCH
from reservation.adapters.redis.sale_store import SaleStore
from reservation.domain import base64url
from reservation.domain.alarms import Alarm
from reservation.domain.clock import FIRST_MS, LAST_MS, Clock
from reservation.domain.errors import MalformedRequest, Unavailable
from reservation.domain.sale import Sale
from reservation.domain.states import SaleStatus, Visibility
from reservation.telemetry.metrics import alarm

__all__ = ["PAGE_MAX", "SaleList", "SalePage"]

log = structlog.get_logger(__name__)

#: Sales of one page.
PAGE_MAX: Final = 100
#: Maximum age of the snapshot.
FRESH_SECONDS: Final = 1.0
#: Maximum age of a cursor: people page slowly.
CURSOR_MS_MAX: Final = 3_600_000
#: Maximum skew between two processes' views of Redis' clock.
SKEW_MS_MAX: Final = 5_000
#: Cached orderings of one snapshot: walks that begin in the same second share one.
ORDERS_KEPT_MAX: Final = 8

#: A sale's sort key in the list: its group, its key within that, its id.
_Place = tuple[int, int, str]


class SalePage(msgspec.Struct, frozen=True):
    """One page of sales and the cursor of the next; None on the last page."""

    sales: list[Sale]
    next_cursor: str | None


class _Cursor(msgspec.Struct, frozen=True, array_like=True):
    """The last sort key of a page, and the instant by which the whole walk orders."""

    at_ms: int
    group: int
    key: int
    sale_id: str


class SaleList:
    """Snapshot of all sales in Redis, refreshed at most once a second under any load.

    A refresh reads only the head of a sale that has not changed.

    Args:
        store: reads the sales.
        is_retired: whether a sale is retired, even if an older state of Redis has it again.
        clock: measures the age of the snapshot.
    """

    def __init__(
        self, store: SaleStore, is_retired: Callable[[str], bool], *, clock: Clock
    ) -> None:
        self._store = store
        self._is_retired = is_retired
        self._clock = clock
        self._sales: dict[str, Sale] = {}
        #: Sales that cannot be read, and the reason that was raised last.
        self._damaged: dict[str, str] = {}
        self._orders: dict[int, list[tuple[_Place, Sale]]] = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def page(
        self,
        cursor: str | None,
        limit: int,
        *,
        now_ms: int,
        visibilities: Collection[Visibility] = (Visibility.PUBLIC,),
        status: SaleStatus | None = None,
    ) -> SalePage:
        """The next sales: live ones first, then upcoming ones, then those that are over.

        Args:
            cursor: the end of the previous page; None for the first one.
            limit: maximum number of sales.
            now_ms: by the server's clock.
            visibilities: those of the sales in the list.
            status: of the sales in the list at the begin of the walk; None for any.

        Raises:
            MalformedRequest: the cursor is not one of ours, or older than an hour.
            Unavailable: Redis does not answer.
        """
        after = _parsed(cursor, now_ms) if cursor is not None else None
        await self._refresh()
        # One instant orders a whole walk: a sale that opens meanwhile is not skipped.
        at_ms = after.at_ms if after else now_ms - now_ms % 1000
        order = self._ordered(at_ms)
        start = 0
        if after:
            place = (after.group, after.key, after.sale_id)
            start = bisect_right(order, place, key=lambda entry: entry[0])
        fitting = (
            entry
            for entry in islice(order, start, None)
            if entry[1].visibility in visibilities
            and (status is None or entry[1].status(at_ms) is status)
        )
        some = list(islice(fitting, limit + 1))
        more = len(some) > limit
        return SalePage(
            sales=[sale for _, sale in some[:limit]],
            next_cursor=_text(_Cursor(at_ms, *some[limit - 1][0])) if more else None,
        )

    def expire(self) -> None:
        """Invalidate the snapshot: a sale was changed here."""
        self._read_at = float("-inf")
        # A refresh in flight may have read before the change.
        self._reading = None

    async def _refresh(self) -> None:
        if self._clock.monotonic() - self._read_at < FRESH_SECONDS:
            return
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        try:
            await asyncio.shield(self._reading)
        except (StoreUnavailable, StoreUncertain) as error:
            raise Unavailable(retryAfter=1) from error

    async def _read(self) -> None:
        this = asyncio.current_task()
        try:
            began_at = self._clock.monotonic()
            heads = {
                sale_id: head
                for sale_id, head in (await self._store.heads()).items()
                # A retired sale leaves the list before its keys leave Redis.
                if not head[0].startswith(RETIRING_EPOCH) and not self._is_retired(sale_id)
            }
            changed = [
                sale_id
                for sale_id, head in heads.items()
                if (known := self._sales.get(sale_id)) is None or (known.epoch, known.seq) != head
            ]
            found = await self._store.read_many(changed)
        finally:
            is_reader = self._reading is this
            if is_reader:
                self._reading = None
        if not is_reader:
            # A later refresh has begun and is at least as fresh.
            return
        sales = {
            sale_id: sale
            for sale_id, sale in self._sales.items()
            if sale_id in heads or self._store.is_away(sale_id)
        }
        for sale_id, sale in found.items():
            sales.pop(sale_id, None)
            reason = str(sale) if isinstance(sale, Exception) else _unfit(sale)
            if reason:
                self._log_damaged(sale_id, reason)
            elif isinstance(sale, Sale):
                self._damaged.pop(sale_id, None)
                sales[sale_id] = sale
        if found or len(sales) != len(self._sales):
            self._sales, self._orders = sales, {}
        self._read_at = began_at

    def _log_damaged(self, sale_id: str, reason: str) -> None:
        if self._damaged.get(sale_id) != reason:
            self._damaged[sale_id] = reason
            alarm(Alarm.SALE_UNREADABLE, sale_id=sale_id, reason=reason)

    def _ordered(self, at_ms: int) -> list[tuple[_Place, Sale]]:
        order = self._orders.get(at_ms)
        if order is None:
            order = sorted(
                ((_place(sale, at_ms), sale) for sale in self._sales.values()),
                key=lambda entry: entry[0],
            )
            if len(self._orders) >= ORDERS_KEPT_MAX:
                del self._orders[next(iter(self._orders))]
            self._orders[at_ms] = order
        return order


def _place(sale: Sale, at_ms: int) -> _Place:
    if sale.switched is SaleStatus.CLOSED or at_ms >= sale.closes_at_ms:
        return 2, -sale.closes_at_ms, sale.sale_id
    if at_ms < sale.opens_at_ms:
        return 1, sale.opens_at_ms, sale.sale_id
    return 0, sale.closes_at_ms, sale.sale_id


def _unfit(sale: Sale | None) -> str:
    """The reason why a sale cannot be shown; empty if it can be, or is gone."""
    if sale is None:
        return ""
    for at_ms in (sale.opens_at_ms, sale.closes_at_ms):
        if not FIRST_MS <= at_ms <= LAST_MS:
            return f"{at_ms} ms is beyond the calendar"
    return ""


def _text(cursor: _Cursor) -> str:
    return base64url.encode(msgspec.json.encode(cursor))


def _parsed(text: str, now_ms: int) -> _Cursor:
    try:
        cursor = msgspec.json.decode(base64url.decode(text.encode("ascii")), type=_Cursor)
    except (ValueError, msgspec.DecodeError) as error:
        raise MalformedRequest("cursor is not a cursor of this endpoint.") from error
    if not now_ms - CURSOR_MS_MAX <= cursor.at_ms <= now_ms + SKEW_MS_MAX:
        raise MalformedRequest("The cursor has expired; start from the first page.")
    return cursor
