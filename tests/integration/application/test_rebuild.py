"""A rebuild restores the state in SQL after any loss in Redis, and may crash at any point."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.adapters.sql import payment_intents
from reservation.adapters.sql.payment_intents import Intent
from reservation.application.recovery.rebuild import NotLost, RebuildReport
from reservation.domain.errors import (
    HoldLost,
    RateLimited,
    SaleNotFound,
    SaleRecovering,
    TooManyOrders,
)
from reservation.domain.payment import Cause, Outcome, PaymentOutcome, Present, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from reservation.domain.states import HoldPolicy, Status, Visibility
from reservation.domain.tokens import Claims
from tests.support.in_process import Bench, bench


@pytest.fixture
async def here(tmp_path: Path, valkey_url: str, database_url: str) -> AsyncIterator[Bench]:
    """A service on each database; SQLite if there is no URL."""
    address = "" if database_url.startswith("sqlite") else database_url
    async with bench(tmp_path, valkey_url, RESERVATION_DATABASE_URL=address) as made:
        yield made


async def status_of(here: Bench, order_id: str) -> Status | None:
    order = await here.service.store.read(order_id)
    return order.status if order else None


async def test_a_rebuild_restores_each_state_with_its_sets(here: Bench) -> None:
    sale_id = await here.sale(virtual_accounts=True)
    held = await here.hold(sale_id)
    paying = await here.hold(sale_id, "bob")
    await here.claim(paying, "key-p")
    sold = await here.hold(sale_id, "cat")
    await here.finish(sold, (await here.claim(sold, "key-s")).fence)
    waiting = await here.hold(sale_id, "dan")
    account = Outcome(
        name=PaymentOutcome.AWAITING_DEPOSIT,
        due_ms=waiting.expires_at_ms + 5,
        members={"dueAt": waiting.expires_at_ms + 5},
    )
    await here.finish(waiting, (await here.claim(waiting, "key-w")).fence, account)
    await here.flush(sale_id)
    await here.lose(sale_id)

    report = await here.service.rebuild.run(sale_id, operator="op")

    assert (report.rebuilt, report.orders) == (True, 4)
    for order, status in (
        (held, Status.HELD),
        (paying, Status.CONFIRMING),
        (sold, Status.CONFIRMED),
        (waiting, Status.AWAITING_DEPOSIT),
    ):
        assert await status_of(here, order.order_id) is status
    names = here.service.keys.of(sale_id)
    command = here.service.connections.command
    assert await command("ZRANGE", names.deadlines, 0, -1) == [held.order_id]
    assert await command("ZRANGE", names.deposits, 0, -1) == [waiting.order_id]
    groups = await command("XINFO", "GROUPS", names.outbox)
    assert groups[0][groups[0].index("last-delivered-id") + 1] == f"{report.seq}-0"
    # Its lease ends at once: the settler queries the PG.
    assert await here.service.store.leases_over(sale_id, 10) == [paying.order_id]
    assert await command("HGET", names.buyer("cat"), "a") == "1"
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    assert here.alarms == []


async def test_a_rebuild_restores_visibility_texts_and_pictures(here: Bench) -> None:
    mug = Item(sku="a", name="A", price=1_000, total=100, limit_per_buyer=10, image_url="/a.png")
    sale_id = await here.sale(visibility=Visibility.UNLISTED, description="Mugs", items=(mug,))
    before = (await here.service.catalog.fresh(sale_id)).sale
    await here.flush(sale_id)
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    after = (await here.service.catalog.fresh(sale_id)).sale
    assert (after.visibility, after.description) == (Visibility.UNLISTED, "Mugs")
    assert after.items == before.items
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_a_rebuild_restores_the_outcome_of_an_attempt(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    declined = Outcome(
        name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "NO_MONEY")
    )
    await here.finish(order, (await here.claim(order, "key-1")).fence, declined)
    await here.flush(sale_id)
    await here.lose(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    again = await here.service.store.claim(
        order, epoch=report.epoch, payment_key="key-1", lease_ms=60_000
    )
    assert again == Present(Status.RELEASED, "declined:provider_declined:NO_MONEY")


async def test_a_rebuilt_hold_past_its_deadline_is_due_at_once(here: Bench) -> None:
    sale_id = await here.sale(hold_seconds=1)
    order = await here.hold(sale_id)
    await here.flush(sale_id)
    await here.lose(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    store = here.service.store
    while not await store.due(sale_id, 10):
        pass
    assert await store.expire(sale_id, [order.order_id], epoch=report.epoch) == 1
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_the_token_of_a_hold_missing_in_sql_gets_hold_lost(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    order = await here.hold(sale_id)
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    claims = Claims(
        purpose="read",
        sale_id=sale_id,
        order_id=order.order_id,
        buyer="",
        amount=1000,
        expires_at_ms=order.expires_at_ms,
        epoch="",
        seq=order.seq,
    )
    with pytest.raises(HoldLost):
        await here.service.queries.of_token(claims)


async def test_a_sale_without_events_in_sql_is_rebuilt_from_its_definition(here: Bench) -> None:
    sale_id = await here.sale(hold_policy=HoldPolicy.SUCCESS, name="Other")
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    here.service.catalog.forget(sale_id)
    sale = (await here.service.catalog.fresh(sale_id)).sale
    assert (sale.name, sale.hold_policy, sale.items[0].available) == (
        "Other",
        HoldPolicy.SUCCESS,
        100,
    )
    assert (await here.hold(sale_id)).status is Status.PREPARED
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_a_rebuild_is_refused_without_force_while_redis_is_ahead(here: Bench) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    order = await here.hold(sale_id)
    with pytest.raises(NotLost, match="ahead of SQL by 1 events"):
        await here.service.rebuild.run(sale_id, operator="op")
    assert await status_of(here, order.order_id) is Status.HELD
    forced = await here.service.rebuild.run(sale_id, operator="op", force=True)
    assert (forced.rebuilt, forced.why) == (True, "forced")
    # The forced rebuild first writes to SQL the events that follow.
    assert await status_of(here, order.order_id) is Status.HELD
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


@pytest.mark.parametrize("fault", ["refused", "missing", "unreadable"])
async def test_a_forced_rebuild_discards_the_events_from_the_first_that_sql_cannot_take(
    here: Bench, fault: str
) -> None:
    sale_id = await here.sale()
    await here.flush(sale_id)
    kept = await here.hold(sale_id)
    command, names = here.service.connections.command, here.service.keys.of(sale_id)
    match fault:
        case "refused":
            await here.append_refused(sale_id)
        case "missing":
            await here.hold(sale_id)
        case _:
            await command("XADD", names.outbox, f"{kept.seq + 1}-0", "a", "b")
            await command("HSET", names.sale, "seq", kept.seq + 1)
    gone = await here.hold(sale_id, "bob")
    if fault == "missing":
        await command("XDEL", names.outbox, f"{kept.seq + 1}-0")
    await here.service.rebuild.run(sale_id, operator="op", force=True)
    assert await status_of(here, kept.order_id) is Status.HELD
    assert await status_of(here, gone.order_id) is None
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_a_consistent_sale_is_left_unchanged_by_a_rebuild(here: Bench) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.flush(sale_id)
    before = await here.remembered(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    assert not report.rebuilt
    assert await here.remembered(sale_id) == before


async def test_the_rebuild_of_an_unknown_sale_is_not_found(here: Bench) -> None:
    with pytest.raises(SaleNotFound):
        await here.service.rebuild.run("nosuch", operator="op")


async def lose(here: Bench, sale_id: str, step: str) -> None:
    """Redis lost the sale; for the steps that remove keys, one of them is left."""
    await here.lose(sale_id)
    if step.startswith("clear"):
        deadlines = here.service.keys.of(sale_id).deadlines
        await here.service.connections.command("ZADD", deadlines, 1, f"{sale_id}-{'x' * 24}")


@pytest.mark.parametrize(
    "step", ["clear_unknown", "fence_off", "clear", "write", "begin_outbox", "hand_over"]
)
async def test_an_interrupted_rebuild_keeps_the_sale_closed_until_repeated(
    here: Bench, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.flush(sale_id)
    await lose(here, sale_id, step)
    restorer = here.service.rebuild._restorer

    async def die(*_: object, **__: object) -> None:
        raise ConnectionResetError(step)

    with monkeypatch.context() as patch:
        patch.setattr(restorer, step, die)
        with pytest.raises(ConnectionResetError):
            await here.service.rebuild.run(sale_id, operator="op")
    with pytest.raises(SaleRecovering):
        await here.hold(sale_id)
    assert (await here.service.rebuild.run(sale_id, operator="op")).rebuilt
    assert (await here.hold(sale_id)).status is Status.HELD
    assert await status_of(here, order.order_id) is Status.HELD
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    assert here.alarms == []


async def test_a_writer_under_the_old_epoch_is_refused(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    old = (await here.service.catalog.fresh(sale_id)).epoch
    await here.flush(sale_id)
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    with pytest.raises(SaleRecovering):
        await here.service.store.release(order, epoch=old, reason=Reason(Cause.BUYER))
    assert await status_of(here, order.order_id) is Status.HELD


async def intend(here: Bench, order: Reservation, fence: int, payment_key: str = "key-1") -> None:
    """This payment was requested under this fence."""
    await here.service.sql.intents.add(
        Intent(
            order_id=order.order_id,
            sale_id=order.sale_id,
            fence=fence,
            payment_key=payment_key,
            amount=1000,
            currency="KRW",
            idempotency_key="i",
            now_ms=1,
        )
    )


async def test_a_payment_whose_claim_is_missing_in_sql_is_claimed_again(here: Bench) -> None:
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    await here.flush(sale_id)
    claimed = await here.claim(order, "key-1")
    await intend(here, order, claimed.fence)
    await here.lose(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    assert report.claimed == (order.order_id,)
    found = await here.service.store.read(order.order_id)
    assert found is not None
    # Above the fence of the lost claim: a process that still holds that fence is refused as late.
    assert (found.status, found.fence, found.payment_key) == (Status.CONFIRMING, 2, "key-1")
    assert await here.service.store.due(sale_id, 10) == []
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_an_ended_order_without_stock_for_its_claim_stays_as_in_sql(here: Bench) -> None:
    """Its payment is checked at the PG; a fence without a claim would be wrong forever."""
    sale_id = await here.sale(
        items=(Item(sku="a", name="A", price=1000, total=1, limit_per_buyer=1),)
    )
    order = await here.hold(sale_id)
    epoch = (await here.service.catalog.get(sale_id)).epoch
    await here.service.store.release(order, epoch=epoch, reason=Reason(Cause.BUYER))
    await here.hold(sale_id, "ben")
    await here.flush(sale_id)
    await intend(here, order, 3)
    await here.lose(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    assert report.rebuilt
    assert report.claimed == ()
    assert report.undecided == (order.order_id,)
    assert await status_of(here, order.order_id) is Status.RELEASED
    await here.flush(sale_id)
    # Until the PG answers, only this problem is reported.
    (problem,) = await here.audited(sale_id)
    assert order.order_id in problem
    assert "intent" in problem
    await here.service.sql.intents.mark_ended(order.order_id, "key-1", 1)
    assert await here.audited(sale_id) == ()


async def test_a_restock_is_not_repeated_after_a_rebuild(here: Bench) -> None:
    sale_id = await here.sale()
    more = {"sku": "a", "delta": 5, "reason": "found some", "operator": "op"}
    await here.service.sales.restock(sale_id, idempotency_key="k", **more)
    await here.flush(sale_id)
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    here.service.catalog.forget(sale_id)
    sale = await here.service.sales.restock(sale_id, idempotency_key="k", **more)
    assert sale.items[0].total == 105
    assert msgspec.structs.asdict(sale)["version"] == 2


async def test_the_version_survives_a_rebuild_and_the_epoch_changes(here: Bench) -> None:
    sale_id = await here.sale()
    more = {"sku": "a", "delta": 5, "reason": "found some", "operator": "op"}
    before = await here.service.sales.restock(sale_id, idempotency_key="k", **more)
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    here.service.catalog.forget(sale_id)
    after = (await here.service.catalog.fresh(sale_id)).sale
    assert (before.version, after.version) == (2, 2)
    assert before.etag != after.etag
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_a_stalled_rebuild_does_not_affect_a_later_one(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it paused, its reads are stale, and the sale has changed since."""
    for step in ("clear_unknown", "fence_off", "clear", "write"):
        sale_id = await here.sale()
        await here.hold(sale_id)
        await here.flush(sale_id)
        await lose(here, sale_id, step)
        restorer = here.service.rebuild._restorer
        proceed = getattr(restorer, step)

        async def pause_here(
            *args: Any, sale_id: str = sale_id, proceed: Any = proceed, **how: Any
        ) -> Any:
            patch.undo()
            assert (await here.service.rebuild.run(sale_id, operator="second")).rebuilt
            here.service.catalog.forget(sale_id)
            await here.hold(sale_id, "bob")
            return await proceed(*args, **how)

        with monkeypatch.context() as patch:
            patch.setattr(restorer, step, pause_here)
            with pytest.raises(SaleRecovering):
                await here.service.rebuild.run(sale_id, operator="first")
        await here.flush(sale_id)
        assert await here.audited(sale_id) == ()
        sale = (await here.service.catalog.fresh(sale_id)).sale
        assert sale.items[0].available == 98
    assert here.alarms == []


