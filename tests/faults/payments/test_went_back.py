"""Lost writes of Redis during a payment: the money follows the order, or goes back.

The test restores an older state, as after a failover to a replica, a cut file or a restored
snapshot, at one exact moment: right after the PG has moved the money.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from prometheus_client import REGISTRY

from reservation import failpoints
from reservation.adapters.sql.payment_intents import Intent
from reservation.bootstrap import opened
from reservation.domain.errors import HoldLost, SaleRecovering
from reservation.domain.payment import Claimed
from reservation.domain.reservation import Reservation
from reservation.domain.sale import Item
from reservation.domain.states import Status
from reservation.domain.tokens import Claims, Purpose
from reservation.verification.export import recorded
from reservation.verification.verify import verify
from tests.faults.payments.shop import LIMITS, PATIENCE_SECONDS, current_status, shop
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

#: SQL's position when Redis loses the claim.
FLUSHED = ("nothing", "the hold", "the claim")


@contextmanager
def at(point: str, action: Callable[[], None]) -> Iterator[asyncio.Event]:
    """Run this once, when a payment passes the point."""
    passed = asyncio.Event()

    def once(_order_id: str) -> None:
        failpoints.disarm()
        action()
        passed.set()

    failpoints.arm(point, once)
    try:
        yield passed
    finally:
        failpoints.disarm()


def put_back_now(bench: Bench, sale_id: str, memory: dict[str, bytes]) -> None:
    """`Bench.put_back` without an await."""
    with redis.Redis.from_url(bench.service.settings.redis_url, protocol=2) as client:
        if keys := client.keys(f"{bench.service.keys.of(sale_id).all}*"):
            client.unlink(*keys)
        for key, value in memory.items():
            client.restore(key, 0, value)


def alarms(name: str) -> float:
    return REGISTRY.get_sample_value("reservation_alarms_total", {"alarm": name}) or 0.0


def token_of(order: Reservation, epoch: str) -> Claims:
    return Claims(Purpose.RETURN, order.sale_id, order.order_id, "b", 1000, 2**50, epoch, order.seq)


def flush_before(patch: pytest.MonkeyPatch, bench: Bench, sale_id: str) -> None:
    """Flush every event to SQL right before the PG's confirm."""
    confirm = bench.service.gateway.confirm

    async def confirm_later(**asked: Any) -> Any:
        await bench.flush(sale_id)
        return await confirm(**asked)

    patch.setattr(bench.service.gateway, "confirm", confirm_later)


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for the work that continues after the response to a buyer's request."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.02)


async def paid_and_lost(
    bench: Bench,
    sandbox: RunningSandbox,
    *,
    flushed: str,
    order_too: bool = False,
    method: str = "card",
) -> tuple[Reservation, str, Reservation]:
    """An order whose money moved right before Redis lost its claim; and the answer to its buyer."""
    sale_id = await bench.sale(
        items=(Item(sku="a", name="A", price=1000, total=1, limit_per_buyer=1),),
        virtual_accounts=True,
    )
    before = await bench.remembered(sale_id)
    order = await bench.hold(sale_id, key="the buyer's")
    if flushed == "the hold":
        await bench.flush(sale_id)
    memory = before if order_too else await bench.remembered(sale_id)
    payment_key = sandbox.put_payment(order.order_id, order.amount, method=method)
    service = bench.service
    with (
        at("confirm:after_call", lambda: put_back_now(bench, sale_id, memory)) as passed,
        pytest.MonkeyPatch.context() as patch,
    ):
        if flushed == "the claim":
            # The flusher is faster than the replica: it runs during the call to the PG.
            flush_before(patch, bench, sale_id)
        shown = await service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        # A busy machine may be slower than the buyer's time-out.
        await until(passed.is_set)
    charged = order.amount if method == "card" else 0
    await until(lambda: sandbox.ledger(order.order_id)["charged"] == charged)
    return order, payment_key, shown


@asynccontextmanager
async def shop_beside(bench: Bench) -> AsyncGenerator[Bench]:
    """Another process of the same shop, which has seen nothing yet."""
    async with opened(bench.service.settings, limits=LIMITS) as service:
        yield Bench(service)


async def rebuilt(bench: Bench, sale_id: str) -> None:
    await bench.service.redis_monitor.check_redis()
    assert sale_id in bench.service.redis_monitor.gaps
    await bench.service.rebuild.run(sale_id, operator="op")
    await bench.service.redis_monitor.check_redis()
    assert sale_id not in bench.service.redis_monitor.gaps


async def given_back(bench: Bench, order: Reservation) -> None:
    """Ask the PG until it shows it; on a busy machine its answer may be late."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while await bench.service.sql.intents.list_unmet(order.sale_id):
        assert time.monotonic() < give_up_at
        await bench.service.orphaned_payments.of(order.sale_id)


async def settled(bench: Bench, order: Reservation) -> Status | None:
    """Settle the payment, with the same patience."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while (status := await bench.service.settlement.settle(order.order_id)) is None:
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.02)
    return status


