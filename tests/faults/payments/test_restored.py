"""After a restore no unit is sold twice, and each payment is assigned to its order or named."""

import asyncio
from typing import Any

import pytest

from reservation.application.payments import orphaned
from reservation.application.reconciliation import comparison
from reservation.domain.alarms import Alarm
from reservation.domain.errors import ReservationError, SaleNotFound, Unavailable
from reservation.domain.ids import sale_of
from reservation.domain.payment_gateway import Answer, TryAgain
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from reservation.domain.states import Status
from tests.faults.payments.shop import current_status, kept_money, raising, sold
from tests.support.in_process import Bench
from tests.support.restores import RestoredShop

ITEMS = (Item(sku="a", name="A", price=1000, total=4, limit_per_buyer=10),)
REASON = ("--reason", "checked")
PATIENCE_SECONDS = 40.0


class Story:
    """Orders before and after a backup."""

    def __init__(self, shop: RestoredShop) -> None:
        self.shop = shop
        self.sale_id, self.before, self.held = shop.run(self._sell)
        shop.command("backup", str(shop.file))
        self.after = shop.run(self._sell_more)

    async def _sell(self, here: Bench) -> tuple[str, Reservation, Reservation]:
        sale_id = await here.sale(items=ITEMS)
        before = await sold(here, self.shop.sandbox, sale_id, "ann")
        held = await here.hold(sale_id, "bob")
        await here.flush(sale_id)
        return sale_id, before, held

    async def _sell_more(self, here: Bench) -> Reservation:
        """Pay the held order, and sell one more."""
        key = self.shop.sandbox.put_payment(self.held.order_id, self.held.amount)
        await here.service.confirmation.confirm(self.held, payment_key=key, may_claim=True)
        after = await sold(here, self.shop.sandbox, self.sale_id, "cat")
        await here.flush(self.sale_id)
        return after

    @property
    def orders(self) -> tuple[Reservation, ...]:
        return self.before, self.held, self.after


@pytest.fixture
def story(restored_shop: RestoredShop) -> Story:
    return Story(restored_shop)


async def settle(here: Bench, sale_id: str) -> None:
    """Rebuild the sale, and let the workers decide the payments that it claimed again."""
    service = here.service
    assert (await service.rebuild.run(sale_id, operator="op")).rebuilt
    await service.redis_monitor.check_redis()
    await settle_all(here, sale_id)


async def settle_all(here: Bench, sale_id: str) -> None:
    """Let the workers decide every payment in progress."""
    service = here.service
    async with asyncio.timeout(PATIENCE_SECONDS):
        while under_way := await service.store.leases_over(sale_id, 10):
            for order_id in under_way:
                await service.settlement.settle(order_id)
    await here.flush(sale_id)


async def expire_all(here: Bench, sale_id: str) -> None:
    epoch = (await here.service.catalog.fresh(sale_id)).epoch
    while due := await here.service.store.due(sale_id, 10):
        await here.service.store.expire(sale_id, due, epoch=epoch)
    await here.flush(sale_id)


async def sell_out(here: Bench, sale_id: str) -> int:
    """Hold units until none is left; return their number."""
    await here.service.redis_monitor.check_redis()
    count = 0
    while True:
        try:
            await here.hold(sale_id, f"buyer-{count}")
        except ReservationError:
            return count
        count += 1


def only_key_of(shop: RestoredShop, order: Reservation) -> str:
    """The order's payment at the gateway."""
    (payment,) = shop.sandbox.ledger(order.order_id)["payments"]
    return payment["paymentKey"]


def test_payments_after_the_backup_find_their_orders_in_a_redis_that_survived(
    story: Story,
) -> None:
    shop = story.shop
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")

    report = shop.answer("restore", "compare")

    assert {one["orderId"]: one["kind"] for one in report["differences"]} == {
        story.held.order_id: "settled_later",
        story.after.order_id: "settled_later",
    }
    shop.run(lambda here: settle(here, story.sale_id))
    shop.command("restore", "open", *REASON)

    async def check(here: Bench) -> None:
        for order in story.orders:
            assert await current_status(here.service, order) is Status.CONFIRMED
            assert kept_money(shop.sandbox, order) == order.amount
        await here.flush(story.sale_id)
        assert await here.audited(story.sale_id) == ()
        assert await sell_out(here, story.sale_id) == 1

    shop.run(check)


