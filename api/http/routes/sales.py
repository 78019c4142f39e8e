"""The shopper's endpoints for sales: list, one sale, and the live stock."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Annotated, Any, Final

import msgspec
import structlog
from litestar import Controller, Request, Response, get
from litestar.params import FromPath, QueryParameter
from litestar.response import ServerSentEvent, ServerSentEventMessage

from api.http import open_files
from api.http.auth.bearer import bearer_of
from api.http.dependencies import ApiContext, api_of
from api.http.problem_details import documented
from api.http.query_parameters import requires_known_query
from api.http.routes.reservations import sale_exists
from api.http.schemas.sales import SaleAnswer, SalesAnswer
from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.application.sales.listing import PAGE_MAX
from reservation.domain.errors import (
    MalformedRequest,
    RateLimited,
    SaleNotFound,
    SaleRecovering,
    Unauthenticated,
    Unavailable,
)
from reservation.domain.sale import Sale

__all__ = ["SaleController", "StockFeed"]

log = structlog.get_logger(__name__)

#: At most ten events a second for each item.
TICK_SECONDS: Final = 0.1
#: A comment this often keeps proxies from closing a quiet stream.
HEARTBEAT_SECONDS: Final = 15.0
#: Queue length of a slow reader; beyond it only the newest change is kept.
QUEUE_MAX: Final = 1
#: Streams that one process serves: each costs a socket and a little memory.
STREAMS_MAX: Final = 20_000
#: Streams that one process serves to one address (IPv6: to one /64). A hidden tab has none. A
#: carrier puts many buyers behind one address, and 500 streams were measured to slow prepare down.
STREAMS_PER_ADDRESS_MAX: Final = 64
#: Retry-After of a refused stream.
STREAM_RETRY_SECONDS: Final = 5


class StockFeed:
    """Reads the watched sales ten times a second, once for all streams.

    One exchange reads the heads of all of them. Only a sale with a new event is read whole.
    """

    def __init__(self, api: ApiContext) -> None:
        self._api = api
        self._watchers: dict[str, set[asyncio.Queue[Sale | None]]] = {}
        self._task: asyncio.Task[None] | None = None
        self._count = 0
        self._of_address: dict[str, int] = {}

    def check(self, address: str) -> None:
        """Admit one more stream.

        Args:
            address: of the caller, as callers are counted; the empty one is not counted.

        Raises:
            RateLimited: too many to this address.
            Unavailable: too many in this process.
        """
        if address and self._of_address.get(address, 0) >= STREAMS_PER_ADDRESS_MAX:
            raise RateLimited(
                "Too many open streams from this address.", retryAfter=STREAM_RETRY_SECONDS
            )
        # Half of the file descriptors are reserved for requests and for the stores.
        if self._count >= min(STREAMS_MAX, open_files.limit() // 2):
            raise Unavailable(
                "Too many open streams on this server.", retryAfter=STREAM_RETRY_SECONDS
            )

    async def watch(self, sale_id: str, address: str) -> AsyncGenerator[ServerSentEventMessage]:
        """Events of a sale: every item at once, then each item as it changes."""
        try:
            # Too many concurrent calls may have passed the first check.
            self.check(address)
        except (RateLimited, Unavailable):
            return
        self._count += 1
        self._of_address[address] = self._of_address.get(address, 0) + 1
        try:
            async with aclosing(self._events(sale_id)) as events:
                async for event in events:
                    yield event
        finally:
            self._count -= 1
            left = self._of_address.pop(address) - 1
            if left:
                self._of_address[address] = left

    async def _events(self, sale_id: str) -> AsyncGenerator[ServerSentEventMessage]:
        queue: asyncio.Queue[Sale | None] = asyncio.Queue(QUEUE_MAX)
        # Watched before it is read: a change in between is read again at the next tick.
        watchers = self._watchers.setdefault(sale_id, set())
        watchers.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._read())
        try:
            sale = (await self._api.service.catalog.fresh(sale_id)).sale
            seen: dict[str, tuple[int, int, int]] = {}
            while True:
                for item in sale.items:
                    counters = (item.available, item.held, item.sold)
                    if seen.get(item.sku) != counters:
                        seen[item.sku] = counters
                        yield _stock_event(item.sku, counters, sale.seq)
                try:
                    # Not wait_for: before 3.12 it swallows a cancellation that comes with an item.
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        newer = await queue.get()
                except TimeoutError:
                    yield ServerSentEventMessage(comment="still here")
                    continue
                if newer is None:
                    return
                sale = newer
        finally:
            watchers.discard(queue)
            if not watchers:
                del self._watchers[sale_id]
            if not self._watchers:
                self._stop_reading()

    def _stop_reading(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _read(self) -> None:
        shown: dict[str, tuple[str, int]] = {}
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                shown = await self._show_newer(shown)
            except (StoreUnavailable, StoreUncertain) as error:
                log.info("stock_feed_read_failed", sales=len(self._watchers), reason=str(error))
            except Exception:  # loop top: a bug must not end the streams of every sale
                log.exception("stock_feed_crashed")

    async def _show_newer(self, shown: dict[str, tuple[str, int]]) -> dict[str, tuple[str, int]]:
        """Show the sales that have changed; returns the heads (epoch, seq) now shown."""
        store = self._api.service.sale_store
        is_retired = self._api.service.catalog.is_retired
        # An older state of Redis may have a retired sale again, with outdated counters.
        heads = await store.heads([name for name in self._watchers if not is_retired(name)])
        changed = [sale_id for sale_id, head in heads.items() if shown.get(sale_id) != head]
        for sale_id, sale in (await store.read_many(changed)).items():
            if isinstance(sale, Sale):
                for queue in self._watchers.get(sale_id, ()):
                    _put_newest(queue, sale)
        return heads

    def stop(self) -> None:
        """End every stream; the browsers reconnect to another process."""
        for watchers in self._watchers.values():
            for queue in watchers:
                _put_newest(queue, None)


def _put_newest(queue: asyncio.Queue[Sale | None], sale: Sale | None) -> None:
    """Replace the item of a reader that has not taken the last one yet."""
    with suppress(asyncio.QueueEmpty):
        queue.get_nowait()
    queue.put_nowait(sale)


def _stock_event(sku: str, counters: tuple[int, int, int], seq: int) -> ServerSentEventMessage:
    available, held, sold = counters
    data = {"sku": sku, "available": available, "held": held, "sold": sold}
    return ServerSentEventMessage(
        event="stock", data=msgspec.json.encode(data).decode(), id=str(seq), retry=2000
    )


class SaleController(Controller):
    """The sales."""

    path = "/v1/sales"
    tags = ("Sales",)

    @get(
        "/",
        operation_id="listSales",
        guards=[requires_known_query],
        responses=documented(MalformedRequest, Unavailable),
    )
    async def list_all(
        self,
        request: Request[Any, Any, Any],
        cursor: Annotated[
            str | None,
            QueryParameter(max_length=256, description="The `nextCursor` of the previous page."),
        ] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=PAGE_MAX)] = PAGE_MAX,
    ) -> SalesAnswer:
        """A page of sales with their stock: live ones first, then coming ones, then past ones.

        At most a second old.
        """
        service = api_of(request).service
        now_ms = service.connections.server_now_ms()
        page = await service.sales.page(cursor, limit, now_ms=now_ms)
        return SalesAnswer.of(page, now_ms=now_ms)

    @get(
        "/{sale_id:str}",
        operation_id="getSale",
        guards=[sale_exists],
        responses=documented(MalformedRequest, SaleNotFound, SaleRecovering, Unavailable),
    )
    async def one(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str]
    ) -> Response[SaleAnswer]:
        """One sale with its current stock, the server's clock, and the admission to it."""
        api = api_of(request)
        sale = (await api.service.catalog.fresh(sale_id)).sale
        now_ms = api.service.connections.server_now_ms()
        admission = None
        # Anonymous responses are alike, and an admission from before the opening admits no buyer.
        if bearer_of(request) is not None and now_ms >= sale.opens_at_ms:
            # An invalid token does not hide a public page.
            with suppress(Unauthenticated, Unavailable):
                buyer_id = await api.buyers.buyer(request)
                admission = api.service.signer.admission(
                    sale.page, buyer_id, now_ms=api.service.clock.now_ms()
                )
        return Response(
            SaleAnswer.of(sale, now_ms=now_ms, admission=admission),
            headers={"Cache-Control": "no-store"},
        )

    @get(
        "/{sale_id:str}/events",
        operation_id="watchStock",
        guards=[sale_exists],
        responses=documented(
            MalformedRequest, SaleNotFound, RateLimited, SaleRecovering, Unavailable
        ),
        media_type="text/event-stream",
    )
    async def events(
        self, request: Request[Any, Any, Any], sale_id: FromPath[str]
    ) -> ServerSentEvent:
        """The live stock as server-sent events."""
        feed: StockFeed = request.app.state.stock_feed
        address = api_of(request).peers.remote(request)
        feed.check(address)
        return ServerSentEvent(feed.watch(sale_id, address))
