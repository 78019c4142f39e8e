"""Explanations for operators: the holders of an item's units, and the next step of an order."""

from typing import Final

import msgspec

from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_store import SaleStore
from reservation.adapters.sql.orders import HolderRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.reservations.queries import ReservationQueries
from reservation.application.sales.catalog import Catalog
from reservation.domain.clock import Clock, as_wire
from reservation.domain.errors import SaleNotFound, SkuNotFound
from reservation.domain.payment_timeouts import DEFAULT_LIMITS, PaymentTimeouts
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item, Sale
from reservation.domain.states import HoldPolicy, Status

__all__ = ["Explain", "SkuWhy", "Waiting"]

#: Holders and orders of each kind that are listed: a screenful.
ROWS_MAX: Final = 20
#: Orders scanned for those of one item: one round trip of 200 small hashes.
SCANNED_MAX: Final = 200


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """An order that holds units of an item, with its deadline or the end of its lease."""

    order_id: str
    buyer_id: str
    status: Status
    quantity: int
    since_ms: int
    until_ms: int


class SkuWhy(msgspec.Struct, frozen=True, kw_only=True):
    """The holders of one item's units."""

    sale_id: str
    item: Item
    #: From SQL, which may be an instant behind.
    holders: tuple[HolderRow, ...]
    next_deadlines: tuple[Waiting, ...]
    undecided: tuple[Waiting, ...]


class Explain:
    """Explains items and orders to operators."""

    def __init__(
        self,
        catalog: Catalog,
        sales: SaleStore,
        store: ReservationStore,
        sql: SqlStore,
        queries: ReservationQueries,
        *,
        clock: Clock,
        limits: PaymentTimeouts = DEFAULT_LIMITS,
    ) -> None:
        self._catalog = catalog
        self._sales = sales
        self._store = store
        self._sql = sql
        self._queries = queries
        self._clock = clock
        self._limits = limits

    async def item(self, sale_id: str, sku: str) -> SkuWhy:
        """The holders of an item's units, the next deadlines and the undecided payments.

        Raises:
            SaleNotFound, SkuNotFound.
        """
        sale = await self._read_sale(sale_id)
        if sale is None:
            raise SaleNotFound
        item = sale.item(sku)
        if item is None:
            raise SkuNotFound(sku=sku)
        deadlines = await self._store.first_deadlines(sale_id, SCANNED_MAX)
        leases = await self._store.first_leases(sale_id, SCANNED_MAX)
        return SkuWhy(
            sale_id=sale_id,
            item=item,
            holders=tuple(await self._sql.orders.list_holders(sale_id, sku, ROWS_MAX)),
            next_deadlines=await self._of_item(deadlines, sku),
            undecided=await self._of_item(leases, sku),
        )

    async def _read_sale(self, sale_id: str) -> Sale | None:
        if await self._catalog.knows(sale_id) and self._catalog.is_retired(sale_id):
            return (await self._catalog.fresh(sale_id)).sale
        return await self._sales.read(sale_id)

    async def _of_item(self, until: dict[str, int], sku: str) -> tuple[Waiting, ...]:
        """The orders with the item, except those that SQL has in a later state."""
        orders = await self._store.read_many(list(until))
        found = [
            Waiting(
                order_id=order.order_id,
                buyer_id=order.buyer_id,
                status=order.status,
                quantity=line.quantity,
                since_ms=order.claimed_at_ms or order.created_at_ms,
                until_ms=until[order.order_id],
            )
            for order in orders
            if order is not None
            for line in order.lines
            if line.sku == sku and (await self._queries.now(order)).status is order.status
        ]
        return tuple(found[:ROWS_MAX])

    async def next_step(self, order: Reservation) -> str:
        """The next step of an order, in one sentence."""
        match order.status:
            case Status.HELD | Status.PREPARED:
                return await self._awaiting_buyer(order)
            case Status.CONFIRMING:
                return await self._confirming(order)
            case Status.AWAITING_DEPOSIT:
                return self._awaiting_deposit(order)
            case Status.CONFIRMED:
                return await self._sold(order)
            case Status.RELEASED | Status.EXPIRED:
                return (
                    f"{order.status.value}: the stock is released; only its buyer, returning "
                    "from the PG while the sale is open, can hold the basket again."
                )
            case Status.REFUNDED:
                return await self._refunded(order)

    def _awaiting_deposit(self, order: Reservation) -> str:
        due = as_wire(order.expires_at_ms)
        overdue_ms = self._clock.now_ms() - order.expires_at_ms
        if overdue_ms < self._limits.alarm_seconds * 1000:
            return (
                "AWAITING_DEPOSIT: becomes CONFIRMED with the deposit; the settler cancels the "
                f"account after {due} and releases the stock."
            )
        return (
            f"AWAITING_DEPOSIT: the account was due at {due}, and the PG has neither cancelled it"
            " nor shown it as paid; the settler asks the PG again every 30 s or sooner. The"
            " history has the PG's answers."
        )

    async def _sold(self, order: Reservation) -> str:
        refund = await self._sql.refunds.get(order.order_id)
        if refund is None or refund.status == "done":
            return "CONFIRMED: sold; only a refund changes it."
        if refund.status == "refused":
            return (
                f"CONFIRMED: the PG refused its refund with {refund.code}; the order stays sold "
                "until a new refund is requested."
            )
        answered = f"; the PG's last answer was {refund.code}" if refund.code else ""
        return (
            f"CONFIRMED: a refund by {refund.operator} is pending since "
            f"{as_wire(refund.created_at_ms)}{answered}; the worker retries it at least every 30 "
            "s."
        )

    async def _refunded(self, order: Reservation) -> str:
        payment = await self._sql.payments.get(order.payment_key or "")
        account = payment.virtual_account if payment else None
        match account.refund_status if account else None:
            case "FAILED" | "PARTIAL_FAILED" as failed:
                return (
                    f"REFUNDED: the PG cancelled the payment, but the bank transfer is {failed}: "
                    "the buyer has not received the refund. Correct the account in the PG's "
                    "console."
                )
            case "PENDING":
                return (
                    "REFUNDED: the PG cancelled the payment; the bank transfer to the buyer "
                    "takes up to two days."
                )
            case _:
                return "REFUNDED: the payment was refunded; this state is final."

    async def _awaiting_buyer(self, order: Reservation) -> str:
        at = as_wire(order.expires_at_ms)
        sale = await self._sales.read(order.sale_id)
        holds = sale is None or sale.hold_policy is HoldPolicy.PREPARE
        stock = "the stock is held" if holds else "no stock is held"
        if order.expires_at_ms <= self._clock.now_ms():
            return (
                f"{order.status.value}: its deadline passed at {at}; the reaper expires it "
                "within a second unless its buyer returns from the PG first."
            )
        return f"{order.status.value}: {stock} until {at}, or until its buyer pays or releases it."

    async def _confirming(self, order: Reservation) -> str:
        lease_end = await self._store.lease_end(order)
        claimed_at = order.claimed_at_ms or order.updated_at_ms
        earliest = claimed_at + round(self._limits.window_closed_seconds * 1000)
        when = f"at {as_wire(lease_end)}" if lease_end else "never: it is not in `confirming`"
        if lease_end and lease_end <= self._clock.now_ms():
            when = "in its next round"
        return (
            f"CONFIRMING under fence {order.fence}: the settler asks the PG {when}; the stock is "
            f"released at {as_wire(earliest)} at the earliest if the PG shows no payment, or at "
            "once if it declined."
        )
