"""Prepare: a basket becomes a hold, idempotent by the caller's key."""

import asyncio
from collections.abc import Callable

import msgspec

from reservation.catalog import Catalog, Known
from reservation.domain.errors import (
    BuyerLimitExceeded,
    OutcomeUnknown,
    ReservationError,
    SaleRecovering,
    SkuNotFound,
    Unavailable,
)
from reservation.domain.ids import OrderIds
from reservation.domain.reservation import Basket, Reservation, merge_lines
from reservation.domain.sale import Sale
from reservation.domain.states import LIVE
from reservation.recovery import Watch
from reservation.redis.batch import Decision, PrepareQueue, too_many
from reservation.redis.connection import StoreUnavailable, StoreUncertain
from reservation.redis.store import Store

__all__ = ["Done", "Prepare", "Prepared", "Wish"]

#: Orders that a buyer over the limit is shown.
ORDERS_SHOWN_MAX = 20
#: The PG's own limit on an order's name.
ORDER_NAME_CHARS_MAX = 100


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a buyer asks for, as it came in."""

    sale_id: str
    buyer_id: str
    idempotency_key: str
    #: SKU and quantity; the same SKU may stand twice.
    items: tuple[tuple[str, int], ...]
    #: What the page showed, minor units.
    amount: int
    order_name: str | None
    admitted: bool


class Prepared(msgspec.Struct, frozen=True):
    """The reservation, and whether this key had made it before."""

    reservation: Reservation
    epoch: str
    replayed: bool


#: Told once how a wish ended; anything but a refusal is a bug that its caller logs.
Done = Callable[[Prepared | Exception], None]
#: Refusals that something is added to, or that are tried once more.
_WITH_MORE = (BuyerLimitExceeded, SaleRecovering)


class Prepare:
    """Takes holds through the queue that batches them."""

    def __init__(
        self,
        catalog: Catalog,
        queue: PrepareQueue,
        store: Store,
        order_ids: OrderIds,
        watch: Watch,
    ) -> None:
        self._catalog = catalog
        self._queue = queue
        self._store = store
        self._order_ids = order_ids
        self._watch = watch
        self._slow: set[asyncio.Task[None]] = set()

    async def __call__(self, wish: Wish) -> Prepared:
        """Hold the basket's stock until the deadline; a repeat of the key gets the same order.

        Raises:
            Every refusal in prepare.lua; `Unavailable` where nothing was taken for certain,
            `OutcomeUnknown` where that cannot be told.
        """
        self._watch.check(wish.sale_id)
        known = await self._catalog.get(wish.sale_id)
        try:
            return await self._prepare(wish, known)
        except SaleRecovering:
            return await self._prepare_again(wish)

    def begin(self, wish: Wish, known: Known, done: Done) -> None:
        """The same, told to `done` rather than awaited: most wishes need no task of their own.

        Args:
            wish: what the buyer asks for.
            known: its sale, as the catalog has it.
            done: told once; it must not raise.

        Raises:
            Those refusals that need no Redis; `done` is told nothing then.
        """
        self._watch.check(wish.sale_id)
        basket = self.basket(wish, known.sale)

        def decided(outcome: Decision | ReservationError) -> None:
            if isinstance(outcome, Reservation):
                done(Prepared(outcome, known.epoch, replayed=False))
            elif isinstance(outcome, ReservationError) and not isinstance(outcome, _WITH_MORE):
                done(outcome)
            else:
                task = asyncio.create_task(self._tell(wish, known, basket, outcome, done))
                self._slow.add(task)
                task.add_done_callback(self._slow.discard)

        self._queue.submit(basket, epoch=known.epoch, done=decided)

    def turned_away(self, known: Known) -> Unavailable | None:
        """The refusal of every newcomer of this sale, while too many wait already."""
        return too_many() if self._queue.is_full(known.sale.sale_id, known.epoch) else None

    async def _tell(
        self,
        wish: Wish,
        known: Known,
        basket: Basket,
        outcome: Decision | ReservationError,
        done: Done,
    ) -> None:
        try:
            if isinstance(outcome, SaleRecovering):
                done(await self._prepare_again(wish))
            else:
                done(await self._complete(wish, known.epoch, basket, outcome))
        except Exception as error:  # noqa: BLE001 # loop top: the caller logs it
            done(error)

    async def _prepare_again(self, wish: Wish) -> Prepared:
        """Rebuilt meanwhile under a new epoch? Then once more; else it is lost."""
        self._watch.wake()
        self._catalog.forget(wish.sale_id)
        return await self._prepare(wish, await self._catalog.get(wish.sale_id))

    async def _prepare(self, wish: Wish, known: Known) -> Prepared:
        basket = self.basket(wish, known.sale)
        outcome: Decision | ReservationError
        try:
            outcome = await self._queue.prepare(basket, epoch=known.epoch)
        except BuyerLimitExceeded as refusal:
            outcome = refusal
        return await self._complete(wish, known.epoch, basket, outcome)

    async def _complete(
        self, wish: Wish, epoch: str, basket: Basket, outcome: Decision | ReservationError
    ) -> Prepared:
        """Fetch what an outcome lacks: the order that a replay names, a buyer's live orders."""
        if isinstance(outcome, Reservation):
            return Prepared(outcome, epoch, replayed=False)
        if isinstance(outcome, ReservationError):
            if isinstance(outcome, BuyerLimitExceeded):
                outcome.facts["orderIds"] = await self._live_orders(wish)
            raise outcome
        return Prepared(await self._standing(basket), epoch, replayed=True)

    def basket(self, wish: Wish, sale: Sale) -> Basket:
        """The wish as the script takes it.

        Raises:
            SkuNotFound: the sale does not have the first item.
        """
        lines = merge_lines(wish.items)
        return Basket(
            sale_id=wish.sale_id,
            order_id=self._order_ids.order_id(
                sale_id=wish.sale_id,
                buyer_id=wish.buyer_id,
                idempotency_key=wish.idempotency_key,
            ),
            buyer_id=wish.buyer_id,
            lines=lines,
            amount=wish.amount,
            currency=sale.currency,
            order_name=wish.order_name
            if wish.order_name is not None
            else default_name(sale, [line.sku for line in lines]),
            name_given=wish.order_name is not None,
            admitted=wish.admitted,
        )

    async def _standing(self, basket: Basket) -> Reservation:
        try:
            found = await self._store.read(basket.order_id)
        except (StoreUnavailable, StoreUncertain) as error:
            raise OutcomeUnknown(retryAfter=1) from error
        if found is None:
            raise OutcomeUnknown(retryAfter=1)
        return found

    async def _live_orders(self, wish: Wish) -> list[str]:
        try:
            orders = await self._store.orders_of_buyer(
                wish.sale_id, wish.buyer_id, ORDERS_SHOWN_MAX
            )
        except (StoreUnavailable, StoreUncertain):
            # The refusal stands without them.
            return []
        return [order.order_id for order in orders if order.status in LIVE]


def default_name(sale: Sale, skus: list[str]) -> str:
    """The first item's name and how many more: what the PG's page shows the buyer.

    Raises:
        SkuNotFound: the sale does not have the first item.
    """
    item = sale.item(skus[0])
    if item is None:
        raise SkuNotFound(sku=skus[0])
    more = f" +{len(skus) - 1}" if len(skus) > 1 else ""
    return item.name[: ORDER_NAME_CHARS_MAX - len(more)] + more
