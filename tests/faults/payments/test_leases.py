"""Leases: no confirm without a lease that outlives the call, and none twice.

Also the limit on unusable payments of a buyer; it does not limit a payment in progress.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from reservation import failpoints
from reservation.adapters.sql.payment_intents import Intent
from reservation.application.payments.confirm import VOIDS_PER_BUYER
from reservation.bootstrap import Service
from reservation.domain.clock import SystemClock
from reservation.domain.errors import RateLimited, Unavailable
from reservation.domain.payment_gateway import Answer
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.faults.payments.shop import LIMITS, current_status, shop, sold
from tests.support.in_process import Bench

#: The PG's own window is over at once, and one 404 is enough.
CLOSED = msgspec.structs.replace(
    LIMITS, confirm_again_seconds=0.0, window_closed_seconds=0.0, missing_apart_seconds=0.0
)
MADE_UP = "tviva-made-up-0123456789"


async def dies_after_claim(bench: Bench, order: Reservation, payment_key: str) -> None:
    await bench.claim(order, payment_key)
    confirming = bench.service.keys.of(order.sale_id).confirming
    await bench.service.connections.command("ZADD", confirming, 1, order.order_id)


async def lease_ends(service: Service, order: Reservation) -> None:
    confirming = service.keys.of(order.sale_id).confirming
    await service.connections.command("ZADD", confirming, "XX", 1, order.order_id)


@contextmanager
def frozen_at(point: str, seconds: float) -> Iterator[None]:
    """The process freezes at this point for so long, by its own clock."""
    with pytest.MonkeyPatch.context() as patch:

        def freeze(_order_id: str) -> None:
            patch.setattr(SystemClock, "monotonic", lambda _: time.monotonic() + seconds)

        failpoints.arm(point, freeze)
        try:
            yield
        finally:
            failpoints.disarm()


async def test_the_settler_skips_a_payment_under_another_lease(
    tmp_path: Path, valkey_url: str
) -> None:
    """A payment's webhook arrives while its confirm is in progress."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        await bench.claim(order, payment_key)
        with pytest.MonkeyPatch.context() as patch:

            async def refused(order_id: str) -> int:
                raise AssertionError(f"a query for the leased order {order_id}")

            patch.setattr(bench.service.sql.intents, "known_fence", refused)
            assert await bench.service.settlement.settle(order.order_id) is None
        await lease_ends(bench.service, order)
        assert await bench.service.settlement.settle(order.order_id) is Status.CONFIRMED


@pytest.mark.parametrize(("status", "reads"), [("DONE", 0), ("CANCELED", 1), (None, 1)])
async def test_the_webhook_of_a_payment_under_confirmation_costs_no_call(
    tmp_path: Path, valkey_url: str, status: str | None, reads: int
) -> None:
    """Only a report of the payment changes nothing; a cancel may follow the PG's answer."""
    patient = msgspec.structs.replace(LIMITS, confirm_seconds=60.0, answer_seconds=1.0)
    async with shop(tmp_path, valkey_url, limits=patient) as (bench, sandbox):
        service = bench.service
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        sandbox.order_fault("hang", orderId=order.order_id, operations=["confirm"], seconds=60)
        first = await service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        assert first.status is Status.CONFIRMING
        calls: list[str] = []
        read = service.store.read_in_redis

        async def counted(order_id: str) -> Reservation | None:
            calls.append(order_id)
            return await read(order_id)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.store, "read_in_redis", counted)
            await service.notifications.receive(order.order_id, payment_key, status=status)
            assert len(calls) == reads
            # A webhook of another payment is read in any case.
            with pytest.raises(Unavailable):
                await service.notifications.receive(order.order_id, "another", status="DONE")
            assert len(calls) == reads + 1


