"""Orders with a tombstone: reads them from SQL, and restores one before a script changes it."""

from collections.abc import Collection, Iterable, Sequence

from reservation.adapters.redis.script_results import RestoreOrderWord
from reservation.adapters.redis.tombstones import Tombstone, TombstoneStore
from reservation.adapters.sql.orders import OrderRow
from reservation.adapters.sql.store import SqlStore
from reservation.application.audit.expected_records import order_fields, tombstone_of
from reservation.domain.alarms import Alarm
from reservation.domain.errors import HoldLost, SaleRecovering
from reservation.domain.ids import sale_of
from reservation.telemetry.metrics import alarm

__all__ = ["TombstonedOrders"]


class TombstonedOrders:
    """Reads orders that have a tombstone, and restores one before it changes.

    Args:
        store: the tombstones.
        sql: the orders.
        keep_ms: time from an order's deadline to its tombstone.
    """

    def __init__(self, store: TombstoneStore, sql: SqlStore, *, keep_ms: int) -> None:
        self.store = store
        self._sql = sql
        self.keep_ms = keep_ms

    async def rows(self, order_ids: Collection[str]) -> tuple[list[OrderRow], list[str]]:
        """Those of these orders that have a tombstone, and those whose state is unclear.

        An order of the second kind is in SQL, and Redis has no tombstone of this state: it was
        restored or replaced just now, or Redis has lost it.
        """
        sales = {sale_of(order_id) or "" for order_id in order_ids}
        with_tombstones = await self.store.seqs(sorted(sales))
        wanted = [one for one in order_ids if sale_of(one) in with_tombstones]
        if not wanted:
            return [], []
        found: list[OrderRow] = []
        unclear: list[str] = []
        rows = await self._sql.orders.get_many(wanted)
        texts = await self._texts(rows)
        for row in rows:
            expected = tombstone_of(row)
            if expected is not None and texts.get(row.order_id) == expected.text:
                found.append(row)
            else:
                unclear.append(row.order_id)
        return found, unclear

    async def count_of_buyer(self, sale_id: str, buyer_id: str) -> int:
        """The number of the buyer's tombstones in this sale."""
        return await self.store.count_of_buyer(sale_id, buyer_id)

    async def of_buyer(self, sale_id: str, buyer_id: str, limit: int) -> list[OrderRow]:
        """The buyer's orders with a tombstone in this sale, newest first, of the last `limit`."""
        rows, _ = await self._sql.orders.page(sale_id=sale_id, buyer_id=buyer_id, limit=limit)
        texts = await self._texts(rows)
        return [
            row
            for row in rows
            if (expected := tombstone_of(row)) and texts.get(row.order_id) == expected.text
        ]

    async def report(self, order_ids: Iterable[str]) -> None:
        """Raise an alarm for each of these orders whose tombstone is not SQL's state."""
        rows = await self._sql.orders.get_many(list(order_ids))
        texts = await self._texts(rows)
        for row in rows:
            expected, text = tombstone_of(row), texts.get(row.order_id)
            if text is not None and (expected is None or text != expected.text):
                _alarm(row, text)

    async def restore(self, order_id: str, *, epoch: str) -> bool:
        """Replace the order's tombstone by its hash; False if Redis has neither.

        Raises:
            SaleRecovering: the tombstone is damaged, or SQL has another state of the order.
        """
        rows = await self._sql.orders.get_many([order_id])
        if not rows:
            return False
        [row] = rows
        expected = tombstone_of(row)
        if expected is None:
            # A script refuses the order's text below; an order without a tombstone is lost.
            expected = Tombstone(order_id=order_id, buyer_id=row.buyer_id, text="")
        try:
            word = await self.store.restore(
                row.sale_id,
                expected,
                order_fields(row, ()),
                created_at_ms=row.created_at_ms,
                epoch=epoch,
            )
        except HoldLost:
            return False
        if word is RestoreOrderWord.DIFFERS:
            _alarm(row, (await self._texts(rows)).get(order_id, ""))
            raise SaleRecovering
        return True

    async def replace(self, order_id: str, *, epoch: str) -> None:
        """Replace the order by its tombstone again, if no script has changed it since."""
        rows = await self._sql.orders.list_never_claimed([order_id])
        for row in rows:
            if tombstone := tombstone_of(row):
                await self.store.add(row.sale_id, [tombstone], epoch=epoch, keep_ms=self.keep_ms)

    async def _texts(self, rows: Sequence[OrderRow]) -> dict[str, str]:
        texts: dict[str, str] = {}
        for sale_id in {row.sale_id for row in rows}:
            wanted = [(row.order_id, row.buyer_id) for row in rows if row.sale_id == sale_id]
            texts |= await self.store.read(sale_id, wanted)
        return texts


def _alarm(row: OrderRow, text: str) -> None:
    alarm(
        Alarm.BROKEN_INVARIANT,
        order_id=row.order_id,
        reason=f"its tombstone is {text!r}, SQL has {row.status} at event {row.seq}",
    )
