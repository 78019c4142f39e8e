"""Repair: restores damaged records of a sale from its events, the source of truth.

    freeze        Redis has the sale under an epoch known only to this repair: no script changes it
    drain         every event of its outbox goes to SQL, so that the next step loses nothing
    restore       the sale is rebuilt from SQL, every record of it, and sells again
    audit         the remaining problems are not about records: money, or a broken chain

It may crash anywhere: then the sale is `recovering`, and `rebuild` completes it.
"""

import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
import structlog

from reservation.adapters.redis.fences import REPAIRING_EPOCH
from reservation.adapters.redis.sale_writer import SaleWriter
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.audit import Audit
from reservation.application.recovery.rebuild import Rebuild
from reservation.domain.errors import SaleNotFound, SaleRecovering

__all__ = ["NotDrained", "Repair", "RepairReport"]

log = structlog.get_logger(__name__)


class NotDrained(Exception):
    """SQL does not take an event of the sale: a repair would lose the events after it."""


class RepairReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result of a repair."""

    sale_id: str
    #: The audit's problems before.
    problems: tuple[str, ...]
    #: Whether the sale was rebuilt.
    repaired: bool
    #: The audit's problems now; the same ones if nothing was done.
    left: tuple[str, ...]
    #: Orders that were restored.
    orders: int = 0


class Repair:
    """Repairs sales."""

    def __init__(self, audit: Audit, rebuild: Rebuild, restorer: SaleWriter, sql: SqlStore) -> None:
        self._audit = audit
        self._rebuild = rebuild
        self._restorer = restorer
        self._sql = sql

    async def run(
        self, sale_id: str, *, operator: str, drain: Callable[[str], Awaitable[None]] | None
    ) -> RepairReport:
        """Audit a sale and repair it.

        Args:
            sale_id: the sale.
            operator: who requested it; recorded.
            drain: writes every event of the sale to SQL; None for an audit without a repair.

        Raises:
            SaleNotFound: neither Redis nor SQL has it.
            SaleRecovering: it is lost, not damaged: it waits for a rebuild.
            NotDrained: SQL does not take every event. The sale continues unchanged.
        """
        problems = (await self._audit.run(sale_id)).problems
        if not problems or drain is None:
            return RepairReport(sale_id=sale_id, problems=problems, repaired=False, left=problems)
        await self._drain_to_sql(sale_id, drain)
        rebuilt = await self._rebuild.run(sale_id, operator=operator, force=True)
        left = (await self._audit.run(sale_id)).problems
        log.warning("sale_repaired", sale_id=sale_id, problems=len(problems), left=len(left))
        return RepairReport(
            sale_id=sale_id, problems=problems, repaired=True, left=left, orders=rebuilt.orders
        )

    async def _drain_to_sql(self, sale_id: str, drain: Callable[[str], Awaitable[None]]) -> None:
        head = (await self._sql.sales.heads()).get(sale_id)
        if head is None:
            raise SaleNotFound
        found = await self._restorer.read_head(sale_id, head.seq)
        if found is None or found.epoch != head.epoch:
            raise SaleRecovering(retryAfter=0)
        repair_epoch = f"{REPAIRING_EPOCH}{secrets.token_hex(4)}:{head.epoch}"
        await self._restorer.fence_off(sale_id, {}, epoch=repair_epoch, instead_of=head.epoch)
        try:
            await drain(sale_id)
            found = await self._restorer.read_head(sale_id, head.seq)
            written = (await self._sql.sales.heads())[sale_id].seq
            if found is None or written != found.seq:
                raise NotDrained(
                    f"{sale_id}: SQL has event {written} and accepts no later one; `reservation "
                    f"rebuild {sale_id} --force` discards the later events"
                )
        except BaseException:
            # Reopen the sale, damaged as it was; a rebuild that has begun meanwhile keeps it.
            with suppress(SaleRecovering):
                await self._restorer.fence_off(
                    sale_id, {}, epoch=head.epoch, instead_of=repair_epoch
                )
            raise
