"""A sale that has ended leaves Redis; SQL answers its reads and takes its refunds."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy.exc import OperationalError

from reservation.adapters.redis.errors import StoreUnavailable, StoreUncertain, UnexpectedReply
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_writer import SaleWriter
from reservation.adapters.sql.refunds import RefundWish
from reservation.adapters.sql.sales import SaleFold, SaleHead, SaleRepository
from reservation.application.recovery.rebuild import NotLost
from reservation.application.reservations.prepare import wish_of
from reservation.application.retention import retirement
from reservation.domain.errors import (
    IdempotencyKeyReused,
    ReservationExpired,
    SaleClosed,
    SaleNotSettled,
    SaleRecovering,
    UpgradeInProgress,
)
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Present, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from reservation.domain.states import SaleStatus, Status
from tests.support.in_process import Bench, bench, sale_definition

OPERATOR = Reason(Cause.OPERATOR, operator="op", note="why")
TOO_LATE = Outcome(name=PaymentOutcome.REFUNDED, reason=Reason(Cause.PAID_AFTER_END))
#: More sales than the tests of one server make.
MANY = 100_000
LOST_CONNECTION = OperationalError("UPDATE", {}, Exception("connection lost"))


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str, database_url: str) -> AsyncIterator[Bench]:
    """A service on each database."""
    async with bench(tmp_path, valkey_url, **_variables(database_url)) as made:
        yield made


@pytest.fixture(autouse=True)
def removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of a retired sale go in the same round."""
    monkeypatch.setattr(retirement, "REMOVE_AFTER_MS", -60_000)


def _variables(database_url: str) -> dict[str, str]:
    return {
        "RESERVATION_DATABASE_URL": "" if database_url.startswith("sqlite") else database_url,
    }


async def close(here: Bench, sale_id: str) -> None:
    await here.service.sales.switch(sale_id, SaleStatus.CLOSED, reason="over", operator="op")
    await here.flush(sale_id)


async def retire(here: Bench, sale_id: str) -> None:
    """Close the sale, archive it, and remove it from Redis."""
    await close(here, sale_id)
    await here.service.retirement.archive(sale_id, reason="r", operator="op")
    await here.service.retirement.run_once()


async def sell(here: Bench, sale_id: str, buyer: str = "cat", key: str = "") -> Reservation:
    order = await here.hold(sale_id, buyer, key)
    await here.finish(order, (await here.claim(order)).fence)
    return await read(here, order)


async def give_up(here: Bench, sale_id: str, buyer: str = "dan") -> Reservation:
    """An order whose payment was declined."""
    order = await here.hold(sale_id, buyer)
    declined = Outcome(
        name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "REJECT_CARD")
    )
    await here.finish(order, (await here.claim(order)).fence, declined)
    return await read(here, order)


async def read(here: Bench, order: Reservation) -> Reservation:
    found = await here.service.store.read(order.order_id)
    assert found is not None
    return found


async def bring_back(here: Bench, sale_id: str, memory: dict[str, bytes]) -> None:
    """A server with an older state takes over, some time after the removal."""
    here.service.retirement._remove_at.clear()
    await here.service.connections.command("SADD", here.service.keys.sales, sale_id)
    await here.put_back(sale_id, memory)


async def begin_refund(here: Bench, order: Reservation) -> None:
    """An operator's refund request, before the call to the PG."""
    wish = RefundWish(
        order_id=order.order_id,
        idempotency_key="k",
        digest="d",
        reason="r",
        restock=True,
        operator="op",
        account_json=None,
    )
    await here.service.sql.refunds.begin(wish, now_ms=1)


async def epoch_of(here: Bench, sale_id: str) -> str:
    return (await here.service.catalog.fresh(sale_id)).epoch


async def finish(here: Bench, order: Reservation, outcome: Outcome, fence: int = 1) -> bool:
    finished = await here.service.store.finish(
        order,
        epoch=await epoch_of(here, order.sale_id),
        fence=fence,
        outcome=outcome,
        payment_key=order.payment_key or "",
    )
    return finished.applied