async def test_the_webhook_of_a_payment_without_an_intent_is_read(
    tmp_path: Path, valkey_url: str
) -> None:
    """SQL does not answer, so the attempt may end before the PG is called."""
    patient = msgspec.structs.replace(LIMITS, answer_seconds=0.2)
    async with shop(tmp_path, valkey_url, limits=patient) as (bench, sandbox):
        service = bench.service
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        answers = asyncio.Event()
        known_fence = service.sql.intents.known_fence

        async def hangs(order_id: str) -> int:
            await answers.wait()
            return await known_fence(order_id)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.sql.intents, "known_fence", hangs)
            confirm = service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
            assert (await confirm).status is Status.CONFIRMING
            assert not service.confirmation.is_requested(order.order_id, payment_key)
            answers.set()
            async with asyncio.timeout(30):
                while not service.confirmation.is_requested(  # noqa: ASYNC110 - it has no event
                    order.order_id, payment_key
                ):
                    await asyncio.sleep(0)


async def test_a_frozen_settler_does_not_confirm_again(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await bench.hold(await bench.sale())
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        await dies_after_claim(bench, order, payment_key)
        with frozen_at("settle:after_intent", LIMITS.lease_ms / 1000):
            assert await bench.service.settlement.settle(order.order_id) is None
        assert sandbox.ledger(order.order_id)["charged"] == 0
        # Another round takes it to its end.
        await lease_ends(bench.service, order)
        assert await bench.service.settlement.settle(order.order_id) is Status.CONFIRMED


async def test_a_payment_with_a_possible_request_is_not_released(
    tmp_path: Path, valkey_url: str
) -> None:
    """Its intent is written between the settler's look-up and its void."""
    async with shop(tmp_path, valkey_url, limits=CLOSED) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        await sold(bench, sandbox, sale_id, "ben")
        order = await bench.hold(sale_id)
        await dies_after_claim(bench, order, MADE_UP)
        known = await service.catalog.get(sale_id)
        look_up = service.gateway.look_up

        async def written_meanwhile(payment_key: str) -> Answer:
            answer = await look_up(payment_key)
            await service.sql.intents.add(
                Intent(
                    order_id=order.order_id,
                    sale_id=sale_id,
                    fence=1,
                    payment_key=MADE_UP,
                    amount=order.amount,
                    currency=order.currency,
                    idempotency_key="i",
                    now_ms=service.clock.now_ms(),
                    epoch=known.epoch,
                )
            )
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.gateway, "look_up", written_meanwhile)
            assert await service.settlement.settle(order.order_id) is None
        assert await current_status(service, order) is Status.CONFIRMING
        # Once such a call is over, the PG's record is final.
        lease_ms = service.settlement._limits.lease_ms
        now_ms = service.clock.now_ms()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SystemClock, "now_ms", lambda _: now_ms + lease_ms + 1_000)
            await lease_ends(service, order)
            assert await service.settlement.settle(order.order_id) is Status.EXPIRED


async def test_a_buyer_over_the_limit_sees_the_payment_in_progress(
    tmp_path: Path, valkey_url: str
) -> None:
    patient = msgspec.structs.replace(LIMITS, confirm_seconds=60.0, answer_seconds=3.0)
    async with shop(tmp_path, valkey_url, limits=patient) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order = await bench.hold(sale_id, "eve")
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        sandbox.order_fault("hang", orderId=order.order_id, operations=["confirm"], seconds=60)
        first = await service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        assert first.status is Status.CONFIRMING
        for _ in range(VOIDS_PER_BUYER.count):
            service.confirmation._voids.wait("eve", service.clock.monotonic())
        for reloaded in (order, first):
            again = await service.confirmation.confirm(
                reloaded, payment_key=payment_key, may_claim=True
            )
            assert again.status is Status.CONFIRMING
        await service.confirmation.aclose()
        # Even if another process, or none, calls the PG.
        found = await service.queries.find(order.order_id)
        assert found is not None
        again = await service.confirmation.confirm(found, payment_key=payment_key, may_claim=True)
        assert again.status is Status.CONFIRMING
        other = await bench.hold(sale_id, "eve")
        key = sandbox.put_payment(other.order_id, other.amount)
        with pytest.raises(RateLimited):
            await service.confirmation.confirm(other, payment_key=key, may_claim=True)
        assert sandbox.ledger(other.order_id)["charged"] == 0