def test_a_payment_whose_order_is_lost_is_named_and_keeps_its_money(story: Story) -> None:
    shop = story.shop
    shop.lose_redis()
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")

    report = shop.answer("restore", "compare", status=1)

    named = {one["orderId"]: (one["kind"], one["amount"]) for one in report["differences"]}
    assert named == {
        story.held.order_id: ("settled_later", 1000),
        story.after.order_id: ("unknown_order", 1000),
    }
    printed = shop.command("restore", "compare", status=1).output
    assert story.after.order_id in printed
    shop.run(lambda here: settle(here, story.sale_id))

    async def withdraw(here: Bench) -> None:
        """The operator withdraws the unit of the lost order before the sale opens."""
        await here.service.sales.restock(
            story.sale_id,
            sku="a",
            delta=-1,
            reason="sold before the restore",
            idempotency_key="k",
            operator="op",
        )
        await here.flush(story.sale_id)

    shop.run(withdraw)
    shop.command("restore", "open", *REASON)

    async def check(here: Bench) -> None:
        service = here.service
        for order in (story.before, story.held):
            assert await current_status(service, order) is Status.CONFIRMED
        assert await service.store.read(story.after.order_id) is None
        # A late webhook of the lost order changes nothing.
        await service.notifications.receive(story.after.order_id, only_key_of(shop, story.after))
        await service.orphaned_payments.run_once()
        await service.recheck.run_once()
        for order in story.orders:
            assert kept_money(shop.sandbox, order) == order.amount
        # Four units: two orders, the withdrawn unit, and this one.
        assert await sell_out(here, story.sale_id) == 1

    shop.run(check)


def test_prepare_and_payments_are_closed_until_the_sales_are_opened(story: Story) -> None:
    shop = story.shop
    held = shop.run(lambda here: here.hold(story.sale_id, "dan"))
    shop.run(lambda here: here.flush(story.sale_id))
    shop.file.unlink()
    shop.command("backup", str(shop.file))
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")
    # The copies of orders in Redis are needed for the comparison.
    shop.command("rebuild", story.sale_id, status=1)
    shop.command("restore", "open", *REASON, status=1)
    shop.command("restore", "compare")

    async def refused(here: Bench) -> None:
        service = here.service
        await settle(here, story.sale_id)
        with pytest.raises(Unavailable) as refusal:
            await here.hold(story.sale_id, "eve")
        assert refusal.value.facts["missing"] == ["restore-pending"]
        key = shop.sandbox.put_payment(held.order_id, held.amount)
        with pytest.raises(Unavailable):
            await service.confirmation.confirm(held, payment_key=key, may_claim=True)
        assert kept_money(shop.sandbox, held) == 0
        # A hold of the backup may have ended since, so its unit is returned.
        await expire_all(here, story.sale_id)
        assert await current_status(service, held) is Status.EXPIRED
        await service.redis_monitor.check_redis()

    shop.run(refused)
    shop.command("restore", "open", *REASON)

    async def sells(here: Bench) -> None:
        assert await here.audited(story.sale_id) == ()
        assert await sell_out(here, story.sale_id) == 1

    shop.run(sells)


def test_a_payment_that_the_gateway_lists_late_keeps_the_sales_closed(story: Story) -> None:
    shop = story.shop
    shop.lose_redis()
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")
    shop.command("restore", "compare", status=1)
    late = f"{story.sale_id}-{'x' * 24}"
    assert sale_of(late) == story.sale_id
    key = shop.sandbox.put_payment(late, 1000)
    assert shop.sandbox.confirm(key, late, 1000).is_success

    printed = shop.command("restore", "open", *REASON, status=1).output

    assert late in printed
    # The payment of the held order finds its units only in a rebuild before the opening.
    refusal = shop.command("restore", "open", *REASON, status=1).exception
    assert f"rebuild {story.sale_id} first" in str(refusal)
    shop.command("rebuild", story.sale_id)
    shop.command("restore", "open", *REASON)


def test_a_payment_that_is_listed_after_the_rebuild_is_named_and_may_be_placed(
    story: Story,
) -> None:
    shop = story.shop
    late = shop.run(lambda here: here.hold(story.sale_id, "dan"))
    shop.run(lambda here: here.flush(story.sale_id))
    shop.file.unlink()
    shop.command("backup", str(shop.file))
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")
    shop.command("restore", "compare")
    shop.run(lambda here: settle(here, story.sale_id))
    key = shop.sandbox.put_payment(late.order_id, late.amount)
    assert shop.sandbox.confirm(key, late.order_id, late.amount).is_success

    refusal = shop.command("restore", "open", *REASON, status=1)

    assert "not_placed" in refusal.output

    async def stays(here: Bench) -> None:
        """No worker gives the money back."""
        await here.service.redis_monitor.check_redis()
        await here.service.orphaned_payments.run_once()
        await here.service.recheck.run_once()
        with pytest.raises(Unavailable):
            await here.service.notifications.receive(late.order_id, key)
        assert kept_money(shop.sandbox, late) == late.amount

    shop.run(stays)
    shop.command("rebuild", story.sale_id, "--force")
    report = shop.answer("restore", "compare")
    assert [one["kind"] for one in report["differences"]] == ["settled_later"]
    shop.command("restore", "open", *REASON)

    async def check(here: Bench) -> None:
        await here.service.redis_monitor.check_redis()
        await settle_all(here, story.sale_id)
        assert await current_status(here.service, late) is Status.CONFIRMED
        assert await sell_out(here, story.sale_id) == 0

    shop.run(check)