async def test_concurrent_rebuilds_leave_a_consistent_sale(here: Bench) -> None:
    sale_id = await here.sale()
    await here.hold(sale_id)
    await here.flush(sale_id)
    await here.lose(sale_id)
    ends = await asyncio.gather(
        *(here.service.rebuild.run(sale_id, operator=f"op-{n}", force=True) for n in range(2)),
        return_exceptions=True,
    )
    assert all(isinstance(end, RebuildReport | SaleRecovering) for end in ends), ends
    assert any(isinstance(end, RebuildReport) and end.rebuilt for end in ends), ends
    here.service.catalog.forget(sale_id)
    await here.hold(sale_id, "bob")
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_each_payment_without_a_claim_in_sql_is_claimed(
    here: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one page of them, as after an hour without writes to SQL."""
    monkeypatch.setattr(payment_intents, "UNMET_PAGE", 2)
    sale_id = await here.sale()
    orders = [await here.hold(sale_id, f"buyer-{n}") for n in range(5)]
    await here.flush(sale_id)
    for order in orders:
        payment_key = f"key-{order.order_id}"
        await intend(here, order, (await here.claim(order, payment_key)).fence, payment_key)
    await here.lose(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    assert set(report.claimed) == {order.order_id for order in orders}


async def test_a_second_payment_in_sql_stays_undecided_after_a_rebuild(here: Bench) -> None:
    """The order was restored with the earlier card: nothing else would ask about this payment."""
    sale_id = await here.sale()
    order = await here.hold(sale_id)
    claimed = await here.claim(order, "key-0")
    await here.flush(sale_id)
    declined = Outcome(name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "NO"))
    await here.finish(order, claimed.fence, declined)
    await intend(here, order, (await here.claim(order, "key-1")).fence)
    await here.lose(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op")
    # The PG of this test does not answer.
    assert report.undecided == (order.order_id,)


async def test_payments_without_an_order_after_a_rebuild_are_rechecked(here: Bench) -> None:
    """Even if the sale has lost nothing since, and sells."""
    sale_id = await here.sale(
        items=(Item(sku="a", name="A", price=1000, total=1, limit_per_buyer=1),)
    )
    order = await here.hold(sale_id)
    epoch = (await here.service.catalog.get(sale_id)).epoch
    await here.service.store.release(order, epoch=epoch, reason=Reason(Cause.BUYER))
    await here.flush(sale_id)
    await intend(here, order, 3)
    await here.hold(sale_id, "ben")
    again = await here.service.rebuild.run(sale_id, operator="op")
    assert (again.rebuilt, again.undecided) == (False, (order.order_id,))


async def test_buyer_limits_survive_a_rebuild(here: Bench) -> None:
    """The default limit of 20 unpaid orders counts the earlier ones, and not the paid ones."""
    sale_id = await here.sale()
    sold = await here.hold(sale_id)
    await here.finish(sold, (await here.claim(sold)).fence)
    for _ in range(19):
        await here.service.releases.release(await here.hold(sale_id), reason=Reason(Cause.BUYER))
    await here.flush(sale_id)
    await here.lose(sale_id)
    await here.service.rebuild.run(sale_id, operator="op")
    assert await here.audited(sale_id) == ()
    # The 21st order within a minute: the sustained rate binds first, then the unpaid ones.
    with pytest.raises(RateLimited):
        await here.hold(sale_id)
    names, command = here.service.keys.of(sale_id), here.service.connections.command
    for order_id in await command("ZRANGE", names.buyer_orders("ann"), 0, -1):
        await command("ZINCRBY", names.buyer_orders("ann"), -60_000, order_id)
    await here.service.releases.release(await here.hold(sale_id), reason=Reason(Cause.BUYER))
    with pytest.raises(TooManyOrders) as refused:
        await here.hold(sale_id)
    assert refused.value.facts == {"limit": 20}


async def scans(here: Bench) -> list[str]:
    """The commands of the server that read every key, with their counts."""
    info = await here.service.connections.command("INFO", "commandstats")
    return [
        line for line in info.splitlines() if line.startswith(("cmdstat_scan:", "cmdstat_keys:"))
    ]


@pytest.mark.parametrize("loss", ["all", "the last event", "none"])
async def test_a_rebuild_and_an_audit_never_scan_the_keys_of_the_server(
    here: Bench, loss: str
) -> None:
    sale_id = await here.sale()
    kept = await here.hold(sale_id)
    released = await here.hold(sale_id, "bob")
    await here.service.releases.release(released, reason=Reason(Cause.BUYER))
    await here.flush(sale_id)
    unwritten = await here.hold(sale_id, "cat")
    memory = await here.remembered(sale_id)
    if loss != "none":
        await here.hold(sale_id, "dan")
        await here.service.redis_monitor.check_redis()
        if loss == "all":
            await here.lose(sale_id)
        else:
            await here.put_back(sale_id, memory)
    else:
        await here.flush(sale_id)
    before = await scans(here)
    await here.audited(sale_id)
    report = await here.service.rebuild.run(sale_id, operator="op", force=loss == "none")
    await here.audited(sale_id)
    assert await scans(here) == before
    assert report.rebuilt
    assert await status_of(here, kept.order_id) is Status.HELD
    survived = Status.HELD if loss != "all" else None
    assert await status_of(here, unwritten.order_id) is survived
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
    # Redis has the keys of these orders and of no others.
    names = here.service.keys.of(sale_id)
    buyers = {"ann", "bob"} | ({"cat"} if survived else set())
    keys = await here.keys(sale_id)
    assert {key for key in keys if key.startswith(names.buyer_orders(""))} == {
        names.buyer_orders(buyer) for buyer in buyers
    }


async def trimmed_orders_that_sql_lacks(here: Bench, sale_id: str) -> list[Reservation]:
    """SQL returns to an older state, and Redis has no event of the orders since."""
    orders = [await here.hold(sale_id, buyer) for buyer in ("bob", "cat")]
    sold = await here.hold(sale_id, "dan")
    await here.finish(sold, (await here.claim(sold)).fence)
    await here.service.releases.release(orders[0], reason=Reason(Cause.BUYER))
    outbox = here.service.keys.of(sale_id).outbox
    last = (await here.service.sale_store.counters(sale_id)).seq  # type: ignore[union-attr]
    await here.service.connections.command("XTRIM", outbox, "MINID", f"{last}-0")
    return [*orders, sold]


@pytest.mark.parametrize("moment", ["", "clear_unknown", "clear", "begin_outbox"])
async def test_no_order_that_sql_lacks_is_left_after_a_rebuild(
    here: Bench, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Also if it is interrupted: the next one must still detect that SQL lacks orders."""
    sale_id = await here.sale()
    kept = await here.hold(sale_id)
    await here.flush(sale_id)
    gone = await trimmed_orders_that_sql_lacks(here, sale_id)

    async def dies(*_: Any, **__: Any) -> None:
        raise ConnectionError

    if moment:
        with monkeypatch.context() as patch:
            patch.setattr(here.service.rebuild._restorer, moment, dies)
            with pytest.raises(ConnectionError):
                await here.service.rebuild.run(sale_id, operator="op", force=True)
        await here.service.rebuild.run(sale_id, operator="op")
    else:
        await here.service.rebuild.run(sale_id, operator="op", force=True)
    for order in gone:
        assert await status_of(here, order.order_id) is None
    assert await status_of(here, kept.order_id) is Status.HELD
    keys = await here.keys(sale_id)
    for order in gone:
        assert not any(order.buyer_id in key or order.order_id in key for key in keys)
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()


async def test_no_order_is_left_of_a_sale_whose_hash_is_gone(here: Bench) -> None:
    sale_id = await here.sale()
    kept = await here.hold(sale_id)
    await here.flush(sale_id)
    gone = await trimmed_orders_that_sql_lacks(here, sale_id)
    await here.service.connections.command("DEL", here.service.keys.of(sale_id).sale)
    await here.service.rebuild.run(sale_id, operator="op")
    assert [await status_of(here, order.order_id) for order in gone] == [None] * 3
    assert await status_of(here, kept.order_id) is Status.HELD
    await here.flush(sale_id)
    assert await here.audited(sale_id) == ()
