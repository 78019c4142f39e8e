"""Prepare: holds the stock of a basket, idempotent by the caller's key."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from copy import copy
from typing import Any

import msgspec

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain
from reservation.adapters.redis.prepare_queue import (
    Decision,
    HoldCreated,
    PrepareQueue,
    Replayed,
    overload_refusal,
)
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.application.readiness.redis_monitor import RedisMonitor
from reservation.application.sales.catalog import CachedSale, Catalog
from reservation.domain.errors import (
    BuyerLimitExceeded,
    IdempotencyKeyReused,
    OutcomeUnknown,
    ReservationError,
    SaleClosed,
    SaleRecovering,
    SkuNotFound,
    Unavailable,
)
from reservation.domain.ids import OrderIds
from reservation.domain.reservation import (
    Basket,
    Line,
    Reservation,
    Wish,
    digest_of,
    merge_lines,
)
from reservation.domain.sale import Sale

__all__ = ["Done", "PrepareReservations", "Prepared", "wish_of"]

#: Live orders listed in a refusal of a buyer over the limit.
ORDERS_SHOWN_MAX = 20
#: Shared by all rejected prepares: it is returned and never raised.
TOO_MANY = overload_refusal()
#: The PG's own limit on an order's name.
ORDER_NAME_CHARS_MAX = 100


class Prepared(msgspec.Struct, frozen=True):
    """The reservation, and whether this is a replay of its key."""

    reservation: Reservation
    epoch: str
    replayed: bool


#: Called once with the outcome; an exception other than a refusal is a bug that the caller logs.
Done = Callable[[HoldCreated | Prepared | Exception], None]
#: Outcomes that need another read, or a retry.
_WITH_MORE = (Replayed, BuyerLimitExceeded, SaleRecovering)


class PrepareReservations:
    """Takes holds through the queue that batches prepares."""

    def __init__(
        self,
        catalog: Catalog,
        queue: PrepareQueue,
        store: ReservationStore,
        order_ids: OrderIds,
        watch: RedisMonitor,
    ) -> None:
        self._catalog = catalog
        self._queue = queue
        self._store = store
        self._order_ids = order_ids
        self._watch = watch
        self._slow: set[asyncio.Task[None]] = set()

    async def prepare(
        self, known: CachedSale, buyer_id: str, idempotency_key: str, wish: Wish
    ) -> Prepared:
        """Hold the wish's stock until the deadline; a replay of the key gets the same order.

        Args:
            known: the sale, as the catalog has it.
            buyer_id: the buyer.
            idempotency_key: the buyer's key.
            wish: the basket (`wish_of`).

        Raises:
            Every refusal in prepare.lua; `Unavailable` if certainly nothing was taken,
            `OutcomeUnknown` if that is unknown.
        """
        refusal = self.overload_refusal(known)
        if refusal is not None:
            raise copy(refusal)
        future: asyncio.Future[HoldCreated | Prepared]
        future = asyncio.get_running_loop().create_future()

        def done(outcome: HoldCreated | Prepared | Exception) -> None:
            # The caller may be gone; the hold stays, and its idempotency key finds it.
            if future.done():
                return
            if isinstance(outcome, Exception):
                # A refusal may be shared by several callers, so each raises a copy.
                future.set_exception(copy(outcome))
            else:
                future.set_result(outcome)

        self.begin(known, buyer_id, idempotency_key, wish, done)
        outcome = await future
        if isinstance(outcome, HoldCreated):
            return Prepared(outcome.reservation(), known.epoch, replayed=False)
        return outcome

    def begin(
        self, known: CachedSale, buyer_id: str, idempotency_key: str, wish: Wish, done: Done
    ) -> None:
        """`prepare` with a callback instead of an await: most wishes need no task of their own.

        The caller has checked `overload_refusal` in this turn of the loop. `done` is called once
        and must not raise. A new hold of this call comes as `HoldCreated`: the caller encodes the
        answers of many of those together.

        Raises:
            The refusals that need no Redis; `done` is not called then.
        """
        self._watch.check(known.sale.sale_id)
        basket = self.basket(known, buyer_id, idempotency_key, wish)
        if known.is_retired:
            self._start(self._replay_of_retired(known, basket, done))
            return

        def decided(outcome: Decision | ReservationError) -> None:
            if isinstance(outcome, _WITH_MORE):
                self._start(self._complete_later(known.epoch, basket, outcome, done))
            else:
                done(outcome)

        self._queue.submit(basket, epoch=known.epoch, done=decided)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._slow.add(task)
        task.add_done_callback(self._slow.discard)

    def overload_refusal(self, known: CachedSale) -> Unavailable | None:
        """Load shedding: the refusal of a new prepare while the sale's queue is full, else None."""
        return TOO_MANY if self._queue.is_full(known.sale.sale_id, known.epoch) else None

    async def is_replay(
        self, sale_id: str, buyer_id: str, idempotency_key: str, digest: str
    ) -> bool:
        """Whether this key has an order with this body; False while Redis is down as well."""
        order_id = self._order_ids.order_id(
            sale_id=sale_id, buyer_id=buyer_id, idempotency_key=idempotency_key
        )
        try:
            return await self._store.digest(order_id, buyer_id) == digest
        except (StoreUnavailable, StoreUncertain):
            return False

    def basket(self, known: CachedSale, buyer_id: str, idempotency_key: str, wish: Wish) -> Basket:
        """The wish in the queue's form."""
        sale_id = known.sale.sale_id
        order_id = self._order_ids.order_id(
            sale_id=sale_id, buyer_id=buyer_id, idempotency_key=idempotency_key
        )
        return Basket(sale_id=sale_id, order_id=order_id, buyer_id=buyer_id, wish=wish)

    async def _complete_later(
        self, epoch: str, basket: Basket, outcome: Replayed | ReservationError, done: Done
    ) -> None:
        try:
            if isinstance(outcome, SaleRecovering):
                done(await self._prepare_again(basket))
            else:
                done(await self._complete(epoch, basket, outcome))
        except Exception as error:  # noqa: BLE001 # loop top: the caller logs it
            done(error)

    async def _replay_of_retired(self, known: CachedSale, basket: Basket, done: Done) -> None:
        """Return the order of a replayed key; refuse a new key, because the sale is retired."""
        try:
            order = await self._existing_or_none(basket)
            if order is None:
                done(SaleClosed())
            elif order.digest != basket.wish.digest:
                done(IdempotencyKeyReused())
            else:
                done(Prepared(order, known.epoch, replayed=True))
        except Exception as error:  # noqa: BLE001 # loop top: the caller logs it
            done(error)

    async def _prepare_again(self, basket: Basket) -> Prepared:
        """Retry once: the sale may have been rebuilt under a new epoch meanwhile."""
        self._watch.wake()
        self._catalog.forget(basket.sale_id)
        known = await self._catalog.get(basket.sale_id)
        return await self._prepare(basket, known.epoch)

    async def _prepare(self, basket: Basket, epoch: str) -> Prepared:
        outcome: Reservation | Replayed | ReservationError
        try:
            outcome = await self._queue.prepare(basket, epoch=epoch)
        except BuyerLimitExceeded as refusal:
            outcome = refusal
        return await self._complete(epoch, basket, outcome)

    async def _complete(
        self, epoch: str, basket: Basket, outcome: Reservation | Replayed | ReservationError
    ) -> Prepared:
        """Fetch the rest of an outcome: the order of a replay, the live orders of a buyer."""
        if isinstance(outcome, Reservation):
            return Prepared(outcome, epoch, replayed=False)
        if isinstance(outcome, ReservationError):
            if isinstance(outcome, BuyerLimitExceeded):
                outcome.facts["orderIds"] = await self._live_orders(basket)
            raise outcome
        return Prepared(await self._existing(basket), epoch, replayed=True)

    async def _existing(self, basket: Basket) -> Reservation:
        found = await self._existing_or_none(basket)
        if found is None:
            raise OutcomeUnknown(retryAfter=1)
        return found

    async def _existing_or_none(self, basket: Basket) -> Reservation | None:
        try:
            # Replicas may not have acknowledged the call that made the order.
            return await self._store.read_acknowledged(basket.order_id)
        except (StoreUnavailable, StoreUncertain) as error:
            raise OutcomeUnknown(retryAfter=1) from error

    async def _live_orders(self, basket: Basket) -> list[str]:
        try:
            return await self._store.live_orders_of_buyer(
                basket.sale_id, basket.buyer_id, ORDERS_SHOWN_MAX
            )
        except (StoreUnavailable, StoreUncertain):
            # The refusal is complete without them.
            return []


