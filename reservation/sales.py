"""The operator's changes of a sale: create, update, restock, pause, resume, close."""

import hashlib

import msgspec

from reservation.catalog import Catalog, Known
from reservation.domain.clock import Clock
from reservation.domain.errors import (
    InvalidSale,
    PreconditionFailed,
    PreconditionRequired,
    SaleNotFound,
)
from reservation.domain.sale import AMOUNT_MAX, TOTAL_MAX, Item, Sale
from reservation.domain.states import HoldPolicy, SaleStatus
from reservation.persistence.ledger import Ledger
from reservation.redis.sales import SaleStore

__all__ = ["SaleChange", "Sales"]

#: Items in one sale: every one of them is read for each look at the sale.
ITEMS_MAX = 200
#: The shortest hold in which a buyer can type a card number, and the longest that a flash sale has
#: use for: the PG's own page lives 30 minutes and its authentication 10.
HOLD_SECONDS_LEAST = 1
HOLD_SECONDS_MOST = 24 * 3600


class SaleChange(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator wants a sale to be."""

    name: str
    currency: str
    opens_at_ms: int
    closes_at_ms: int
    hold_seconds: int
    hold_policy: HoldPolicy
    virtual_accounts: bool
    require_admission: bool
    items: tuple[Item, ...]

    def check(self) -> None:
        """Raises `InvalidSale`, naming the first thing that is wrong."""
        if self.closes_at_ms <= self.opens_at_ms:
            raise InvalidSale("closesAt must be later than opensAt.")
        if not HOLD_SECONDS_LEAST <= self.hold_seconds <= HOLD_SECONDS_MOST:
            raise InvalidSale(
                f"holdSeconds must be from {HOLD_SECONDS_LEAST} to {HOLD_SECONDS_MOST}."
            )
        if not 1 <= len(self.items) <= ITEMS_MAX:
            raise InvalidSale(f"A sale has from 1 to {ITEMS_MAX} items.")
        if len({item.sku for item in self.items}) != len(self.items):
            raise InvalidSale("Two items have the same sku.")
        for item in self.items:
            if not 0 <= item.total <= TOTAL_MAX:
                raise InvalidSale(f"total must be from 0 to {TOTAL_MAX}.", sku=item.sku)
            if not 1 <= item.price <= AMOUNT_MAX:
                raise InvalidSale(f"price must be from 1 to {AMOUNT_MAX}.", sku=item.sku)
            if not 1 <= item.limit_per_buyer <= TOTAL_MAX:
                raise InvalidSale(f"limitPerBuyer must be from 1 to {TOTAL_MAX}.", sku=item.sku)


class Sales:
    """Creates and changes sales; each change is an event with who did it and why."""

    def __init__(self, catalog: Catalog, store: SaleStore, ledger: Ledger, *, clock: Clock) -> None:
        self._catalog = catalog
        self._store = store
        self._ledger = ledger
        self._clock = clock

    async def all(self) -> list[Sale]:
        """Every sale, by id."""
        found = [await self._store.read(sale_id) for sale_id in await self._store.ids()]
        return [sale for sale in found if sale is not None]

    async def put(
        self, sale_id: str, change: SaleChange, *, if_match: int | None, operator: str
    ) -> tuple[Sale, bool]:
        """Create or update a sale; the sale, and whether it is new.

        Args:
            if_match: the version that the operator read; needed to update, absent to create.

        Raises:
            InvalidSale, TotalTooLow, PreconditionRequired, PreconditionFailed, SaleRecovering.
        """
        change.check()
        known = await self._standing(sale_id)
        if known is None:
            if if_match is not None:
                raise PreconditionFailed
            await self._create(sale_id, change, operator)
        elif if_match is None:
            await self._repeat_of_create(sale_id, known, change, operator)
        else:
            await self._update(sale_id, known, change, if_match, operator)
        return (await self._catalog.fresh(sale_id)).sale, known is None

    async def _standing(self, sale_id: str) -> Known | None:
        try:
            return await self._catalog.fresh(sale_id)
        except SaleNotFound:
            return None

    async def _create(self, sale_id: str, change: SaleChange, operator: str) -> None:
        # SQL first: from then on a sale that Redis has lost is noticed, never made anew.
        epoch, _ = await self._ledger.register_sale(
            sale_id,
            msgspec.json.encode(change).decode(),
            self._clock.now_ms(),
        )
        self._catalog.forget(sale_id)
        await self._store.announce(sale_id)
        await self._put(sale_id, change, epoch=epoch, version=0, leaving=[], operator=operator)

    async def _repeat_of_create(
        self, sale_id: str, known: Known, change: SaleChange, operator: str
    ) -> None:
        # The very same creation again is a repeat after a lost reply; anything else needs If-Match.
        if known.sale.version != 1:
            raise PreconditionRequired
        await self._put(
            sale_id, change, epoch=known.epoch, version=0, leaving=[], operator=operator
        )

    async def _update(
        self, sale_id: str, known: Known, change: SaleChange, if_match: int, operator: str
    ) -> None:
        wanted = {item.sku for item in change.items}
        leaving = [item.sku for item in known.sale.items if item.sku not in wanted]
        await self._put(
            sale_id,
            change,
            epoch=known.epoch,
            version=if_match,
            leaving=leaving,
            operator=operator,
        )

    async def _put(
        self,
        sale_id: str,
        change: SaleChange,
        *,
        epoch: str,
        version: int,
        leaving: list[str],
        operator: str,
    ) -> None:
        digest = hashlib.sha256(msgspec.json.encode([change, operator])).hexdigest()[:32]
        await self._store.put(
            sale_id,
            epoch=epoch,
            version=version,
            digest=digest,
            settings=_settings(change),
            items=change.items,
            leaving=leaving,
            data=_event_data(change, version=version + 1, epoch=epoch, operator=operator),
        )

    async def restock(
        self,
        sale_id: str,
        *,
        sku: str,
        delta: int,
        reason: str,
        idempotency_key: str,
        operator: str,
    ) -> Sale:
        """Add units of an item, or withdraw units that nobody holds; idempotent by key."""
        known = await self._catalog.get(sale_id)
        digest = hashlib.sha256(msgspec.json.encode([sku, delta, reason])).hexdigest()[:32]
        operation = hashlib.sha256(idempotency_key.encode()).hexdigest()[:32]
        await self._store.restock(
            sale_id,
            epoch=known.epoch,
            operation=operation,
            digest=digest,
            sku=sku,
            delta=delta,
            members={"operator": operator, "reason": reason, "operation": operation},
        )
        return (await self._catalog.fresh(sale_id)).sale

    async def switch(self, sale_id: str, status: SaleStatus, *, reason: str, operator: str) -> Sale:
        """Pause, resume or close a sale."""
        known = await self._catalog.get(sale_id)
        await self._store.switch(
            sale_id, epoch=known.epoch, status=status, operator=operator, reason=reason
        )
        return (await self._catalog.fresh(sale_id)).sale


def _settings(change: SaleChange) -> dict[str, str]:
    return {
        "name": change.name,
        "currency": change.currency,
        "opens_at": str(change.opens_at_ms),
        "closes_at": str(change.closes_at_ms),
        "hold_seconds": str(change.hold_seconds),
        "hold_policy": change.hold_policy.value,
        "virtual_accounts": str(int(change.virtual_accounts)),
        "require_admission": str(int(change.require_admission)),
    }


def _event_data(change: SaleChange, *, version: int, epoch: str, operator: str) -> str:
    data = {
        "version": version,
        "name": change.name,
        "currency": change.currency,
        "opensAt": change.opens_at_ms,
        "closesAt": change.closes_at_ms,
        "holdSeconds": change.hold_seconds,
        "holdPolicy": change.hold_policy.value,
        "virtualAccounts": change.virtual_accounts,
        "requireAdmission": change.require_admission,
        "items": [
            {
                "sku": item.sku,
                "name": item.name,
                "price": item.price,
                "total": item.total,
                "limit": item.limit_per_buyer,
            }
            for item in change.items
        ],
        "epoch": epoch,
        "operator": operator,
    }
    return msgspec.json.encode(data).decode()
