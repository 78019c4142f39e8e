"""The event feed: pages of public events from SQL, and the wait for the next one."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.keys import is_lane, partition_of
from reservation.adapters.sql.errors import reason_of
from reservation.adapters.sql.feed import FeedRow, OrderFacts
from reservation.adapters.sql.store import SqlStore
from reservation.domain.clock import as_wire
from reservation.domain.event_types import type_of
from reservation.domain.states import Status

__all__ = ["EventFeed", "FeedEvent", "FeedPage", "public_events"]

log = structlog.get_logger(__name__)

#: Interval at which one poll of the last id serves all requests that wait.
POLL_SECONDS: Final = 0.25
#: Requests of one process that wait at the same time; a further one gets its response at once.
WAITS_MAX: Final = 64
#: Members of events that a reader of the feed must not have in full, or at all.
_KEYS: Final = frozenset({"paymentKey", "payment_key"})
_SECRETS: Final = frozenset({"secret", "digest"})


class FeedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event as its readers see it."""

    id: int
    sale_id: str
    #: 0 in a sale of one partition.
    partition: int
    seq: int
    epoch: str
    type: str
    at_ms: int
    #: None for a sale's event.
    order_id: str | None
    #: JSON: `reservation` after the event (not for a sale's event), and `change`, its own facts.
    data: dict[str, Any]


class FeedPage(msgspec.Struct, frozen=True, kw_only=True):
    """Events, and the id to continue after."""

    events: list[FeedEvent]
    next: int


class EventFeed:
    """Reads pages of the feed."""

    def __init__(self, sql: SqlStore) -> None:
        self._sql = sql
        self._waits: set[asyncio.Future[None]] = set()
        self._poll: asyncio.Task[None] | None = None
        self._stopped = False

    async def page(self, *, after: int, limit: int, sale_id: str | None = None) -> FeedPage:
        """The events with a higher id, at most `limit`, in the order of their ids."""
        rows, following = await self._sql.feed.page(after=after, limit=limit, sale_id=sale_id)
        return FeedPage(events=await self.describe(rows), next=following)

    async def next_page(
        self, *, after: int, limit: int, sale_id: str | None = None, wait_seconds: float
    ) -> FeedPage:
        """As `page`; if it has no events, the first page that has some within this many seconds."""
        deadline = asyncio.get_running_loop().time() + wait_seconds
        while True:
            page = await self.page(after=after, limit=limit, sale_id=sale_id)
            after = page.next
            if page.events or not await self._await_after(after, deadline):
                return page

    async def describe(self, rows: Sequence[FeedRow]) -> list[FeedEvent]:
        """The public events of these rows."""
        order_ids = {row.order_id for row in rows if row.order_id}
        return public_events(rows, await self._sql.feed.list_orders(order_ids))

    def stop_waiting(self) -> None:
        """On shutdown: end every wait and let none begin."""
        self._stopped = True
        self._wake()

    async def _await_after(self, last_id: int, deadline: float) -> bool:
        """Wait until the feed may have a later event; False at the deadline or on shutdown."""
        loop = asyncio.get_running_loop()
        while not self._stopped and len(self._waits) < WAITS_MAX and loop.time() < deadline:
            if await self._sql.feed.last_id() > last_id:
                return True
            if self._stopped:
                # Since the read began: no later stop would end this wait.
                break
            wait: asyncio.Future[None] = loop.create_future()
            self._waits.add(wait)
            if self._poll is None or self._poll.done():
                self._poll = asyncio.create_task(self._watch(last_id))
            try:
                async with asyncio.timeout_at(deadline):
                    await wait
            except TimeoutError:
                return False
            finally:
                self._waits.discard(wait)
                if not self._waits:
                    self._poll.cancel()
        return False

    async def _watch(self, last_id: int) -> None:
        """Wake all waits when the last id rises, or when SQL fails: each then reads by itself."""
        try:
            while True:
                if await self._sql.feed.last_id() > last_id:
                    break
                await asyncio.sleep(POLL_SECONDS)
        except (SQLAlchemyError, OSError) as error:
            log.debug("feed_poll_failed", reason=reason_of(error))
        finally:
            self._wake()

    def _wake(self) -> None:
        for wait in self._waits:
            if not wait.done():
                wait.set_result(None)


def public_events(rows: Sequence[FeedRow], orders: dict[str, OrderFacts]) -> list[FeedEvent]:
    """The public events of these rows; `orders` has the orders that they name."""
    return [_public(row, orders.get(row.order_id)) for row in rows]


def _public(row: FeedRow, order: OrderFacts | None) -> FeedEvent:
    sale_id, partition = partition_of(row.sale_id) if is_lane(row.sale_id) else (row.sale_id, 0)
    facts: dict[str, Any] = msgspec.json.decode(row.data)
    origin, to = str(facts.get("from", "")), str(facts.get("to", ""))
    to = to or _IMPLIED.get(row.event, "")
    data: dict[str, Any] = {}
    if order is not None:
        data["reservation"] = _reservation(order, row, status=to, sale_id=sale_id)
    if not row.notice:
        data["change"] = {"event": row.event, **_masked(facts)}
    return FeedEvent(
        id=row.id,
        sale_id=sale_id,
        partition=partition,
        seq=row.seq,
        epoch=row.epoch,
        type=row.notice or type_of(row.event, origin=origin, to=to),
        at_ms=row.at_ms,
        order_id=row.order_id or None,
        data=data,
    )


#: The state after an event whose facts may omit it.
_IMPLIED: Final = {
    "claimed": Status.CONFIRMING.value,
    "taken_over": Status.CONFIRMING.value,
    "confirmed": Status.CONFIRMED.value,
    "awaiting_deposit": Status.AWAITING_DEPOSIT.value,
    "partially_refunded": Status.CONFIRMED.value,
}


def _reservation(order: OrderFacts, row: FeedRow, *, status: str, sale_id: str) -> dict[str, Any]:
    return {
        "orderId": order.order_id,
        "saleId": sale_id,
        "buyerId": order.buyer_id,
        "status": status,
        "items": [
            {"sku": sku, "quantity": quantity, "price": price}
            for sku, quantity, price in order.lines
        ],
        "amount": order.amount,
        "currency": order.currency,
        "orderName": order.order_name,
        "createdAt": as_wire(order.created_at_ms),
        "updatedAt": as_wire(row.at_ms),
        "expiresAt": as_wire(order.expires_at_ms),
    }


def _masked(facts: Any) -> Any:
    """Payment keys reduced to their last four characters, secrets removed, at any depth."""
    if isinstance(facts, dict):
        members = cast("dict[str, Any]", facts)
        return {
            name: f"...{value[-4:]}" if name in _KEYS and isinstance(value, str) else _masked(value)
            for name, value in members.items()
            if name not in _SECRETS
        }
    if isinstance(facts, list):
        return [_masked(value) for value in cast("list[Any]", facts)]
    return facts
