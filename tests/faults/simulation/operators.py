"""Operator of a simulated sale: opens it, changes it, and reads it in the end."""

import random
from datetime import UTC, datetime, timedelta
from typing import Any

from reservation.bootstrap import Service
from tests.faults.simulation.clients import PG, Client, Town
from tests.faults.simulation.deterministic_os import EPOCH_MS
from tests.faults.simulation.plans import Plan

__all__ = ["Operator"]

_PAGE = 100


class Operator(Client):
    """The client with the operators' key."""

    def __init__(self, town: Town, plan: Plan, draw: random.Random) -> None:
        super().__init__(town, "operator", draw)
        self._plan = plan
        key = town.settings.admin_api_key
        self.credentials = {"Authorization": f"Bearer {key}", "X-Operator": "simulation"}
        self._admin = f"/v1/admin/sales/{town.sale_id}"

    async def open(self) -> None:
        """Create the sale, and wait until it is visible."""
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
        answer = await self.call_until_sure("PUT", self._admin, sale)
        if answer.status not in (200, 201):
            self.town.wrong.append(f"the sale could not be made: {answer}")

    async def meddle(self) -> None:
        """Restock, pause, refund, during the sale."""
        plan = self._plan
        for number in range(self.draw.randint(0, 5)):
            await self.pause(plan.seconds / 2)
            await self.draw.choice((self._restock, self._pause, self._refund))(number)

    async def _restock(self, number: int) -> None:
        sku = self.draw.choice(sorted(self.town.prices))
        wish = {"sku": sku, "delta": self.draw.choice((-2, -1, 1, 3)), "reason": "a count"}
        key = {"Idempotency-Key": f"restock-{number}"}
        await self.call_until_sure("POST", f"{self._admin}/stock", wish, key)

    async def _pause(self, _: int) -> None:
        for switch in ("pause", "resume"):
            path = f"{self._admin}/{switch}"
            await self.call_until_sure("POST", path, {"reason": "a look"})
            await self.pause(3.0)

    async def _refund(self, number: int) -> None:
        if not self.town.orders:
            return
        order = self.draw.choice(self.town.orders)["orderId"]
        wish = {"reason": "sent back", "restock": self.draw.random() < 0.5}
        key = {"Idempotency-Key": f"refund-{number}"}
        path = f"/v1/admin/orders/{order}/refund"
        await self.call_until_sure("POST", path, wish, key)

    async def tidy(self) -> None:
        """The PG is healthy again, and every buyer who can be served is."""
        await self.call("POST", f"{PG}/_faults", {"clear": True})
        await self.call("POST", f"{self._admin}/resume", {"reason": "the end"})

    async def all_done(self, service: Service) -> bool:
        """Whether nothing is held, undecided or in flight any more."""
        await self._pay_in()
        sale_id = self.town.sale_id
        counters = await service.sale_store.counters(sale_id)
        if counters is None:
            return False
        held = sum(held for _, _, held, _ in counters.stocks.values())
        flushed, _ = await service.sql.events.cursor(sale_id)
        pending = await service.sql.refunds.list_pending(1)
        undecided = await service.store.undecided(sale_id)
        deadlines = await service.store.first_deadlines(sale_id, 1)
        return not (held or pending or undecided or deadlines or flushed < counters.seq)

    async def _pay_in(self) -> None:
        """Make the missing deposits: an account lives for a week, longer than any run."""
        for payment_key in list(self.town.crowd.accounts):
            answer = await self.call("POST", f"{PG}/_deposits", {"paymentKey": payment_key})
            if answer.status == 200:
                self.town.crowd.accounts.remove(payment_key)

    async def ledger(self) -> list[dict[str, Any]]:
        """The PG's ledger."""
        answer = await self.call("GET", f"{PG}/_ledger")
        return answer.body["entries"]

    async def audit(self) -> dict[str, Any]:
        return (await self.call("GET", f"{self._admin}/audit")).body

    async def orders(self) -> list[dict[str, Any]]:
        """All orders in SQL."""
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            query = f"?saleId={self.town.sale_id}&limit={_PAGE}"
            more = "" if cursor is None else f"&cursor={cursor}"
            path = f"/v1/admin/orders{query}{more}"
            page = (await self.call("GET", path)).body
            found += page["orders"]
            cursor = page["nextCursor"]
            if cursor is None:
                return found