def wish_of(
    sale: Sale,
    items: Iterable[tuple[str, int]],
    amount: int,
    *,
    order_name: str | None = None,
    admitted: bool = False,
) -> Wish:
    """A buyer's wish in this sale.

    Args:
        sale: as the catalog has it.
        items: SKU and quantity; an SKU may occur twice.
        amount: as the page showed it, in minor units.
        order_name: the caller's own; None for the default.
        admitted: whether the caller showed a valid admission.

    Raises:
        SkuNotFound: the sale does not have the first item.
    """
    lines = merge_lines(items)
    return Wish(
        lines=lines,
        amount=amount,
        currency=sale.currency,
        order_name=default_name(sale, lines) if order_name is None else order_name,
        admitted=admitted,
        digest=digest_of(lines, amount, order_name),
    )


def default_name(sale: Sale, lines: Sequence[Line]) -> str:
    """The first item's name and the number of further items, shown on the PG's page.

    Raises:
        SkuNotFound: the sale does not have the first item.
    """
    item = sale.item(lines[0].sku)
    if item is None:
        raise SkuNotFound(sku=lines[0].sku)
    more = f" +{len(lines) - 1}" if len(lines) > 1 else ""
    return item.name[: ORDER_NAME_CHARS_MAX - len(more)] + more
