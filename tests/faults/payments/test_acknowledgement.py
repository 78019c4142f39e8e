"""Payments that replicas do not acknowledge: no money before it, and no end without it."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from reservation import failpoints
from reservation.adapters.redis import replica_acks
from reservation.adapters.redis.errors import (
    NotAcknowledged,
    StoreUnavailable,
    StoreUncertain,
    TooFewReplicas,
)
from reservation.domain.errors import OutcomeUnknown, PaymentDeclined, Unavailable
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.payments.shop import (
    current_status,
    kept_money,
    payment_key_of,
    shop,
    sold,
    wait_for_status,
)
from tests.support.acknowledgement import reopened
from tests.support.in_process import Bench
from tests.support.replication import Pair, pair
from tests.support.sandbox import RunningSandbox


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Pair]:
    with pair(tmp_path / "servers") as started:
        yield started


@asynccontextmanager
async def acknowledged_shop(
    servers: Pair, folder: Path
) -> AsyncIterator[tuple[Bench, RunningSandbox]]:
    url = servers.address.url
    async with shop(folder, url, RESERVATION_REDIS_ACK_REPLICAS="1") as (here, sandbox):
        here.service.connections.guard()
        await here.service.redis_monitor.check_redis()
        await here.until_ready()
        yield here, sandbox


@contextmanager
def at(point: str, act: Callable[[], None]) -> Iterator[None]:
    """Run the action when a confirm reaches the point."""
    failpoints.arm(point, lambda _order_id: act())
    try:
        yield
    finally:
        failpoints.disarm()


async def pay(here: Bench, order: Reservation, payment_key: str) -> Reservation:
    found = await here.service.store.read(order.order_id)
    assert found is not None
    return await here.service.confirmation.confirm(found, payment_key=payment_key, may_claim=True)


async def test_an_unacknowledged_claim_asks_for_no_money(servers: Pair, tmp_path: Path) -> None:
    async with acknowledged_shop(servers, tmp_path / "data") as (here, sandbox):
        service = here.service
        order = await here.hold(await here.sale())
        first = sandbox.put_payment(order.order_id, order.amount)
        with (
            at("confirm:before_claim", servers.freeze_replica),
            pytest.raises(Unavailable, match="could not be started"),
        ):
            await pay(here, order, first)
        assert sandbox.ledger(order.order_id)["charged"] == 0
        assert await service.sql.intents.list_by_order(order.order_id) == []
        # The attempt is over, and the hold remains.
        assert await current_status(service, order) is Status.HELD
        servers.thaw_replica()
        await reopened(service.connections)
        assert (await pay(here, order, first)).status is Status.CONFIRMED
        assert sandbox.ledger(order.order_id)["charged"] == order.amount
        assert kept_money(sandbox, order) == order.amount
        await here.flush(order.sale_id)
        assert await here.audited(order.sale_id) == ()


async def test_an_unacknowledged_claim_that_remains_is_answered_as_confirming(
    servers: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settler confirms it, so the answer must not be that no payment has begun."""
    async with acknowledged_shop(servers, tmp_path / "data") as (here, sandbox):
        order = await here.hold(await here.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)

        async def lose(*_: object, **__: object) -> None:
            raise StoreUncertain("lost")

        with monkeypatch.context() as patch, at("confirm:before_claim", servers.freeze_replica):
            patch.setattr(here.service.confirmation._store, "finish", lose)
            assert (await pay(here, order, payment_key)).status is Status.CONFIRMING
        assert sandbox.ledger(order.order_id)["charged"] == 0
        servers.thaw_replica()