# Keys and reads after a retirement.


async def test_a_retired_sale_leaves_no_key_and_reads_as_before(here: Bench) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    declined = await give_up(here, sale_id)
    released = await here.hold(sale_id, "eve")
    await here.service.store.release(
        released, epoch=await epoch_of(here, sale_id), reason=Reason(Cause.BUYER)
    )
    await close(here, sale_id)
    orders = [sold, declined, await read(here, released)]
    sale = (await here.service.catalog.fresh(sale_id)).sale

    await retire(here, sale_id)

    assert await here.keys(sale_id) == []
    assert sale_id not in await here.service.sale_store.ids()
    known = await here.service.catalog.fresh(sale_id)
    assert known.is_retired
    assert known.sale == sale
    assert known.sale.status(here.service.clock.now_ms()) is SaleStatus.CLOSED
    for order in orders:
        assert await read(here, order) == order
        assert await here.service.queries.find(order.order_id) == order
        assert await here.service.queries.all_of_buyer(sale_id, order.buyer_id) == [order]
        assert await here.service.store.digest(order.order_id, order.buyer_id) == order.digest
    assert await here.audited(sale_id) == ()


@pytest.mark.slow
async def test_a_retirement_frees_the_memory_of_the_sale(here: Bench) -> None:
    # Shared structures of the server and of the scripts exist already.
    await retire(here, await here.sale())
    before = await dataset_bytes(here)
    sale_id = await here.sale(
        items=(Item(sku="a", name="A", price=1000, total=10_000, limit_per_buyer=10),)
    )
    epoch = await epoch_of(here, sale_id)
    for first in range(0, 3_000, 100):
        orders = await asyncio.gather(
            *(here.hold(sale_id, f"b{number}") for number in range(first, first + 100))
        )
        for order in orders:
            await here.service.store.release(order, epoch=epoch, reason=Reason(Cause.BUYER))
        await here.flush(sale_id)
    assert await dataset_bytes(here) > before + 1_000_000

    await retire(here, sale_id)

    assert await here.keys(sale_id) == []
    assert await dataset_bytes(here) < before + 256 * 1024


async def dataset_bytes(here: Bench) -> int:
    """The server's memory for data, once it has freed what was unlinked."""
    found = ""
    for _ in range(20):
        found = await here.service.connections.command("INFO", "memory")
        if "lazyfree_pending_objects:0\r" in found:
            break
        await asyncio.sleep(0.1)
    return int(found.split("used_memory_dataset:")[1].split()[0])


async def test_a_retired_sale_is_no_loss(here: Bench) -> None:
    sale_id, other = await here.sale(), await here.sale()
    await sell(here, sale_id)
    await retire(here, sale_id)

    await here.service.redis_monitor.check_redis()

    assert here.service.redis_monitor.gaps == {}
    assert here.service.redis_monitor.away == ""
    await here.hold(other)


