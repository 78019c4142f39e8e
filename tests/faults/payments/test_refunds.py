"""Refunds: retried concurrently, and corrected only when their old call can no longer run."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from reservation.adapters.sql.refunds import RefundRecord
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.alarms import Alarm
from reservation.domain.errors import NotRefundable, RefundPending, ReservationError
from reservation.domain.payment_gateway import Answer, Answered, PaymentStatus, RefundAccount
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.telemetry import metrics
from reservation.workers import refunder as refunder_module
from reservation.workers.refunder import Refunder
from tests.faults.payments.clock import SetClock
from tests.faults.payments.shop import (
    LIMITS,
    approve,
    current_status,
    damage,
    look_ups_showing,
    payment_key_of,
    raised,
    raising,
    refund_wish,
    shop,
    sold,
    wait_for_status,
)
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox, running_sandbox

TYPO = RefundAccount(bank="20", account_number="1111111111", holder_name="TYPO")
RIGHT = RefundAccount(bank="20", account_number="2222222222", holder_name="Kim")
NOWHERE = RefundAccount(bank="20", account_number="not a number", holder_name="Kim")
#: Far above a busy machine's needs.
PATIENCE_SECONDS = 30.0


def refunder_of(service: Service, **more: Any) -> Refunder:
    return Refunder(service.sql, service.refunds, **{"clock": service.clock, **more})


async def until_refunded(service: Service, refunder: Refunder, *orders: Reservation) -> None:
    """Rounds of the worker until these are done."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while any([await current_status(service, order) is not Status.REFUNDED for order in orders]):
        assert time.monotonic() < give_up_at
        await refunder.run_once()
        await asyncio.sleep(0.01)


async def until_none_pending(service: Service, refunder: Refunder) -> None:
    """Rounds of the worker until no refund is pending."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while await service.sql.refunds.list_pending(2):
        assert time.monotonic() < give_up_at
        await refunder.run_once()


def gauge(one: Any) -> float:
    return one._value.get()


async def paid_by_account(bench: Bench, sandbox: RunningSandbox, **changes: Any) -> Reservation:
    """An order whose buyer has paid in to a virtual account."""
    order = await bench.hold(await bench.sale(virtual_accounts=True, **changes))
    payment_key = sandbox.put_payment(order.order_id, order.amount, method="virtual_account")
    await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
    await wait_for_status(bench.service, order, Status.AWAITING_DEPOSIT)
    sandbox.deposit(payment_key)
    await bench.service.notifications.receive(order.order_id, payment_key)
    assert await current_status(bench.service, order) is Status.CONFIRMED
    return order


@pytest.fixture
def accounts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The accounts that cancels left with, in order; the real gateway gets them all."""
    seen: list[str] = []

    def watch(service: Service) -> None:
        cancel = service.gateway.cancel

        async def watched(*, refund_account: RefundAccount | None = None, **more: Any) -> Answer:
            seen.append(refund_account.account_number if refund_account else "")
            return await cancel(refund_account=refund_account, **more)

        monkeypatch.setattr(service.gateway, "cancel", watched)

    monkeypatch.setattr(f"{__name__}.WATCH", watch)
    return seen


WATCH: Any = None