async def test_a_confirmed_payment_is_answered_as_confirming_until_replicas_have_it(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_shop(servers, tmp_path / "data") as (here, sandbox):
        order = await here.hold(await here.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        with at("confirm:after_call", servers.freeze_replica):
            assert (await pay(here, order, payment_key)).status is Status.CONFIRMING
        assert kept_money(sandbox, order) == order.amount
        # The master has the outcome, but each further answer also waits for replicas.
        assert await current_status(here.service, order) is Status.CONFIRMED
        assert (await pay(here, order, payment_key)).status is Status.CONFIRMING
        servers.thaw_replica()
        await reopened(here.service.connections)
        assert (await pay(here, order, payment_key)).status is Status.CONFIRMED
        assert sandbox.ledger(order.order_id)["charged"] == order.amount


async def test_an_end_that_sql_has_needs_no_replica(
    servers: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with acknowledged_shop(servers, tmp_path / "data") as (here, sandbox):
        order = await sold(here, sandbox, await here.sale(), "ann")
        payment_key = await payment_key_of(here.service, order)
        with servers.frozen_replica():
            assert (await pay(here, order, payment_key)).status is Status.CONFIRMING
            # The flusher waits for the replica no longer.
            monkeypatch.setattr(replica_acks, "OVERDUE_SECONDS", 0.0)
            await here.flush(order.sale_id)
            assert (await pay(here, order, payment_key)).status is Status.CONFIRMED


async def test_a_decline_is_answered_only_once_replicas_have_it(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_shop(servers, tmp_path / "data") as (here, sandbox):
        order = await here.hold(await here.sale())
        payment_key = sandbox.put_payment(
            order.order_id, order.amount, decline="REJECT_CARD_COMPANY"
        )
        with at("confirm:after_call", servers.freeze_replica):
            assert (await pay(here, order, payment_key)).status is Status.CONFIRMING
        servers.thaw_replica()
        await reopened(here.service.connections)
        with pytest.raises(PaymentDeclined):
            await pay(here, order, payment_key)
        assert kept_money(sandbox, order) == 0


async def test_payments_are_refused_unsent_while_replicas_are_short(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_shop(servers, tmp_path / "data") as (here, sandbox):
        service = here.service
        order = await here.hold(await here.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        with servers.frozen_replica():
            with pytest.raises(OutcomeUnknown):
                await here.hold(order.sale_id, "bob")
            outbox = service.keys.of(order.sale_id).outbox
            before = await service.connections.command("XLEN", outbox)
            with pytest.raises((StoreUnavailable, Unavailable)):
                await pay(here, order, payment_key)
            assert await service.connections.command("XLEN", outbox) == before
        assert sandbox.ledger(order.order_id)["charged"] == 0
        await reopened(service.connections)
        assert (await pay(here, order, payment_key)).status is Status.CONFIRMED


async def test_the_settler_takes_over_only_what_replicas_acknowledge(
    servers: Pair, tmp_path: Path
) -> None:
    async with acknowledged_shop(servers, tmp_path / "data") as (here, sandbox):
        service = here.service
        order = await here.hold(await here.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        await here.claim(order, payment_key)
        confirming = service.keys.of(order.sale_id).confirming
        with servers.frozen_replica():
            for refusal in (NotAcknowledged, TooFewReplicas):
                # The first take-over is sent, the second is not.
                await service.connections.command("ZADD", confirming, 1, order.order_id)
                with pytest.raises(refusal):
                    await service.settlement.settle(order.order_id)
            assert sandbox.ledger(order.order_id)["charged"] == 0
            assert await service.sql.intents.list_by_order(order.order_id) == []
        await reopened(service.connections)
        await service.connections.command("ZADD", confirming, "XX", 1, order.order_id)
        await service.settlement.settle(order.order_id)
        await wait_for_status(service, order, Status.CONFIRMED)
        assert kept_money(sandbox, order) == order.amount


async def test_a_webhook_that_is_no_news_is_accepted_once_replicas_have_the_outcome(
    servers: Pair, tmp_path: Path
) -> None:
    """The PG sends an accepted webhook never again."""
    async with acknowledged_shop(servers, tmp_path / "data") as (here, sandbox):
        order = await here.hold(await here.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        receive = here.service.notifications.receive
        with at("confirm:after_call", servers.freeze_replica):
            assert (await pay(here, order, payment_key)).status is Status.CONFIRMING
        assert await current_status(here.service, order) is Status.CONFIRMED
        with pytest.raises(Unavailable, match="retry the webhook"):
            await receive(order.order_id, payment_key, status="DONE")
        servers.thaw_replica()
        await reopened(here.service.connections)
        await receive(order.order_id, payment_key, status="DONE")
