"""Administration of sales: create, update, restock, pause, resume, close."""

import asyncio
import hashlib
from collections.abc import Collection
from typing import Final

from reservation.adapters.redis.sale_store import SaleStore
from reservation.adapters.sql.store import SqlStore
from reservation.application.sales.catalog import CachedSale, Catalog
from reservation.application.sales.listing import SaleList, SalePage
from reservation.domain.clock import Clock
from reservation.domain.errors import (
    InvalidSale,
    PreconditionFailed,
    PreconditionRequired,
    SaleClosed,
    SaleNotFound,
    SaleRecovering,
    UpgradeInProgress,
)
from reservation.domain.levels import LEVEL_OF_PRESENTATION
from reservation.domain.payment_gateway import GatewayLimits
from reservation.domain.sale import ETAG_EPOCH_CHARS, Sale
from reservation.domain.sale_settings import (
    SaleDefinition,
    digest_of,
    document_of,
    event_data_of,
    needs_upgrade,
    restock_digest_of,
    settings_of,
)
from reservation.domain.states import SaleStatus, Visibility

__all__ = ["SaleAdministration"]

#: A creation older than this has reached Redis or never will: its call is refused there after five
#: seconds.
CREATION_SECONDS_MAX: Final = 10
#: Polls for a creation that another process has begun, and the pause between two.
CREATION_POLLS_MAX: Final = 10
CREATION_POLL_SECONDS: Final = 0.05