def test_a_comparison_that_stops_leaves_no_payment_to_the_automatic_cancel(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of one payment is known; the gateway does not answer about another one."""
    shop = story.shop
    late = shop.run(lambda here: here.hold(story.sale_id, "dan"))
    shop.run(lambda here: here.flush(story.sale_id))
    shop.file.unlink()
    shop.command("backup", str(shop.file))
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), *REASON)
    shop.command("restore", "compare")
    shop.run(lambda here: settle(here, story.sale_id))
    lost = f"{story.sale_id}-{'x' * 24}"
    keys = [shop.sandbox.put_payment(one, late.amount) for one in (late.order_id, lost)]
    for key, order_id in zip(keys, (late.order_id, lost), strict=True):
        assert shop.sandbox.confirm(key, order_id, late.amount).is_success
    monkeypatch.setattr(comparison, "RETRY_SECONDS", 0.05)
    # In the gateway's order, the known one first.
    monkeypatch.setattr(comparison, "LOOK_UPS_AT_ONCE", 1)
    monkeypatch.setattr(orphaned, "UNMET_SECONDS", 0.0)

    async def compare(here: Bench) -> None:
        service = here.service
        await service.redis_monitor.check_redis()
        look_up, restore = service.gateway.look_up, await service.sql.restores.last()
        assert restore is not None

        async def answer_about_one(payment_key: str) -> Answer:
            return TryAgain("busy") if payment_key == keys[1] else await look_up(payment_key)

        with monkeypatch.context() as patch:
            patch.setattr(service.gateway, "look_up", answer_about_one)
            with pytest.raises(comparison.ListUnavailable):
                await service.comparison.run(restore)
        (placed,) = await service.sql.intents.list_unmet(order_id=late.order_id)
        assert placed.payment_key == keys[0]
        await service.orphaned_payments.run_once()
        assert kept_money(shop.sandbox, late) == late.amount
        # An operator has not seen it yet.
        report = await service.comparison.run(restore)
        assert keys[0] in report.new

    shop.run(compare)


def test_a_comparison_that_stops_writes_nothing_more(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway does not answer about one payment, and answers late about another one."""
    shop = story.shop
    shop.lose_redis()
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), *REASON)
    slow, failing = (only_key_of(shop, one) for one in (story.held, story.after))
    monkeypatch.setattr(comparison, "TRIES_MAX", 1)

    async def compare(here: Bench) -> None:
        service = here.service
        look_up, restore = service.gateway.look_up, await service.sql.restores.last()
        assert restore is not None
        asked, failed = asyncio.Event(), asyncio.Event()
        late: list[asyncio.Task[Any]] = []

        async def answer_about_one(payment_key: str) -> Answer:
            if payment_key == slow:
                task = asyncio.current_task()
                assert task is not None
                late.append(task)
                asked.set()
                await failed.wait()
            if payment_key == failing:
                await asked.wait()
                return TryAgain("busy")
            return await look_up(payment_key)

        with monkeypatch.context() as patch:
            patch.setattr(service.gateway, "look_up", answer_about_one)
            with pytest.raises(comparison.ListUnavailable):
                await service.comparison.run(restore)
            failed.set()
            await asyncio.wait(late)
        assert await service.sql.intents.list_unmet(order_id=story.held.order_id) == []
        assert await service.sql.differences.list_open() == []

    shop.run(compare)


def test_no_worker_rebuilds_a_sale_before_the_sales_are_opened(story: Story) -> None:
    """The copies of orders in Redis place payments that the gateway lists later."""
    shop = story.shop
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), *REASON)
    shop.command("restore", "compare", "--without-list")

    async def work(here: Bench) -> None:
        await here.service.redis_monitor.check_redis()
        assert await here.service.automatic_rebuild.run_once([story.sale_id]) == 0

    shop.run(work)
    report = shop.answer("restore", "compare", status=None)
    kinds = {one["orderId"]: one["kind"] for one in report["differences"]}
    assert kinds == {story.held.order_id: "settled_later", story.after.order_id: "settled_later"}


