"""After a restore amid any history no unit is sold twice, and all money has an order or a name."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import pytest

from reservation.domain.errors import ReservationError
from reservation.domain.payment import Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from reservation.domain.states import Status
from reservation.workers.refunder import Refunder
from tests.faults.payments.shop import kept_money, refund_wish
from tests.support.in_process import Bench
from tests.support.restores import RestoredShop

TOTAL = 12
ITEMS = (Item(sku="a", name="A", price=1000, total=TOTAL, limit_per_buyer=20),)
REASON = ("--reason", "checked")
STEPS = 14
PATIENCE_SECONDS = 60.0
OPENINGS_MAX = 3


class History:
    """Random steps of buyers, operators, the gateway and the workers."""

    def __init__(self, shop: RestoredShop, random: Random) -> None:
        self.shop = shop
        self.sandbox = shop.sandbox
        self.random = random
        self.orders: list[Reservation] = []
        self.steps: list[Callable[[Bench], Awaitable[None]]] = [
            self.hold,
            self.hold,
            self.pay,
            self.pay,
            self.pay,
            self.pay_without_an_answer,
            self.release,
            self.refund,
            self.cancel_in_the_console,
            self.approve_elsewhere,
            self.flush,
        ]

    async def begin(self, here: Bench) -> None:
        self.sale_id = await here.sale(items=ITEMS)
        await self.go_on(here)

    async def go_on(self, here: Bench) -> None:
        await here.service.redis_monitor.check_redis()
        for _ in range(STEPS):
            await self.random.choice(self.steps)(here)

    async def some(self, here: Bench, *statuses: Status) -> Reservation | None:
        """An order that is in one of these states now."""
        candidates = list(self.orders)
        self.random.shuffle(candidates)
        for order in candidates:
            found = await here.service.store.read(order.order_id)
            if found is not None and found.status in statuses:
                return found
        return None

    async def hold(self, here: Bench) -> None:
        buyer = f"buyer-{self.random.randrange(5)}"
        try:
            self.orders.append(await here.hold(self.sale_id, buyer))
        except ReservationError:
            return  # Sold out.

    async def pay(self, here: Bench) -> None:
        order = await self.some(here, Status.HELD, Status.EXPIRED)
        if order is None:
            return
        key = self.sandbox.put_payment(order.order_id, order.amount)
        try:
            await here.service.confirmation.confirm(order, payment_key=key, may_claim=True)
        except ReservationError:
            return  # An expired order whose unit is gone.

    async def pay_without_an_answer(self, here: Bench) -> None:
        """The gateway takes the money, and its answer is lost."""
        order = await self.some(here, Status.HELD)
        if order is not None:
            self.sandbox.order_fault(
                "error_after_commit", orderId=order.order_id, operations=["confirm"], times=1
            )
            self.sandbox.order_fault(
                "error_before_commit", orderId=order.order_id, operations=["look_up"]
            )
            key = self.sandbox.put_payment(order.order_id, order.amount)
            await here.service.confirmation.confirm(order, payment_key=key, may_claim=True)

    async def release(self, here: Bench) -> None:
        order = await self.some(here, Status.HELD)
        if order is not None:
            await here.service.releases.release(order, reason=Reason(Cause.BUYER))

    async def refund(self, here: Bench) -> None:
        order = await self.some(here, Status.CONFIRMED)
        if order is not None:
            await here.flush(self.sale_id)
            await here.service.refunds.refund(refund_wish(order))

    async def cancel_in_the_console(self, here: Bench) -> None:
        order = await self.some(here, Status.CONFIRMED)
        if order is not None and order.payment_key is not None:
            self.sandbox.cancel(order.payment_key)

    async def approve_elsewhere(self, _: Bench) -> None:
        """A payment that no intent of the service announced."""
        if self.orders and self.random.random() < 0.3:
            order = self.random.choice(self.orders)
            key = self.sandbox.put_payment(order.order_id, order.amount)
            self.sandbox.confirm(key, order.order_id, order.amount)

    async def flush(self, here: Bench) -> None:
        await here.flush(self.sale_id)

    @property
    def money(self) -> dict[str, dict[str, Any]]:
        """The payments that still have money, by key."""
        payments = self.sandbox.ledger()["payments"]
        return {
            one["paymentKey"]: one
            for one in payments
            if one["status"] in ("DONE", "PARTIAL_CANCELED") and one["balanceAmount"]
        }


async def work(here: Bench, sale_id: str) -> None:
    """One round of each worker."""
    service = here.service
    await service.redis_monitor.check_redis()
    await here.flush(sale_id)
    await service.orphaned_payments.run_once()
    await service.recheck.run_once()
    await Refunder(service.sql, service.refunds, clock=service.clock).run_once()
    for order_id in await service.store.leases_over(sale_id, 50):
        await service.settlement.settle(order_id)
    await here.flush(sale_id)


async def settle(here: Bench, sale_id: str) -> None:
    """Rounds of the workers until no payment and no hold is open."""
    service = here.service
    await service.redis_monitor.check_redis()
    epoch = (await service.catalog.fresh(sale_id)).epoch
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            await work(here, sale_id)
            if due := await service.store.due(sale_id, 50):
                await service.store.expire(sale_id, due, epoch=epoch)
            elif not await service.store.leases_over(sale_id, 50):
                break
    await here.flush(sale_id)


async def sell_out(here: Bench, sale_id: str) -> int:
    await here.service.redis_monitor.check_redis()
    count = 0
    while True:
        try:
            await here.hold(sale_id, f"later-{count}")
        except ReservationError:
            return count
        count += 1


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_no_unit_is_sold_twice_and_no_money_is_forgotten(
    restored_shop: RestoredShop, seed: int
) -> None:
    shop, random = restored_shop, Random(seed)
    history = History(shop, random)
    shop.run(history.begin)
    shop.command("backup", str(shop.file))
    shop.run(history.go_on)
    sale_id = history.sale_id

    async def sold_now(here: Bench) -> list[Reservation]:
        found = [await here.service.store.read(order.order_id) for order in history.orders]
        return [order for order in found if order and order.status is Status.CONFIRMED]

    paid = [order for order in shop.run(sold_now) if kept_money(shop.sandbox, order)]
    shop.sandbox.clear_faults()
    if random.random() < 0.5:
        shop.lose_redis()
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), *REASON)
    if random.random() < 0.5:
        # The service was started before the comparison.
        shop.run(lambda here: work(here, sale_id))

    respond(shop, sale_id)
    charged = history.money.keys()
    shop.run(lambda here: settle(here, sale_id))
    assert history.money.keys() == charged

    report = shop.command("restore", "compare", "--json", status=None).stdout

    async def check(here: Bench) -> None:
        service = here.service
        names = {one.payment_key for one in await service.sql.differences.list_open()}
        for key, payment in history.money.items():
            order = await service.store.read(payment["orderId"])
            is_sold = order is not None and order.status is Status.CONFIRMED
            assert (is_sold and order is not None and order.payment_key == key) or key in names, (
                payment, order, report,
            )  # fmt: skip
        sold = {order.order_id for order in await sold_now(here)}
        for order_id in sold:
            order = await service.store.read(order_id)
            assert order is not None
            assert order.payment_key in history.money or order.payment_key in names
        owed = sold | {order.order_id for order in paid}
        assert len(owed) + await sell_out(here, sale_id) <= TOTAL
        await here.flush(sale_id)

    shop.run(check)


def respond(shop: RestoredShop, sale_id: str) -> None:
    """The operator's steps of the how-to page."""
    withdrawn: set[str] = set()
    shop.command("restore", "compare", status=None)
    shop.command("rebuild", sale_id)
    for _ in range(OPENINGS_MAX):
        shop.run(lambda here: settle(here, sale_id))
        report = shop.answer("restore", "compare", status=None)

        async def settle_each(here: Bench, report: dict[str, Any] = report) -> None:
            await here.service.redis_monitor.check_redis()
            for one in report["differences"]:
                order = await here.service.store.read(one["orderId"])
                if one["kind"] == "given_back" and order is not None:
                    await here.service.refunds.refund(refund_wish(order))
            await settle(here, sale_id)
            lost = {one["orderId"] for one in report["differences"] if needs_units(one)}
            for order_id in sorted(lost - withdrawn):
                withdrawn.add(order_id)
                await here.service.sales.restock(
                    sale_id,
                    sku="a",
                    delta=-1,
                    reason="sold before the restore",
                    idempotency_key=secrets.token_hex(8),
                    operator="op",
                )
            await here.flush(sale_id)

        shop.run(settle_each)
        if getattr(shop.invoke("restore", "open", *REASON).exception, "status", 0) == 0:
            return
    pytest.fail("the sales were not opened")


def needs_units(difference: dict[str, Any]) -> bool:
    return difference["kind"] == "unknown_order"
