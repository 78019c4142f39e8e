"""The operator of a simulated sale: opens it, meddles with it, and looks at it in the end."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

from reservation.bootstrap import Service
from tests.simulation.clients import PG, Client, Town
from tests.simulation.determined import EPOCH_MS
from tests.simulation.plans import Plan

__all__ = ["Operator"]

_PAGE = 100


class Operator(Client):
    """Has the operators' key."""

    def __init__(self, town: Town, plan: Plan, draw: random.Random) -> None:
        super().__init__(town, "operator", draw)
        self._plan = plan
        key = f"Bearer {town.settings.admin_api_key}".encode()
        self._rights = ((b"authorization", key), (b"x-operator", b"simulation"))
        self._admin = f"/v1/admin/sales/{town.sale_id}"

    async def open(self) -> None:
        """Make the sale, and wait until it can be seen."""
        plan = self._plan
        now = datetime.fromtimestamp(EPOCH_MS / 1000, tz=UTC)
        sale = {
            "name": "A simulated sale",
            "currency": "KRW",
            "opensAt": (now - timedelta(minutes=1)).isoformat(),
            "closesAt": (now + timedelta(days=1)).isoformat(),
            "holdSeconds": plan.hold_seconds,
            "holdPolicy": plan.hold_policy,
            "virtualAccounts": plan.virtual_accounts,
            "items": [
                {"sku": sku, "name": sku, "price": price, "total": total, "limitPerBuyer": limit}
                for sku, price, total, limit in plan.items
            ],
        }
        answer = await self.call_until_sure("PUT", self._admin, sale, *self._rights)
        if answer.status not in (200, 201):
            self.town.wrong.append(f"the sale could not be made: {answer}")

    async def meddle(self) -> None:
        """Restock, pause, refund, while the sale goes on."""

    async def all_done(self, service: Service) -> bool:
        """Whether nothing is held, undecided or on its way any more."""
        sale_id = self.town.sale_id
        counters = await service.sale_store.counters(sale_id)
        if counters is None:
            return False
        held = sum(held for _, _, held, _ in counters.stocks.values())
        flushed, _ = await service.ledger.cursor(sale_id)
        pending = await service.ledger.pending_refunds(1)
        undecided = await service.store.undecided(sale_id)
        deadlines = await service.store.first_deadlines(sale_id, 1)
        return not (held or pending or undecided or deadlines or flushed < counters.seq)

    async def ledger(self) -> list[dict[str, Any]]:
        """The PG's."""
        answer = await self.call("GET", "/_ledger", to=PG)
        return answer.body["entries"]

    async def audit(self) -> dict[str, Any]:
        return (await self.call("GET", f"{self._admin}/audit", None, *self._rights)).body

    async def orders(self) -> list[dict[str, Any]]:
        """All of them, as SQL has them."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            query = f"?saleId={self.town.sale_id}&limit={_PAGE}"
            more = "" if cursor is None else f"&cursor={cursor}"
            path = f"/v1/admin/orders{query}{more}"
            page = (await self.call("GET", path, None, *self._rights)).body
            found += page["orders"]
            cursor = page["nextCursor"]
            if cursor is None:
                return found