class SaleAdministration:
    """Creates and changes sales; each change is an event with its operator and reason."""

    def __init__(
        self,
        catalog: Catalog,
        store: SaleStore,
        sql: SqlStore,
        payments: GatewayLimits,
        *,
        clock: Clock,
    ) -> None:
        self._payments = payments
        self._catalog = catalog
        self._store = store
        self._sql = sql
        self._list = SaleList(store, catalog.is_retired, clock=clock)
        self._clock = clock

    async def page(
        self,
        cursor: str | None,
        limit: int,
        *,
        now_ms: int,
        visibilities: Collection[Visibility] = (Visibility.PUBLIC,),
        status: SaleStatus | None = None,
    ) -> SalePage:
        """A page of the list of sales (`SaleList.page`)."""
        return await self._list.page(
            cursor, limit, now_ms=now_ms, visibilities=visibilities, status=status
        )

    async def put(
        self, sale_id: str, change: SaleDefinition, *, if_match: str | None, operator: str
    ) -> tuple[Sale, bool]:
        """Create or update a sale; returns the sale and whether it is new.

        Args:
            if_match: the `Sale.etag` that the operator read; required to update, None to create.

        Raises:
            InvalidSale, TotalTooLow, PreconditionRequired, PreconditionFailed, SaleRecovering.
            SaleClosed: the sale is retired.
            UpgradeInProgress: processes of release 0.1.0 may run, which cannot read the definition.
        """
        change.check(self._payments)
        if needs_upgrade(change) and not await self._may_present():
            raise UpgradeInProgress
        try:
            known = await self._existing(sale_id)
            if known is None:
                if if_match is not None:
                    raise PreconditionFailed
                await self._create(sale_id, change, operator)
        except SaleRecovering:
            if if_match is not None or not await self._create_again(sale_id, change, operator):
                raise
            return await self._changed(sale_id), True
        if known is None:
            return await self._changed(sale_id), True
        _require_live(known)
        if change.visibility is Visibility.DRAFT and known.sale.visibility is not Visibility.DRAFT:
            # Its buyers may have holds, which a draft would hide from them.
            raise InvalidSale("A published sale cannot become a draft; pause or unlist it.")
        if if_match is None:
            await self._repeat_of_create(sale_id, known, change, operator)
        else:
            await self._update(sale_id, known, change, if_match, operator)
        return await self._changed(sale_id), False

    async def _may_present(self) -> bool:
        return await self._sql.installation.level() >= LEVEL_OF_PRESENTATION

    async def _changed(self, sale_id: str) -> Sale:
        """The sale after a change, read past the caches of the catalog and the list."""
        self._list.expire()
        return (await self._catalog.fresh(sale_id)).sale

    async def _existing(self, sale_id: str) -> CachedSale | None:
        try:
            return await self._catalog.fresh(sale_id)
        except SaleNotFound:
            return None

    async def _create(self, sale_id: str, change: SaleDefinition, operator: str) -> None:
        # SQL first: from then on a sale that Redis loses is detected, never created again.
        epoch, made = await self._sql.sales.register(
            sale_id,
            document_of(change),
            self._clock.now_ms(),
        )
        self._catalog.learn(sale_id, epoch)
        if not made:
            await self._wait_for_creation(sale_id)
        await self._store.announce(sale_id)
        await self._put(sale_id, change, epoch=epoch, version=0, leaving=[], operator=operator)

    async def _wait_for_creation(self, sale_id: str) -> None:
        """Wait for another process's creation of the same sale.

        Raises:
            SaleRecovering: it does not reach Redis, or was lost there.
        """
        for _ in range(CREATION_POLLS_MAX):
            if await self._store.exists(sale_id):
                return
            await asyncio.sleep(CREATION_POLL_SECONDS)
        raise SaleRecovering(retryAfter=CREATION_SECONDS_MAX)

    async def _create_again(self, sale_id: str, change: SaleDefinition, operator: str) -> bool:
        """Finish a creation that reached SQL and never Redis; whether this was one.

        It may have reached Redis and been lost together with its first holds: the new epoch makes
        the tokens of those holds `hold_lost`. An event or an intent in SQL shows that the sale
        began; then only a rebuild may restore it.
        """
        document = document_of(change)
        made_before_ms = self._clock.now_ms() - CREATION_SECONDS_MAX * 1000
        epoch = await self._sql.sales.renew_unbegun(sale_id, document, made_before_ms)
        if epoch is None:
            return False
        self._catalog.learn(sale_id, epoch)
        await self._store.announce(sale_id)
        await self._put(sale_id, change, epoch=epoch, version=0, leaving=[], operator=operator)
        self._catalog.reopen(sale_id)
        return True

    async def _repeat_of_create(
        self, sale_id: str, known: CachedSale, change: SaleDefinition, operator: str
    ) -> None:
        # An identical creation is a retry after a lost reply; anything else needs If-Match.
        if known.sale.version != 1:
            raise PreconditionRequired
        await self._put(
            sale_id, change, epoch=known.epoch, version=0, leaving=[], operator=operator
        )

    async def _update(
        self, sale_id: str, known: CachedSale, change: SaleDefinition, if_match: str, operator: str
    ) -> None:
        version, _, epoch = if_match.removeprefix("v").partition(".")
        # Versions restart if a rebuild did not get all of them.
        if epoch != known.epoch[:ETAG_EPOCH_CHARS] or not version.isdecimal():
            raise PreconditionFailed
        wanted = {item.sku for item in change.items}
        leaving = [item.sku for item in known.sale.items if item.sku not in wanted]
        await self._put(
            sale_id,
            change,
            epoch=known.epoch,
            version=int(version),
            leaving=leaving,
            operator=operator,
        )

    async def _put(
        self,
        sale_id: str,
        change: SaleDefinition,
        *,
        epoch: str,
        version: int,
        leaving: list[str],
        operator: str,
    ) -> None:
        await self._store.put(
            sale_id,
            epoch=epoch,
            version=version,
            digest=digest_of(change, operator),
            settings=settings_of(change),
            items=change.items,
            leaving=leaving,
            data=event_data_of(change, version=version + 1, epoch=epoch, operator=operator),
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
        """Add units of an item, or withdraw available units; idempotent by key."""
        known = await self._catalog.get(sale_id)
        _require_live(known)
        digest = restock_digest_of(sku, delta, reason)
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
        return await self._changed(sale_id)

    async def switch(self, sale_id: str, status: SaleStatus, *, reason: str, operator: str) -> Sale:
        """Pause, resume or close a sale."""
        known = await self._catalog.get(sale_id)
        if known.is_retired and status is SaleStatus.CLOSED:
            return known.sale
        _require_live(known)
        await self._store.switch(
            sale_id, epoch=known.epoch, status=status, operator=operator, reason=reason
        )
        return await self._changed(sale_id)


def _require_live(known: CachedSale) -> None:
    if known.is_retired:
        raise SaleClosed("The sale is archived and cannot be changed.")