async def test_a_wrong_account_is_corrected_while_the_pg_refuses_the_cancel(
    tmp_path: Path, valkey_url: str, accounts: list[str]
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await paid_by_account(bench, sandbox)
        WATCH(service)
        sandbox.order_fault("error_before_commit", orderId=order.order_id, operations=["cancel"])
        refunder = refunder_of(service)
        assert not await service.refunds.refund(refund_wish(order, TYPO))
        await refunder.run_once()
        assert set(accounts) == {TYPO.account_number}
        accounts.clear()
        assert not await service.refunds.refund(refund_wish(order, RIGHT))
        sandbox.clear_faults()
        await until_refunded(service, refunder, order)
        assert set(accounts) == {RIGHT.account_number}
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount
        await bench.flush(order.sale_id)
        steps = [
            row.what
            for row in await service.sql.orders.history(order.order_id)
            if row.kind == "refund"
        ]
        assert steps == ["begun", "replaced", "begun", "done"]


async def test_a_pending_refund_can_be_changed_to_withdraw_its_units(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order = await sold(bench, sandbox, sale_id, "ann")
        sandbox.order_fault("error_before_commit", orderId=order.order_id, operations=["cancel"])
        assert not await service.refunds.refund(refund_wish(order))
        broken = msgspec.structs.replace(refund_wish(order), restock=False)
        assert not await service.refunds.refund(broken)
        sandbox.clear_faults()
        await until_refunded(service, refunder_of(service), order)
        sale = await service.sale_store.read(sale_id)
        assert sale is not None
        assert (sale.items[0].total, sale.items[0].available) == (99, 99)


@pytest.mark.parametrize("fault", ["refuse", "hang", "garbage", "in_progress"])
async def test_another_wish_is_refused_while_the_first_cancel_is_in_flight(
    tmp_path: Path, valkey_url: str, accounts: list[str], fault: str
) -> None:
    """A cancel without an answer of the PG's own may be carried out at any time."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await paid_by_account(bench, sandbox)
        WATCH(service)
        more = {"seconds": 600} if fault == "hang" else {}
        sandbox.order_fault(fault, orderId=order.order_id, operations=["cancel"], times=1, **more)
        # The cancel at the PG is not seen yet.
        sandbox.order_fault("error_before_commit", orderId=order.order_id, operations=["look_up"])
        assert not await service.refunds.refund(refund_wish(order, TYPO))
        with pytest.raises(RefundPending) as refusal:
            await service.refunds.refund(refund_wish(order, RIGHT))
        existing: Any = refusal.value.facts["refund"]
        assert existing["refundReceiveAccount"]["accountNumber"] == TYPO.account_number
        assert (existing["status"], existing["operator"], existing["restock"]) == (
            "pending",
            "op",
            True,
        )
        sandbox.clear_faults()
        await until_refunded(service, refunder_of(service), order)
        assert RIGHT.account_number not in accounts
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_another_wish_is_refused_after_the_money_moved(
    tmp_path: Path, valkey_url: str
) -> None:
    """The PG's failure came after the cancel was carried out: the look-up shows it."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await sold(bench, sandbox, await bench.sale(), "ann")
        of_it = {"orderId": order.order_id, "times": 1}
        sandbox.order_fault("error_after_commit", operations=["cancel"], **of_it)
        sandbox.order_fault("error_before_commit", operations=["look_up"], **of_it)
        assert not await service.refunds.refund(refund_wish(order))
        with pytest.raises(RefundPending):
            await service.refunds.refund(msgspec.structs.replace(refund_wish(order), restock=False))
        await until_refunded(service, refunder_of(service), order)


async def test_a_completed_refund_accepts_no_other_wish(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await sold(bench, sandbox, await bench.sale(), "ann")
        assert await service.refunds.refund(refund_wish(order))
        assert await service.refunds.refund(refund_wish(order))
        with pytest.raises(NotRefundable) as refusal:
            await service.refunds.refund(msgspec.structs.replace(refund_wish(order), restock=False))
        existing: Any = refusal.value.facts["refund"]
        assert (existing["status"], existing["restock"]) == ("done", True)


async def test_a_repeated_refused_wish_is_refused_again(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await paid_by_account(bench, sandbox)
        wish = refund_wish(order, NOWHERE)
        for _ in range(2):
            with pytest.raises(NotRefundable) as refusal:
                await service.refunds.refund(wish)
            assert refusal.value.facts["providerCode"] == "INVALID_REFUND_ACCOUNT_NUMBER"


async def test_a_hanging_cancel_does_not_delay_other_refunds(
    tmp_path: Path, valkey_url: str
) -> None:
    patient = msgspec.structs.replace(LIMITS, confirm_seconds=60.0, refund_answer_seconds=0.1)
    async with shop(tmp_path, valkey_url, limits=patient) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        orders = [await sold(bench, sandbox, sale_id, f"buyer-{n}") for n in range(4)]
        for order in orders:
            await begun(service, order)
        hanging, *others = orders
        sandbox.order_fault(
            "hang", orderId=hanging.order_id, operations=["cancel"], seconds=600, times=1
        )
        refunder = refunder_of(service)
        try:
            await until_refunded(service, refunder, *others)
            assert await current_status(service, hanging) is Status.CONFIRMED
            # Nor is one that comes later.
            late = await sold(bench, sandbox, sale_id, "late")
            await begun(service, late)
            await until_refunded(service, refunder, late)
            assert sandbox.ledger(hanging.order_id)["cancelled"] == 0
            sandbox.clear_faults()
            await until_refunded(service, refunder, hanging)
        finally:
            await refunder.aclose()


async def begun(service: Service, order: Reservation) -> None:
    """A refund whose process died before its call to the PG."""
    await service.sql.refunds.begin(refund_wish(order).written(), now_ms=service.clock.now_ms())


async def test_an_operator_gets_a_response_while_the_cancel_hangs(
    tmp_path: Path, valkey_url: str
) -> None:
    patient = msgspec.structs.replace(LIMITS, confirm_seconds=60.0, refund_answer_seconds=0.1)
    async with shop(tmp_path, valkey_url, limits=patient) as (bench, sandbox):
        service = bench.service
        order = await sold(bench, sandbox, await bench.sale(), "ann")
        of_it = {"orderId": order.order_id, "operations": ["cancel"]}
        sandbox.order_fault("hang", seconds=600, times=1, **of_it)
        wish = refund_wish(order)
        assert not await service.refunds.refund(wish)
        # The same process still waits for the PG: no other process calls, and no call is repeated.
        assert not await service.refunds.refund(wish)
        sandbox.clear_faults()
        await wait_for_status(service, order, Status.REFUNDED)
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_concurrent_refunds_are_limited(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refunder_module, "AT_ONCE", 2)
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        orders = [await sold(bench, sandbox, sale_id, f"buyer-{n}") for n in range(5)]
        for order in orders:
            await begun(service, order)
        resume, now, most = service.refunds.resume, 0, 0

        async def counted(record: Any) -> bool:
            nonlocal now, most
            now += 1
            most = max(most, now)
            try:
                return await resume(record)
            finally:
                now -= 1

        monkeypatch.setattr(service.refunds, "resume", counted)
        await until_refunded(service, refunder_of(service), *orders)
        assert most == 2


async def test_a_failed_bank_transfer_after_the_refund_is_shown(
    tmp_path: Path, valkey_url: str
) -> None:
    """The cancel is done at once, and the bank pays two days later."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await paid_by_account(bench, sandbox)
        assert await service.refunds.refund(refund_wish(order, RIGHT))
        refunded = await service.store.read(order.order_id)
        assert refunded is not None
        assert refunded.payment_key is not None
        assert "takes up to two days" in await service.explain.next_step(refunded)
        for ended, steps in (
            ("FAILED", "the bank transfer is FAILED"),
            ("COMPLETED", "this state is final"),
        ):
            sandbox.call("/_deposits", {"paymentKey": refunded.payment_key, "refund": ended})
            answer = await service.gateway.look_up(refunded.payment_key)
            assert isinstance(answer, Answered)
            await service.refunds._resolver.store_payment(answer.payment)
            assert steps in await service.explain.next_step(refunded)


async def test_a_long_pending_refund_raises_an_alarm_once_a_minute(
    tmp_path: Path, valkey_url: str
) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, clock = bench.service, SetClock()
        order = await sold(bench, sandbox, await bench.sale(), "ann")
        sandbox.order_fault("error_before_commit", orderId=order.order_id, operations=["cancel"])
        refunder = refunder_of(service, clock=clock)
        await refunder.run_once()
        assert gauge(metrics.PENDING_REFUNDS) == gauge(metrics.PENDING_REFUNDS_AGE) == 0
        assert not await service.refunds.refund(refund_wish(order))
        before, alarms = raised(Alarm.REFUND_PENDING), []
        for minutes in (14, 1, 0, 0.5, 2):
            clock.at_ms += round(minutes * 60_000) + 1_000
            await refunder.run_once()
            alarms.append(raised(Alarm.REFUND_PENDING) - before)
        assert alarms[:4] == [0, 1, 1, 1]
        assert gauge(metrics.PENDING_REFUNDS) == 1
        assert gauge(metrics.PENDING_REFUNDS_AGE) > 16 * 60
        sandbox.clear_faults()
        clock.at_ms += 60_000
        await until_refunded(service, refunder, order)
        await refunder.run_once()
        assert gauge(metrics.PENDING_REFUNDS) == gauge(metrics.PENDING_REFUNDS_AGE) == 0


@asynccontextmanager
async def asking(folder: Path, redis_url: str, **environ: str) -> AsyncGenerator[Service]:
    """Another process of the same shop, with other settings of the PG."""
    variables = {
        "RESERVATION_DATA_DIR": str(folder),
        "RESERVATION_REDIS_URL": redis_url,
        **environ,
    }
    async with opened(Settings.load(variables, None), limits=LIMITS) as service:
        yield service


async def test_a_rejected_api_key_raises_the_alarm_at_once(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await sold(bench, sandbox, await bench.sale(), "ann")
        wrong = {
            "RESERVATION_TOSS_API_URL": sandbox.url,
            "RESERVATION_TOSS_SECRET_KEY": "test_gsk_wrong",
        }
        async with asking(tmp_path, valkey_url, **wrong) as service:
            before = raised(Alarm.GATEWAY_MISCONFIGURED)
            assert not await service.refunds.refund(refund_wish(order))
            assert raised(Alarm.GATEWAY_MISCONFIGURED) > before
            record = await service.sql.refunds.get(order.order_id)
            assert record is not None
            assert record.code == "UNAUTHORIZED_KEY"
            assert "UNAUTHORIZED_KEY" in await service.explain.next_step(order_now(order))
        await until_refunded(bench.service, refunder_of(bench.service), order)


async def test_a_payment_unknown_to_the_pg_raises_the_alarm_at_once(
    tmp_path: Path, valkey_url: str
) -> None:
    """The secret key of another merchant: it opens the PG, and shows none of our payments."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        order = await sold(bench, sandbox, await bench.sale(), "ann")
        with running_sandbox(tmp_path / "another") as another:
            environ = {"RESERVATION_TOSS_API_URL": another.url}
            async with asking(tmp_path, valkey_url, **environ) as service:
                before = raised(Alarm.REFUND_PAYMENT_MISSING)
                assert not await service.refunds.refund(refund_wish(order))
                assert raised(Alarm.REFUND_PAYMENT_MISSING) > before
        await until_refunded(bench.service, refunder_of(bench.service), order)


def order_now(order: Reservation) -> Reservation:
    return msgspec.structs.replace(order, status=Status.CONFIRMED)


async def test_a_process_frozen_before_the_cancel_does_not_send_it(
    tmp_path: Path, valkey_url: str, accounts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen between its lease and its cancel, while an operator corrected the account."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await paid_by_account(bench, sandbox)
        WATCH(service)
        method_of = service.refunds._method_of

        async def frozen(one: Reservation) -> str | None:
            began, monotonic = time.monotonic(), service.clock.monotonic
            monkeypatch.setattr(
                service.clock, "monotonic", lambda: monotonic() + 100 + time.monotonic() - began
            )
            return await method_of(one)

        with monkeypatch.context() as patch:
            patch.setattr(service.refunds, "_method_of", frozen)
            assert not await service.refunds.refund(refund_wish(order, TYPO))
        assert accounts == []
        # Nothing left, so the account may be corrected.
        assert await service.refunds.refund(refund_wish(order, RIGHT))
        assert accounts == [RIGHT.account_number]


async def test_a_damaged_refund_does_not_block_the_others(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        damaged, other = [await sold(bench, sandbox, sale_id, buyer) for buyer in ("ann", "ben")]
        for order in (damaged, other):
            await begun(service, order)
        await damage(service, damaged, "fence")
        refunder = refunder_of(service)
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        failures: list[KeyError] = []
        while not failures or await current_status(service, other) is not Status.REFUNDED:
            assert time.monotonic() < give_up_at
            try:
                await refunder.run_once()
            except KeyError as error:
                failures.append(error)
        assert str(failures[0]) == "'fence'"


async def test_a_refund_with_a_lost_event_is_completed_again(
    tmp_path: Path, valkey_url: str
) -> None:
    """The money is back and SQL says so, but the order was rebuilt as it was before: sold."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order = await sold(bench, sandbox, sale_id, "ann")
        await bench.flush(sale_id)
        wish = refund_wish(order)
        assert await service.refunds.refund(wish)
        await bench.lose(sale_id)
        await service.rebuild.run(sale_id, operator="op")
        service.catalog.forget(sale_id)
        assert await current_status(service, order) is Status.CONFIRMED
        await until_refunded(service, refunder_of(service), order)
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount
        await bench.flush(sale_id)
        assert await bench.audited(sale_id) == ()
        # Nothing is left of it, and a repeated request by an operator gets the same answer.
        assert await service.sql.refunds.list_pending(10) == []
        assert await service.refunds.refund(wish)


def finish_after_rebuild(
    bench: Bench, sale_id: str, memory: dict[str, bytes], patch: pytest.MonkeyPatch
) -> None:
    """Pause each refund before its end in SQL.

    Meanwhile a replica with this memory is promoted, and a worker rebuilds the sale.
    """
    service, finish = bench.service, bench.service.sql.refunds.finish

    async def finish_late(held: RefundRecord, **outcome: Any) -> bool:
        await bench.put_back(sale_id, memory)
        await service.redis_monitor.check_redis()
        assert await service.automatic_rebuild.run_once([sale_id]) == 1
        await service.redis_monitor.check_redis()
        return await finish(held, **outcome)

    patch.setattr(service.sql.refunds, "finish", finish_late)


async def test_a_refund_that_ends_after_a_rebuild_is_completed_again(
    tmp_path: Path, valkey_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is paused between Redis and SQL, and Redis loses the event meanwhile."""
    url = "" if database_url.startswith("sqlite") else database_url
    async with shop(tmp_path, valkey_url, RESERVATION_DATABASE_URL=url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order = await sold(bench, sandbox, sale_id, "ann")
        await bench.flush(sale_id)
        memory, wish = await bench.remembered(sale_id), refund_wish(order)
        with monkeypatch.context() as patch:
            finish_after_rebuild(bench, sale_id, memory, patch)
            assert not await service.refunds.refund(wish)
        assert await current_status(service, order) is Status.CONFIRMED
        await until_refunded(service, refunder_of(service), order)
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount
        await bench.flush(sale_id)
        assert await bench.audited(sale_id) == ()
        assert await service.sql.refunds.list_pending(10) == []
        assert await service.refunds.refund(wish)


async def test_a_refusal_after_a_rebuild_ends_no_refund(
    tmp_path: Path, valkey_url: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have the refund by then: its answer decides."""
    url = "" if database_url.startswith("sqlite") else database_url
    async with shop(tmp_path, valkey_url, RESERVATION_DATABASE_URL=url) as (bench, sandbox):
        service = bench.service
        order = await paid_by_account(bench, sandbox)
        await bench.flush(order.sale_id)
        memory = await bench.remembered(order.sale_id)
        # The event that the replica lacks.
        await bench.hold(order.sale_id, "bob")
        with monkeypatch.context() as patch:
            finish_after_rebuild(bench, order.sale_id, memory, patch)
            assert not await service.refunds.refund(refund_wish(order, NOWHERE))
        (pending,) = await service.sql.refunds.list_pending(10)
        await resume_refund(service, order)
        ended = await service.sql.refunds.get(order.order_id)
        assert ended is not None
        assert (ended.status, ended.idempotency_key) == ("refused", pending.idempotency_key)
        assert await service.refunds.refund(refund_wish(order, RIGHT))
        assert sandbox.ledger(order.order_id)["cancelled"] == order.amount


async def test_a_cancel_in_flight_is_kept_after_redis_lost_events(
    tmp_path: Path, valkey_url: str
) -> None:
    """Redis lost the sale itself: nothing of it records how the cancel ended."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service, sale_id = bench.service, await bench.sale()
        order = await bench.hold(sale_id)
        await bench.flush(sale_id)
        payment_key = sandbox.put_payment(order.order_id, order.amount)
        await bench.claim(order, payment_key)
        memory = await bench.remembered(sale_id)
        approve(sandbox, payment_key, order)
        await bench.finish(order, 1)
        of_it = {"orderId": order.order_id, "operations": ["cancel"], "times": 1}
        sandbox.order_fault("hang", seconds=600, **of_it)
        assert not await service.refunds.refund(refund_wish(order))
        (pending,) = await service.sql.refunds.list_pending(2)
        assert pending.unanswered
        await bench.put_back(sale_id, memory)
        await resume_refund(service, order)
        (pending,) = await service.sql.refunds.list_pending(2)
        assert pending.unanswered


async def resume_refund(service: Service, order: Reservation) -> None:
    """One more try of the worker."""
    record = await service.sql.refunds.get(order.order_id)
    assert record is not None
    with suppress(ReservationError):
        await service.refunds.resume(record)


async def test_the_refund_of_an_unpaid_order_ends_as_refused(
    tmp_path: Path, valkey_url: str
) -> None:
    """The bank took the deposit back before the PG would cancel, and no new deposit was made."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await paid_by_account(bench, sandbox)
        payment_key = await payment_key_of(service, order)
        sandbox.order_fault("error_before_commit", orderId=order.order_id, operations=["cancel"])
        assert not await service.refunds.refund(refund_wish(order, RIGHT))
        sandbox.clear_faults()
        sandbox.deposit(payment_key, reverse=True)
        await service.notifications.receive(order.order_id, payment_key)
        refunder = refunder_of(service)
        await refunder.run_once()
        # A new deposit is possible.
        assert len(await service.sql.refunds.list_pending(2)) == 1
        assert await service.settlement.deposit(order.order_id) is Status.EXPIRED
        with raising(Alarm.REFUND_PENDING, times=0):
            await until_none_pending(service, refunder)
            ended = await service.sql.refunds.get(order.order_id)
            assert ended is not None
            assert (ended.status, ended.code) == ("refused", "ORDER_NOT_PAID")
        await bench.flush(order.sale_id)
        history = await service.sql.orders.history(order.order_id)
        assert [row.what for row in history if row.kind == "refund"] == ["begun", "refused"]


async def test_a_pending_refund_detects_the_reversed_deposit(
    tmp_path: Path, valkey_url: str
) -> None:
    """The order awaits its deposit again, and the PG shows the cancel: no check is due soon."""
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await paid_by_account(bench, sandbox)
        payment_key = await payment_key_of(service, order)
        await begun(service, order)
        sandbox.deposit(payment_key, reverse=True)
        await service.notifications.receive(order.order_id, payment_key)
        assert await current_status(service, order) is Status.AWAITING_DEPOSIT
        sandbox.deposit(payment_key)
        account = {"bank": "20", "accountNumber": "2222222222", "holderName": "Kim"}
        assert sandbox.cancel(payment_key, refundReceiveAccount=account).is_success
        refunder = refunder_of(service)
        await until_refunded(service, refunder, order)
        await until_none_pending(service, refunder)
        done = await service.sql.refunds.get(order.order_id)
        assert done is not None
        assert done.status == "done"
        await bench.flush(order.sale_id)
        assert await bench.audited(order.sale_id) == ()


async def test_a_look_up_of_another_payment_ends_no_refund(tmp_path: Path, valkey_url: str) -> None:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        service = bench.service
        order = await sold(bench, sandbox, await bench.sale(), "ann")
        sandbox.order_fault(
            "error_before_commit", orderId=order.order_id, operations=["cancel"], times=1
        )
        another = {
            "payment_key": "tboxanother0123456789",
            "status": PaymentStatus.CANCELED,
            "balance_amount": 0,
        }
        with look_ups_showing(service, **another):
            assert not await service.refunds.refund(refund_wish(order))
        assert await current_status(service, order) is Status.CONFIRMED