def test_money_of_before_the_restore_is_never_given_back_by_itself(story: Story) -> None:
    shop = story.shop
    shop.lose_redis()
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")
    shop.command("restore", "compare", "--without-list")
    shop.run(lambda here: settle(here, story.sale_id))
    shop.command("restore", "open", *REASON)
    key = only_key_of(shop, story.held)

    async def check(here: Bench) -> None:
        await here.service.redis_monitor.check_redis()
        await expire_all(here, story.sale_id)
        assert await current_status(here.service, story.held) is Status.EXPIRED
        # The gateway notifies of a payment whose intent was lost.
        with raising(Alarm.PAYMENT_WITHOUT_ORDER), pytest.raises(Unavailable):
            await here.service.notifications.receive(story.held.order_id, key)
        assert kept_money(shop.sandbox, story.held) == story.held.amount

    shop.run(check)


def test_a_restore_after_an_unopened_restore_compares_from_the_earlier_backup(
    story: Story,
) -> None:
    shop = story.shop
    shop.lose_redis()
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")
    first = shop.run(lambda here: here.service.sql.restores.pending())
    second_file = shop.folder / "second.zip"
    shop.command("backup", str(second_file))
    shop.lose_sql()
    shop.command("restore", "load", str(second_file), "--reason", "lost again")
    second = shop.run(lambda here: here.service.sql.restores.pending())
    assert first is not None
    assert second is not None
    assert (second.number, second.taken_at_ms) == (first.number + 1, first.taken_at_ms)
    report = shop.answer("restore", "compare", status=1)
    assert story.after.order_id in {one["orderId"] for one in report["differences"]}


def test_an_unreadable_outbox_does_not_stop_the_comparison_of_other_sales(story: Story) -> None:
    shop = story.shop

    async def damage(here: Bench) -> str:
        sale_id = await here.sale(items=ITEMS)
        await here.flush(sale_id)
        outbox = here.service.keys.of(sale_id).outbox
        await here.service.connections.command("UNLINK", outbox)
        await here.service.connections.command("SET", outbox, "no stream")
        return sale_id

    damaged = shop.run(damage)
    shop.file.unlink()
    shop.command("backup", str(shop.file))
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), *REASON)

    report = shop.answer("restore", "compare", status=None)

    assert report["unreadableSales"] == [damaged]
    assert report["payments"] > 0


def test_a_sale_that_began_after_the_backup_is_named_and_sells_nothing(story: Story) -> None:
    shop = story.shop

    async def begin(here: Bench) -> Reservation:
        sale_id = await here.sale(items=ITEMS)
        return await sold(here, shop.sandbox, sale_id, "fay")

    lost = shop.run(begin)
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")

    report = shop.answer("restore", "compare", status=1)

    assert report["unknownSales"] == [lost.sale_id]
    kinds = {one["orderId"]: one["kind"] for one in report["differences"]}
    assert kinds[lost.order_id] == "unknown_order"
    shop.run(lambda here: settle(here, story.sale_id))
    shop.command("restore", "open", *REASON)

    async def check(here: Bench) -> None:
        await here.service.redis_monitor.check_redis()
        with pytest.raises(SaleNotFound):
            await here.hold(lost.sale_id, "gus")
        assert kept_money(shop.sandbox, lost) == lost.amount

    shop.run(check)


def test_a_refund_after_the_backup_is_named(story: Story) -> None:
    shop = story.shop
    assert kept_money(shop.sandbox, story.before) == story.before.amount
    assert shop.sandbox.cancel(only_key_of(shop, story.before)).is_success
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")

    report = shop.answer("restore", "compare", status=1)

    kinds = {one["orderId"]: (one["kind"], one["amount"]) for one in report["differences"]}
    assert kinds[story.before.order_id] == ("given_back", 0)


def test_a_gateway_that_does_not_list_needs_the_operators_word(story: Story) -> None:
    shop = story.shop
    shop.lose_sql()
    shop.command("restore", "load", str(shop.file), "--reason", "lost")
    shop.sandbox.http.close()
    refusing = shop.environ | {"RESERVATION_TOSS_API_URL": "http://127.0.0.1:9"}
    shop.use(refusing)
    shop.command("restore", "compare", status=69)
    shop.command("restore", "open", *REASON, status=1)
    shop.command("restore", "compare", "--without-list")
    shop.command("restore", "open", *REASON)