async def test_only_a_closed_sale_is_archived(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    with pytest.raises(SaleNotSettled, match="open"):
        await here.service.retirement.archive(sale_id, reason="r", operator="op")
    await here.service.sales.switch(sale_id, SaleStatus.PAUSED, reason="r", operator="op")
    await here.flush(sale_id)
    with pytest.raises(SaleNotSettled, match="open"):
        await here.service.retirement.archive(sale_id, reason="r", operator="op")
    await here.service.sales.switch(sale_id, SaleStatus.OPEN, reason="r", operator="op")
    await here.hold(sale_id)


async def test_an_archived_sale_can_be_archived_again(here: Bench) -> None:
    sale_id = await here.sale()
    await retire(here, sale_id)
    await here.service.retirement.archive(sale_id, reason="r", operator="op")
    assert await here.service.retirement.run_once() == 0


async def _with_hold(here: Bench, sale_id: str) -> None:
    await here.hold(sale_id)


async def _with_payment(here: Bench, sale_id: str) -> None:
    await here.claim(await here.hold(sale_id))


async def _with_deposit(here: Bench, sale_id: str) -> None:
    order = await here.hold(sale_id)
    due_ms = order.expires_at_ms + 5
    outcome = Outcome(
        name=PaymentOutcome.AWAITING_DEPOSIT, due_ms=due_ms, members={"dueAt": due_ms}
    )
    await here.finish(order, (await here.claim(order)).fence, outcome)


@pytest.mark.parametrize("begin", [_with_hold, _with_payment, _with_deposit])
async def test_a_sale_with_an_order_in_progress_stays(here: Bench, begin: Any) -> None:
    sale_id = await here.sale(virtual_accounts=True)
    await begin(here, sale_id)
    await close(here, sale_id)
    before = await here.remembered(sale_id)

    with pytest.raises(SaleNotSettled) as refusal:
        await here.service.retirement.archive(sale_id, reason="r", operator="op")

    assert refusal.value.facts["orders"] == 1
    assert await here.remembered(sale_id) == before


async def test_a_sale_stays_until_sql_has_its_last_event(here: Bench) -> None:
    sale_id = await here.sale()
    await close(here, sale_id)
    await here.service.sales.restock(
        sale_id, sku="a", delta=1, reason="r", idempotency_key="k", operator="op"
    )
    with pytest.raises(SaleNotSettled, match="every event"):
        await here.service.retirement.archive(sale_id, reason="r", operator="op")
    await here.flush(sale_id)
    await here.service.retirement.archive(sale_id, reason="r", operator="op")


async def test_a_sale_that_differs_from_sql_stays(here: Bench) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await close(here, sale_id)
    key = here.service.keys.of(sale_id).order(sold.order_id)
    await here.service.connections.command("HSET", key, "amount", "1")
    with pytest.raises(SaleNotSettled, match="differ"):
        await here.service.retirement.archive(sale_id, reason="r", operator="op")


async def test_a_sale_retires_automatically_a_day_after_its_end(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ms = here.service.clock.now_ms()
    long_ago = {"opens_at_ms": now_ms - 9 * 86_400_000, "closes_at_ms": now_ms - 8 * 86_400_000}
    ended, running = await here.sale(**long_ago), await here.sale()
    for sale_id in (ended, running):
        await here.flush(sale_id)
    # The day also begins at the last change, because an end in the past may be a typo.
    assert await here.service.retirement.run_once() == 0

    monkeypatch.setattr(retirement, "ENDED_KEPT_MS", 1)
    assert await here.service.retirement.run_once() == 1

    assert await here.keys(ended) == []
    assert await here.keys(running) != []


async def test_a_sale_that_cannot_be_retired_is_audited_again_after_a_pause(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retirement, "ENDED_KEPT_MS", 1)
    now_ms = here.service.clock.now_ms()
    sale_id = await here.sale(opens_at_ms=now_ms - 20_000, closes_at_ms=now_ms - 10_000)
    await here.flush(sale_id)
    key = here.service.keys.of(sale_id).stock("a")
    await here.service.connections.command("HSET", key, "price", "7")
    assert await here.service.retirement.run_once() == 0
    await here.service.connections.command("HSET", key, "price", "1000")
    assert await here.service.retirement.run_once() == 0
    monkeypatch.setattr(retirement, "RETRY_SECONDS", 0.0)
    here.service.retirement._retry_at.clear()
    assert await here.service.retirement.run_once() == 1


async def test_keys_stay_until_every_process_knows_of_the_retirement(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retirement, "REMOVE_AFTER_MS", 60_000)
    sale_id = await here.sale()
    await close(here, sale_id)
    await here.service.retirement.archive(sale_id, reason="r", operator="op")
    assert await here.service.retirement.run_once() == 0
    assert await here.keys(sale_id) != []


async def test_no_sale_is_retired_below_the_level_of_retirement(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retirement, "ENDED_KEPT_MS", 1)
    monkeypatch.setattr(retirement, "LEVEL_OF_RETIREMENT", 3)
    now_ms = here.service.clock.now_ms()
    sale_id = await here.sale(opens_at_ms=now_ms - 20_000, closes_at_ms=now_ms - 10_000)
    await here.flush(sale_id)
    with pytest.raises(UpgradeInProgress):
        await here.service.retirement.archive(sale_id, reason="r", operator="op")
    assert await here.service.retirement.run_once() == 0
    assert await here.keys(sale_id) != []


async def test_a_retired_sale_keeps_its_texts_and_pictures(here: Bench) -> None:
    mug = Item(sku="a", name="A", price=1_000, total=100, limit_per_buyer=10, image_url="/a.png")
    sale_id = await here.sale(description="Mugs", items=(mug,))
    await retire(here, sale_id)
    sale = (await here.service.catalog.fresh(sale_id)).sale
    assert (sale.description, sale.items[0].image_url) == ("Mugs", "/a.png")


# Changes to orders of a retired sale.


@pytest.mark.parametrize("restock", [True, False])
async def test_an_order_of_a_retired_sale_is_refunded(here: Bench, *, restock: bool) -> None:
    sale_id = await here.sale()
    sold, other = await sell(here, sale_id), await sell(here, sale_id, "bob")
    await retire(here, sale_id)
    before = (await here.service.catalog.fresh(sale_id)).sale

    status = await here.service.store.refund(
        sold, epoch=before.epoch, restock=restock, reason=OPERATOR
    )

    assert status is Status.REFUNDED
    assert (await read(here, sold)).status is Status.REFUNDED
    assert (await read(here, other)).status is Status.CONFIRMED
    after = (await here.service.catalog.fresh(sale_id)).sale
    item, was = after.items[0], before.items[0]
    assert item.sold == was.sold - 1
    assert (item.available, item.total) == (
        (was.available + 1, was.total) if restock else (was.available, was.total - 1)
    )
    assert (after.version > before.version) is not restock
    again = await here.service.store.refund(
        sold, epoch=before.epoch, restock=restock, reason=OPERATOR
    )
    assert again is Status.REFUNDED
    assert (await here.service.catalog.fresh(sale_id)).sale == after
    assert [row for row in await here.audited(sale_id) if "chain" in row or "by the" in row] == []


async def test_late_money_of_a_retired_sale_ends_in_a_refund(here: Bench) -> None:
    sale_id = await here.sale()
    order = await give_up(here, sale_id)
    await retire(here, sale_id)

    assert await finish(here, order, TOO_LATE)
    assert (await read(here, order)).status is Status.REFUNDED
    # A second process has read the order before.
    assert not await finish(here, order, TOO_LATE)
    assert await here.audited(sale_id) == ()


async def test_a_deposit_reversed_after_the_retirement_is_followed_to_its_end(here: Bench) -> None:
    sale_id = await here.sale(virtual_accounts=True)
    sold = await sell(here, sale_id)
    await retire(here, sale_id)
    reversed_ = Outcome(name=PaymentOutcome.AWAITING_DEPOSIT, due_ms=99, members={"dueAt": 99})
    assert await finish(here, sold, reversed_)
    waiting = await read(here, sold)
    assert (waiting.status, waiting.expires_at_ms) == (Status.AWAITING_DEPOSIT, 99)
    item = (await here.service.catalog.fresh(sale_id)).sale.items[0]
    assert (item.held, item.sold) == (1, 0)

    expired = Outcome(name=PaymentOutcome.EXPIRED, reason=Reason(Cause.NO_DEPOSIT))
    assert await finish(here, waiting, expired)
    item = (await here.service.catalog.fresh(sale_id)).sale.items[0]
    assert (item.held, item.sold, item.available) == (0, 0, item.total)


async def test_a_change_under_another_fence_is_not_applied(here: Bench) -> None:
    sale_id = await here.sale()
    order = await give_up(here, sale_id)
    await retire(here, sale_id)
    assert not await finish(here, order, TOO_LATE, fence=2)
    assert not await finish(here, msgspec.structs.replace(order, seq=order.seq - 1), TOO_LATE)
    assert (await read(here, order)).status is Status.RELEASED


async def test_two_refunds_at_once_make_one_event(here: Bench) -> None:
    sale_id = await here.sale()
    sold = [await sell(here, sale_id, f"b{number}") for number in range(4)]
    await retire(here, sale_id)
    seq, _ = await here.service.sql.events.cursor(sale_id)
    epoch = await epoch_of(here, sale_id)
    refunds = [
        here.service.store.refund(order, epoch=epoch, restock=True, reason=OPERATOR)
        for order in sold * 3
    ]
    await asyncio.gather(*refunds)
    assert (await here.service.sql.events.cursor(sale_id))[0] == seq + len(sold)
    assert {(await read(here, order)).status for order in sold} == {Status.REFUNDED}


async def test_no_payment_of_a_retired_sale_begins(here: Bench) -> None:
    sale_id = await here.sale()
    sold, declined = await sell(here, sale_id), await give_up(here, sale_id)
    await retire(here, sale_id)
    epoch = await epoch_of(here, sale_id)
    claim = here.service.store.claim
    assert await claim(sold, epoch=epoch, payment_key="other", lease_ms=1) == Present(
        Status.CONFIRMED, ""
    )
    with pytest.raises(ReservationExpired):
        await claim(declined, epoch=epoch, payment_key="other", lease_ms=1)


async def test_sql_that_does_not_answer_raises_the_errors_of_a_store(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await retire(here, sale_id)
    epoch = await epoch_of(here, sale_id)

    def fail(*_: Any, **__: Any) -> Any:
        raise LOST_CONNECTION

    monkeypatch.setattr(here.service.sql.orders, "get", fail)
    monkeypatch.setattr(here.service.sql.retired_orders, "change", fail)
    with pytest.raises(StoreUnavailable):
        await here.service.store.read(sold.order_id)
    with pytest.raises(StoreUncertain):
        await here.service.store.refund(sold, epoch=epoch, restock=True, reason=OPERATOR)


# Requests.


async def test_a_replayed_key_finds_its_order_and_a_new_one_the_closed_sale(here: Bench) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id, "ann", key="first-key")
    await retire(here, sale_id)
    known = await here.service.catalog.get(sale_id)
    prepare = here.service.preparation.prepare
    wish = wish_of(known.sale, [("a", 1)], 1000)

    replay = await prepare(known, "ann", "first-key", wish)
    assert (replay.reservation, replay.replayed) == (sold, True)
    with pytest.raises(IdempotencyKeyReused):
        await prepare(known, "ann", "first-key", wish_of(known.sale, [("a", 2)], 2000))
    with pytest.raises(SaleClosed):
        await prepare(known, "ann", "another-key", wish)
    # The fast path takes only sales that it need not wait for.
    assert here.service.catalog.cached(sale_id) is None


async def test_a_retired_sale_takes_no_changes(here: Bench) -> None:
    sale_id = await here.sale()
    await retire(here, sale_id)
    sale = (await here.service.catalog.fresh(sale_id)).sale
    sales = here.service.sales
    with pytest.raises(SaleClosed):
        await sales.switch(sale_id, SaleStatus.OPEN, reason="r", operator="op")
    with pytest.raises(SaleClosed):
        await sales.restock(
            sale_id, sku="a", delta=1, reason="r", idempotency_key="k", operator="op"
        )
    definition = msgspec.convert(sale, type(_definition(here)), from_attributes=True)
    for if_match in (None, sale.etag):
        with pytest.raises(SaleClosed):
            await sales.put(sale_id, definition, if_match=if_match, operator="op")
    assert (await sales.switch(sale_id, SaleStatus.CLOSED, reason="r", operator="op")) == sale
    with pytest.raises(NotLost, match="archived"):
        await here.service.rebuild.run(sale_id, operator="op")
    assert await here.keys(sale_id) == []


def _definition(here: Bench) -> Any:
    return sale_definition(here.service.clock.now_ms())


async def test_an_item_of_a_retired_sale_is_explained(here: Bench) -> None:
    sale_id = await here.sale()
    await sell(here, sale_id)
    await retire(here, sale_id)
    why = await here.service.explain.item(sale_id, "a")
    assert (why.item.sold, why.holders, why.undecided) == (1, (), ())


# Interruptions, and other processes.


async def test_a_retirement_interrupted_before_its_record_continues(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await close(here, sale_id)

    async def fail(_: SaleRepository, __: str, ___: SaleHead, ____: int) -> bool:
        raise LOST_CONNECTION

    with monkeypatch.context() as broken:
        broken.setattr(SaleRepository, "retire", fail)
        with pytest.raises(OperationalError):
            await here.service.retirement.archive(sale_id, reason="r", operator="op")
    epoch = (await here.service.sql.sales.epochs())[sale_id]
    with pytest.raises(SaleRecovering):
        await here.service.store.refund(sold, epoch=epoch, restock=True, reason=OPERATOR)
    await here.service.redis_monitor.check_redis()
    assert here.service.redis_monitor.gaps == {}

    await here.service.retirement.run_once()

    assert await here.keys(sale_id) == []
    assert await read(here, sold) == sold
    assert await here.audited(sale_id) == ()


async def test_a_refund_that_waits_since_the_fence_does_not_stop_the_retirement(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await close(here, sale_id)

    async def fail(*_: Any) -> bool:
        raise LOST_CONNECTION

    with monkeypatch.context() as broken:
        broken.setattr(SaleRepository, "retire", fail)
        with pytest.raises(OperationalError):
            await here.service.retirement.archive(sale_id, reason="r", operator="op")
    await begin_refund(here, sold)
    await here.service.retirement.run_once()
    assert await here.keys(sale_id) == []


async def test_a_pending_refund_keeps_the_sale(here: Bench) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await close(here, sale_id)
    await begin_refund(here, sold)
    with pytest.raises(SaleNotSettled, match="refund"):
        await here.service.retirement.archive(sale_id, reason="r", operator="op")


async def test_a_removal_interrupted_at_any_key_continues(here: Bench) -> None:
    sale_id = await here.sale()
    for number in range(3):
        await sell(here, sale_id, f"b{number}")
    await close(here, sale_id)
    await here.service.retirement.archive(sale_id, reason="r", operator="op")
    names = here.service.keys.of(sale_id)
    await here.service.connections.command("UNLINK", names.stock("a"), names.outbox)
    assert await here.service.retirement.run_once() == 1
    assert await here.keys(sale_id) == []
    # The hash went, and the reply about the set was lost.
    await bring_back(here, sale_id, {})
    await here.service.retirement.run_once()
    assert sale_id not in await here.service.sale_store.ids()


async def test_a_removed_sale_is_not_removed_again_while_it_is_still_listed(here: Bench) -> None:
    sale_id = await here.sale()
    await close(here, sale_id)
    await here.service.retirement.archive(sale_id, reason="r", operator="op")
    assert await here.service.retirement.run_once([sale_id]) == 1
    assert await here.service.retirement.run_once([sale_id]) == 0


async def test_a_removal_continues_as_soon_as_the_server_answers(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    await close(here, sale_id)
    await here.service.retirement.archive(sale_id, reason="r", operator="op")

    async def fail(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as broken:
        broken.setattr(SaleWriter, "remove_retired", fail)
        with pytest.raises(StoreUnavailable):
            await here.service.retirement.run_once([sale_id])

    assert await here.service.retirement.run_once([sale_id]) == 1
    assert await here.keys(sale_id) == []


async def test_another_process_follows_a_retirement(
    here: Bench, tmp_path: Path, valkey_url: str, database_url: str
) -> None:
    async with bench(tmp_path, valkey_url, **_variables(database_url)) as other:
        sale_id = await here.sale()
        sold = await sell(here, sale_id)
        epoch = await epoch_of(other, sale_id)
        await close(here, sale_id)
        await here.service.retirement.archive(sale_id, reason="r", operator="op")
        # It has not seen the retirement yet; no call of it reaches the sale.
        with pytest.raises(SaleRecovering):
            await other.service.store.refund(sold, epoch=epoch, restock=True, reason=OPERATOR)

        await other.service.redis_monitor.check_redis()

        assert other.service.redis_monitor.gaps == {}
        status = await other.service.store.refund(sold, epoch=epoch, restock=True, reason=OPERATOR)
        assert status is Status.REFUNDED
    # A process that starts later reads the retirement from SQL.
    await here.service.retirement.run_once()
    async with bench(tmp_path, valkey_url, **_variables(database_url)) as later:
        assert (await later.service.catalog.get(sale_id)).is_retired
        found = await later.service.queries.find(sold.order_id)
        assert found is not None
        assert found.status is Status.REFUNDED


async def test_a_sale_that_a_restored_server_brings_back_is_removed_again(here: Bench) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await here.flush(sale_id)
    other = await here.sale()
    snapshot = await here.remembered(sale_id)
    await retire(here, sale_id)
    status = await here.service.store.refund(
        sold, epoch=await epoch_of(here, sale_id), restock=True, reason=OPERATOR
    )
    assert status is Status.REFUNDED
    page = await here.service.sales.page(None, MANY, now_ms=here.service.clock.now_ms())
    assert sale_id not in {sale.sale_id for sale in page.sales}

    # An older state of the server, in which the sale is open.
    await bring_back(here, sale_id, snapshot)
    here.service.sales._list.expire()

    page = await here.service.sales.page(None, MANY, now_ms=here.service.clock.now_ms())
    assert {sale.sale_id for sale in page.sales} >= {other}
    assert sale_id not in {sale.sale_id for sale in page.sales}
    assert await here.service.retirement.run_once() == 1
    assert await here.keys(sale_id) == []
    assert sale_id not in await here.service.sale_store.ids()
    assert (await read(here, sold)).status is Status.REFUNDED
    assert await here.audited(sale_id) == ()


async def test_a_failover_between_fence_and_record_loses_no_refund(here: Bench) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await close(here, sale_id)
    epoch = await epoch_of(here, sale_id)
    snapshot = await here.remembered(sale_id)
    await here.service.retirement.archive(sale_id, reason="r", operator="op")

    # The replica never got the fence, and a process that has not seen the record refunds.
    await bring_back(here, sale_id, snapshot)
    status = await ReservationStore(
        here.service.connections, here.service.keys, clock=here.service.clock
    ).refund(sold, epoch=epoch, restock=True, reason=OPERATOR)
    assert status is Status.REFUNDED

    assert await here.service.retirement.run_once() == 1

    assert await here.keys(sale_id) == []
    assert (await read(here, sold)).status is Status.REFUNDED
    assert await here.audited(sale_id) == ()


async def test_a_loss_of_a_retired_sale_is_not_reported(here: Bench) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    epoch = await epoch_of(here, sale_id)
    await retire(here, sale_id)

    here.service.data_loss.report(sale_id, epoch, "a script found an older state")

    assert here.service.redis_monitor.gaps == {}
    assert await here.service.queries.find(sold.order_id) == sold
    assert (await here.service.catalog.get(sale_id)).is_retired


async def test_a_sale_whose_audit_fails_keeps_no_other_in_redis(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retirement, "ENDED_KEPT_MS", 1)
    now_ms = here.service.clock.now_ms()
    ended = {"opens_at_ms": now_ms - 20_000, "closes_at_ms": now_ms - 10_000}
    sales = sorted([await here.sale(**ended), await here.sale(**ended)])
    for sale_id in sales:
        await here.flush(sale_id)
    damaged, sound = sales
    stock = here.service.keys.of(damaged).stock("a")
    await here.service.connections.command("UNLINK", stock)
    await here.service.connections.command("SET", stock, "damaged")

    with pytest.raises(UnexpectedReply):
        await here.service.retirement.run_once()
    assert await here.service.retirement.run_once() == 1

    assert await here.keys(sound) == []
    assert await here.keys(damaged) != []


async def test_a_damaged_retired_sale_keeps_no_other_in_redis(here: Bench) -> None:
    sales = sorted([await here.sale(), await here.sale()])
    for sale_id in sales:
        await close(here, sale_id)
        await here.service.retirement.archive(sale_id, reason="r", operator="op")
    damaged, sound = sales
    head = here.service.keys.of(damaged).sale
    await here.service.connections.command("UNLINK", head)
    await here.service.connections.command("SET", head, "damaged")

    with pytest.raises(UnexpectedReply):
        await here.service.retirement.run_once()
    assert await here.service.retirement.run_once() == 1

    assert await here.keys(sound) == []


async def test_a_process_learns_a_retirement_dated_by_a_clock_that_is_behind(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await retire(here, await here.sale())
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await close(here, sale_id)
    learn_retired, record = here.service.catalog.learn_retired, SaleRepository.retire

    async def learn_later() -> None:
        """It is another process that records the retirement."""

    async def record_an_hour_ago(
        sales: SaleRepository, name: str, head: SaleHead, now_ms: int
    ) -> bool:
        return await record(sales, name, head, now_ms - 3_600_000)

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(here.service.catalog, "learn_retired", learn_later)
        elsewhere.setattr(SaleRepository, "retire", record_an_hour_ago)
        await here.service.retirement.archive(sale_id, reason="r", operator="op")

    await learn_retired()

    assert here.service.catalog.is_retired(sale_id)
    assert await read(here, sold) == sold


async def test_a_process_that_never_saw_the_sale_knows_it_as_retired(
    here: Bench, tmp_path: Path, valkey_url: str, database_url: str
) -> None:
    async with bench(tmp_path, valkey_url, **_variables(database_url)) as other:
        await other.service.catalog.get(await other.sale())
        sale_id = await here.sale()
        sold = await sell(here, sale_id)
        await retire(here, sale_id)

        await other.service.redis_monitor.check_redis()

        assert (await other.service.catalog.get(sale_id)).is_retired
        assert await other.service.queries.find(sold.order_id) == sold
        with pytest.raises(SaleClosed):
            await other.service.sales.put(
                sale_id, sale_definition(here.service.clock.now_ms()), if_match=None, operator="op"
            )


async def test_a_refund_during_the_audit_of_a_retired_sale_is_no_difference(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    sold = await sell(here, sale_id)
    await retire(here, sale_id)
    counters, epoch = SaleRepository.counters, await epoch_of(here, sale_id)

    async def counted_later(repository: SaleRepository, name: str) -> SaleFold | None:
        await here.service.store.refund(sold, epoch=epoch, restock=True, reason=OPERATOR)
        return await counters(repository, name)

    monkeypatch.setattr(SaleRepository, "counters", counted_later)
    assert await here.audited(sale_id) == ()


async def test_a_payment_that_no_order_of_a_retired_sale_has_is_followed(here: Bench) -> None:
    sale_id = await here.sale()
    await close(here, sale_id)
    epoch = await epoch_of(here, sale_id)
    await retire(here, sale_id)
    assert await here.service.data_loss.whole_epoch(sale_id) == epoch


async def test_another_process_learns_of_a_retirement_with_its_next_read(
    here: Bench, tmp_path: Path, valkey_url: str, database_url: str
) -> None:
    async with bench(tmp_path, valkey_url, **_variables(database_url)) as other:
        sale_id = await here.sale()
        await other.service.catalog.get(sale_id)
        await close(here, sale_id)
        await here.service.retirement.archive(sale_id, reason="r", operator="op")
        assert (await other.service.catalog.fresh(sale_id)).is_retired


async def test_a_retirement_never_scans_the_keys_of_the_server(here: Bench) -> None:
    """With a thousand sales, each removal would read the orders of all."""
    sale_id = await here.sale()
    await sell(here, sale_id)
    await give_up(here, sale_id)

    async def scans() -> list[str]:
        info = await here.service.connections.command("INFO", "commandstats")
        kinds = ("cmdstat_scan:", "cmdstat_keys:")
        return [line for line in info.splitlines() if line.startswith(kinds)]

    before = await scans()
    await retire(here, sale_id)
    assert await scans() == before
    assert await here.keys(sale_id) == []