async def judged(bench: Bench, sale_id: str, file: Path) -> None:
    """The sale's history obeys the contract, including the events that a rebuild made again."""
    service = bench.service
    records = recorded(
        sale_id,
        sales=service.sale_store,
        sql=service.sql,
        outbox=service.outbox,
        clock=service.clock,
    )
    with file.open("wb") as out:
        async for record in records:
            out.write(msgspec.json.encode(record) + b"\n")
    assert verify(file).violations == []


@pytest.mark.parametrize("flushed", FLUSHED)
async def test_a_lost_claim_closes_the_sale_and_the_payment_is_claimed_again(
    tmp_path: Path, valkey_url: str, flushed: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        before = alarms("sale_recovering")
        order, payment_key, shown = await paid_and_lost(bench, sandbox, flushed=flushed)
        # 202: no answer to the buyer ever claims that nothing was charged.
        assert shown.status is Status.CONFIRMING
        await until(lambda: alarms("sale_recovering") == before + 1)
        with pytest.raises(SaleRecovering):
            await bench.hold(order.sale_id, "another")
        again = await bench.service.confirmation.confirm(
            order, payment_key=payment_key, may_claim=True
        )
        assert again.status is Status.CONFIRMING
        seen = await bench.service.queries.find(order.order_id)
        assert seen is not None
        assert seen.status is Status.CONFIRMING

        await rebuilt(bench, order.sale_id)
        assert await settled(bench, order) is Status.CONFIRMED
        ledger = sandbox.ledger(order.order_id)
        assert (ledger["charged"], ledger["cancelled"]) == (order.amount, 0)
        await bench.flush(order.sale_id)
        assert await bench.audited(order.sale_id) == ()
        await judged(bench, order.sale_id, tmp_path / "history")


async def test_an_order_missing_in_sql_is_remade_from_its_intent(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, _, shown = await paid_and_lost(bench, sandbox, flushed="nothing", order_too=True)
        assert shown.status is Status.CONFIRMING
        epoch = (await bench.service.sql.sales.epochs())[order.sale_id]
        seen = await bench.service.queries.of_token(token_of(order, epoch))
        assert seen.status is Status.CONFIRMING

        await rebuilt(bench, order.sale_id)
        assert await settled(bench, order) is Status.CONFIRMED
        found = await bench.service.store.read(order.order_id)
        assert found is not None
        assert (found.buyer_id, found.lines, found.amount) == ("ann", order.lines, order.amount)
        await bench.flush(order.sale_id)
        await judged(bench, order.sale_id, tmp_path / "history")
        # The buyer's key finds it again.
        assert (await bench.hold(order.sale_id, key="the buyer's")).order_id == order.order_id
        await bench.flush(order.sale_id)
        assert await bench.audited(order.sale_id) == ()


@pytest.mark.parametrize("method", ["card", "virtual_account"])
async def test_money_for_a_unit_sold_to_another_buyer_is_refunded(
    tmp_path: Path, valkey_url: str, method: str
) -> None:
    """A virtual account is closed before its buyer pays in to no purpose."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, payment_key, _ = await paid_and_lost(
            bench, sandbox, flushed="nothing", order_too=True, method=method
        )
        # A process that has not detected it sells the unit before any alarm.
        async with shop_beside(bench) as other:
            await other.hold(order.sale_id, "ben")
        await rebuilt(bench, order.sale_id)
        await given_back(bench, order)
        ledger = sandbox.ledger(order.order_id)
        charged = order.amount if method == "card" else 0
        assert (ledger["charged"], ledger["cancelled"]) == (charged, charged)
        assert await bench.service.sql.intents.list_unmet(order.sale_id) == []
        kept = await bench.service.sql.payments.get(payment_key)
        assert kept is not None
        assert kept.status == "CANCELED"
        await bench.flush(order.sale_id)
        assert await bench.audited(order.sale_id) == ()


async def test_the_settler_releases_orders_left_undecided_by_a_rebuild(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reservation.application.payments.orphaned.UNMET_SECONDS", -60.0)
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, _, _ = await paid_and_lost(bench, sandbox, flushed="nothing", order_too=True)
        async with shop_beside(bench) as other:
            await other.hold(order.sale_id, "ben")
        sandbox.order_fault("refuse", operations=["look_up"], orderId=order.order_id)
        await rebuilt(bench, order.sale_id)
        assert sandbox.ledger(order.order_id)["cancelled"] == 0
        sandbox.clear_faults()
        assert await bench.service.orphaned_payments.run_once() == 1
        await given_back(bench, order)
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount
        assert await bench.service.orphaned_payments.run_once() == 0


async def test_the_settler_finds_a_lost_claim_by_its_intent(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes are new, and none has seen the lost state: only SQL has the intent."""
    monkeypatch.setattr("reservation.application.payments.orphaned.UNMET_SECONDS", -60.0)
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, _, _ = await paid_and_lost(bench, sandbox, flushed="the hold")
        async with shop_beside(bench) as other:
            assert order.sale_id not in other.service.redis_monitor.gaps
            assert await other.service.orphaned_payments.run_once() == 0
            assert order.order_id in other.service.redis_monitor.gaps[order.sale_id]
            with pytest.raises(SaleRecovering):
                await other.hold(order.sale_id, "ben")


async def test_the_audit_reports_a_payment_without_an_order(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, _, _ = await paid_and_lost(bench, sandbox, flushed="the hold")
        problems = await bench.audited(order.sale_id)
        assert any("payment intent" in problem for problem in problems)
        assert any("is paid at the PG" in problem for problem in problems)
        assert all(order.order_id in problem for problem in problems)


async def test_a_fence_lost_by_redis_is_not_issued_again(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order, _, _ = await paid_and_lost(bench, sandbox, flushed="the hold")
        async with shop_beside(bench) as other:
            # By a process that has not detected the loss.
            second = sandbox.put_payment(order.order_id, order.amount)
            await other.service.confirmation.confirm(order, payment_key=second, may_claim=True)
            intents = await other.service.sql.intents.list_by_order(order.order_id)
            assert [intent.fence for intent in intents] == [1, 2]


async def test_the_token_of_a_missing_order_closes_the_sale(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, _):
        sale_id = await bench.sale()
        memory = await bench.remembered(sale_id)
        order = await bench.hold(sale_id)
        epoch = (await bench.service.catalog.get(sale_id)).epoch
        await bench.put_back(sale_id, memory)
        async with shop_beside(bench) as other:
            with pytest.raises(HoldLost):
                await other.service.queries.of_token(token_of(order, "0" * 16))
            assert sale_id not in other.service.redis_monitor.gaps
            with pytest.raises(HoldLost):
                await other.service.queries.of_token(token_of(order, epoch))
            with pytest.raises(SaleRecovering):
                await other.hold(sale_id)
            await other.service.redis_monitor.check_redis()
            assert sale_id in other.service.redis_monitor.gaps
        # All processes read it from SQL.
        await bench.service.redis_monitor.check_redis()
        assert sale_id in bench.service.redis_monitor.gaps


async def test_the_token_of_an_order_reveals_a_lost_end(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, _):
        sale_id = await bench.sale()
        await bench.hold(sale_id)
        order = await bench.hold(sale_id)
        async with shop_beside(bench) as other:
            known = await other.service.catalog.get(sale_id)
            later = token_of(order, known.epoch)
            await other.service.queries.of_token(msgspec.structs.replace(later, seq=later.seq + 1))
            with pytest.raises(SaleRecovering):
                await other.hold(sale_id)
            assert sale_id in other.service.redis_monitor.gaps


async def test_a_payment_under_the_fence_of_another_key_is_not_requested(
    tmp_path: Path, valkey_url: str
) -> None:
    """Redis lost a claim before its intent was written, and gave its fence to another payment."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await bench.hold(await bench.sale())
        memory = await bench.remembered(order.sale_id)
        late = sandbox.put_payment(order.order_id, order.amount)
        second = sandbox.put_payment(order.order_id, order.amount)

        def meanwhile() -> None:
            put_back_now(bench, order.sale_id, memory)

        with at("confirm:after_claim", meanwhile):
            # Its claim is lost; another process claims under the same fence, and is first in SQL.
            async with shop_beside(bench) as other:
                known = await other.service.catalog.get(order.sale_id)
                await other.service.sql.intents.add(
                    Intent(
                        order_id=order.order_id,
                        sale_id=order.sale_id,
                        fence=1,
                        payment_key=second,
                        amount=order.amount,
                        currency="KRW",
                        idempotency_key="i",
                        now_ms=1,
                        epoch=known.epoch,
                    )
                )
            with pytest.MonkeyPatch.context() as patch:

                async def unknown(_order_id: str) -> int:
                    return 0

                patch.setattr(bench.service.sql.intents, "known_fence", unknown)
                shown = await bench.service.confirmation.confirm(
                    order, payment_key=late, may_claim=True
                )
        # The other one's money may have moved.
        assert shown.status is Status.CONFIRMING
        await until(lambda: order.sale_id in bench.service.redis_monitor.gaps)
        assert sandbox.ledger(order.order_id)["charged"] == 0


async def test_a_finish_carries_the_id_of_its_claim(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, _):
        order = await bench.hold(await bench.sale())
        claimed = await bench.claim(order, "key-1")
        assert isinstance(claimed, Claimed)
        assert claimed.claim_id
        assert await current_status(bench.service, order) is Status.CONFIRMING
