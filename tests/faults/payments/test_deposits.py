"""Deposits into a virtual account: an order that cannot be decided is checked again."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy.exc import OperationalError

from reservation.adapters.redis.mapping import as_mapping
from reservation.adapters.sql.refunds import RefundRecord
from reservation.application.payments.webhooks import SQL_ALL
from reservation.domain.alarms import Alarm
from reservation.domain.clock import SystemClock
from reservation.domain.errors import Unavailable
from reservation.domain.payment_gateway import (
    Answer,
    Misconfigured,
    PaymentMissing,
    RefundAccount,
    Unknown,
)
from reservation.domain.payment_timeouts import PaymentTimeouts
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.sandbox.faults import Fault
from reservation.workers.settler import Settler
from tests.faults.payments.shop import (
    LIMITS,
    current_status,
    raising,
    refund_wish,
    shop,
    wait_for_status,
)
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

KIM = RefundAccount(bank="20", account_number="2222222222", holder_name="Kim")


class Account:
    """One order that waits for its deposit."""

    def __init__(
        self, bench: Bench, sandbox: RunningSandbox, order: Reservation, payment_key: str
    ) -> None:
        self._bench = bench
        self.service = bench.service
        self.sandbox = sandbox
        self.order = order
        self.payment_key = payment_key

    async def notify(self) -> bool:
        """The PG's webhook of a change of it; returns whether it was accepted."""
        try:
            await self.service.notifications.receive(self.order.order_id, self.payment_key)
        except Unavailable:
            return False
        return True

    async def current_status(self) -> Status:
        return await current_status(self.service, self.order)

    async def is_written(self) -> None:
        """SQL has the order."""
        await self._bench.flush(self.order.sale_id)

    async def is_lost(self) -> None:
        """Redis has it no more."""
        key = self.service.keys.of(self.order.sale_id).order(self.order.order_id)
        await self.service.connections.command("DEL", key)

    async def is_lost_with_its_sale(self) -> None:
        """Redis has nothing of the sale any more."""
        await self._bench.lose(self.order.sale_id)

    async def is_due(self) -> None:
        """A week later."""
        names, command = self.service.keys.of(self.order.sale_id), self.service.connections.command
        await command("ZADD", names.deposits, 1, self.order.order_id)
        await command("HSET", names.order(self.order.order_id), "due_at", 1)

    def cancelled_at_the_console(self) -> None:
        """The shop gives the deposit back in the PG's own console."""
        account = {"bank": "20", "accountNumber": "2222222222", "holderName": "Kim"}
        assert self.sandbox.cancel(self.payment_key, refundReceiveAccount=account).is_success

    async def is_refunded(self, *, units: int = 100) -> None:
        """The sale has this many units, all on sale, and a rebuild gives the same state."""
        service, sale_id = self.service, self.order.sale_id
        assert await self.current_status() is Status.REFUNDED
        await self._bench.flush(sale_id)
        events = [row.what for row in await service.sql.orders.history(self.order.order_id)]
        assert events.count("refunded") == 1
        assert await self._bench.audited(sale_id) == ()
        before = await self._hashes()
        await self._bench.lose(sale_id)
        await service.rebuild.run(sale_id, operator="op")
        assert await self._hashes() == before
        assert service.keys.of(sale_id).deposits not in await self._bench.keys(sale_id)
        assert await self.current_status() is Status.REFUNDED
        await self._bench.flush(sale_id)
        assert await self._bench.audited(sale_id) == ()
        sale = await service.sale_store.read(sale_id)
        assert sale is not None
        assert (sale.items[0].total, sale.items[0].available) == (units, units)
        ledger = self.sandbox.ledger(self.order.order_id)
        assert ledger["charged"] == ledger["cancelled"]

    async def _hashes(self) -> list[dict[str, str]]:
        """The hashes in Redis of its unit, its buyer and itself."""
        names = self.service.keys.of(self.order.sale_id)
        keys = names.stock("a"), names.buyer(self.order.buyer_id), names.order(self.order.order_id)
        command = self.service.connections.command
        found = [as_mapping(await command("HGETALL", key)) for key in keys]
        for fields in found:
            # A finished claim does not need its id again.
            fields.pop("claim_id", None)
        return found

    def inject_fault(self, fault: str, **more: Any) -> None:
        """Faults of its look-ups: of the next one, by default."""
        of_it = {"orderId": self.order.order_id, "operations": ["look_up"], "times": 1}
        self.sandbox.order_fault(fault, **of_it | more)


@asynccontextmanager
async def open_account(
    folder: Path, redis_url: str, limits: PaymentTimeouts = LIMITS
) -> AsyncGenerator[Account]:
    async with shop(folder, redis_url, limits=limits) as (bench, sandbox):
        order = await bench.hold(await bench.sale(virtual_accounts=True))
        payment_key = sandbox.put_payment(order.order_id, order.amount, method="virtual_account")
        await bench.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
        made = Account(bench, sandbox, order, payment_key)
        await wait_for_status(bench.service, order, Status.AWAITING_DEPOSIT)
        yield made


@pytest.fixture
async def account(tmp_path: Path, valkey_url: str) -> AsyncGenerator[Account]:
    async with open_account(tmp_path, valkey_url) as made:
        yield made


#: Two lies, a failure, and no fault of the answer at all.
QUICK = {Fault.OTHER_AMOUNT, Fault.OTHER_ORDER, Fault.ERROR_BEFORE_COMMIT, Fault.WEBHOOK_STORM}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[] if fault in QUICK else [pytest.mark.slow]) for fault in Fault],
)
async def test_a_deposit_webhook_is_acknowledged_only_once_sold(
    account: Account, fault: Fault
) -> None:
    """No check of the account before it is due, a week from now, unless the PG sends a webhook."""
    account.sandbox.deposit(account.payment_key)
    account.inject_fault(fault, seconds=5)
    acknowledged = await account.notify()
    assert acknowledged == (await account.current_status() is Status.CONFIRMED)
    account.sandbox.clear_faults()
    assert await account.notify()
    assert await account.current_status() is Status.CONFIRMED


@pytest.mark.parametrize(
    "answer", [PaymentMissing("NOT_FOUND_PAYMENT"), Misconfigured("UNAUTHORIZED_KEY", "")]
)
async def test_a_deposit_webhook_is_retried_while_the_pg_has_no_payment(
    account: Account, monkeypatch: pytest.MonkeyPatch, answer: Answer
) -> None:
    account.sandbox.deposit(account.payment_key)

    async def look_up(_: str) -> Answer:
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(account.service.gateway, "look_up", look_up)
        assert not await account.notify()
    assert await account.notify()
    assert await account.current_status() is Status.CONFIRMED


async def test_a_deposit_webhook_is_retried_if_sql_did_not_store_it(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    account.sandbox.deposit(account.payment_key)

    with monkeypatch.context() as patch:
        patch.setattr(account.service.sql.payments, "put", _away)
        assert not await account.notify()
    assert await account.current_status() is Status.AWAITING_DEPOSIT
    assert await account.notify()
    assert await account.current_status() is Status.CONFIRMED


async def test_a_deposit_webhook_is_retried_if_sql_cannot_verify_it(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PG's other webhook of it names no payment and carries a secret."""
    account.sandbox.deposit(account.payment_key)
    [payment] = await account.service.sql.payments.list_by_order(account.order.order_id)
    order_id = account.order.order_id
    with monkeypatch.context() as patch:
        patch.setattr(account.service.sql.payments, "list_by_order", _away)
        with pytest.raises(Unavailable):
            await account.service.notifications.receive(order_id, None, secret=payment.secret)
    await account.service.notifications.receive(order_id, None, secret=payment.secret)
    assert await account.current_status() is Status.CONFIRMED


async def test_a_reversed_deposits_webhook_is_retried_while_sql_is_down(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    account.sandbox.deposit(account.payment_key)
    assert await account.notify()
    assert await account.current_status() is Status.CONFIRMED
    account.sandbox.deposit(account.payment_key, reverse=True)

    with monkeypatch.context() as patch:
        patch.setattr(account.service.sql.payments, "put", _away)
        assert not await account.notify()
    assert await account.notify()
    assert await account.current_status() is Status.AWAITING_DEPOSIT


@pytest.mark.parametrize("found_by", ["a webhook", "the settler"])
async def test_an_unseen_reversed_deposit_returns_the_units(
    account: Account, found_by: str
) -> None:
    """The webhook of the deposit was lost, and an operator cancelled the payment at the console."""
    account.sandbox.deposit(account.payment_key)
    account.cancelled_at_the_console()
    if found_by == "a webhook":
        assert await account.notify()
    else:
        assert await account.service.settlement.deposit(account.order.order_id) is Status.REFUNDED
    await account.is_refunded()


async def test_a_deposit_of_another_amount_is_refunded_once_the_money_is_back(
    account: Account,
) -> None:
    """The PG gives no deposit back without an account to send it to: that is for an operator."""
    account.sandbox.deposit(account.payment_key)
    account.inject_fault("other_amount", times=None)
    with raising(Alarm.AUTOMATIC_CANCEL_FAILED):
        assert not await account.notify()
    assert await account.current_status() is Status.AWAITING_DEPOSIT
    account.cancelled_at_the_console()
    assert await account.notify()
    await account.is_refunded()


@pytest.fixture
def overtaken_by(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Run an action between the next look-up and its effect, while the process is frozen."""

    def overtake(meanwhile: Callable[[], Awaitable[None]]) -> None:
        look_up, waiting = account.service.gateway.look_up, [meanwhile]

        async def slow_look_up(payment_key: str) -> Answer:
            answer = await look_up(payment_key)
            if waiting:
                await waiting.pop()()
            return answer

        monkeypatch.setattr(account.service.gateway, "look_up", slow_look_up)

    return overtake


async def test_a_look_up_overtaken_by_the_deposit_does_not_revert_it(
    account: Account, overtaken_by: Callable[[Callable[[], Awaitable[None]]], None]
) -> None:
    async def is_paid() -> None:
        account.sandbox.deposit(account.payment_key)
        assert await account.notify()

    overtaken_by(is_paid)
    assert not await account.notify()
    assert await account.current_status() is Status.CONFIRMED
    assert await account.notify()
    assert await account.current_status() is Status.CONFIRMED


async def test_a_look_up_overtaken_by_the_bank_does_not_sell_an_unpaid_order(
    account: Account, overtaken_by: Callable[[Callable[[], Awaitable[None]]], None]
) -> None:
    async def is_sold_and_taken_back() -> None:
        assert await account.notify()
        account.sandbox.deposit(account.payment_key, reverse=True)
        assert await account.notify()

    account.sandbox.deposit(account.payment_key)
    overtaken_by(is_sold_and_taken_back)
    assert not await account.notify()
    assert await account.current_status() is Status.AWAITING_DEPOSIT
    assert await account.notify()
    assert await account.current_status() is Status.AWAITING_DEPOSIT


@pytest.mark.parametrize(("restock", "units"), [(True, 100), (False, 99)])
async def test_a_refund_that_crosses_a_reversal_decides_on_the_units(
    account: Account,
    overtaken_by: Callable[[Callable[[], Awaitable[None]]], None],
    restock: bool,
    units: int,
) -> None:
    """The bank reverses the deposit for a moment, and that look-up ends after the PG's cancel."""
    service, sandbox = account.service, account.sandbox
    sandbox.deposit(account.payment_key)
    assert await account.notify()
    sandbox.deposit(account.payment_key, reverse=True)

    async def is_paid_again_and_cancelled() -> None:
        await begun(account, restock=restock)
        sandbox.deposit(account.payment_key)
        account.cancelled_at_the_console()

    overtaken_by(is_paid_again_and_cancelled)
    assert await account.notify()
    assert await account.current_status() is Status.AWAITING_DEPOSIT
    assert await account.notify()
    assert await account.current_status() is Status.REFUNDED
    (pending,) = await service.sql.refunds.list_pending(2)
    assert await service.refunds.resume(pending)
    assert await service.sql.refunds.list_pending(2) == []
    await account.is_refunded(units=units)


@pytest.mark.parametrize("refused", [False, True])
async def test_units_withdrawn_by_a_refund_stay_out_where_the_account_lapses(
    account: Account, refused: bool
) -> None:
    """The bank reversed the deposit before the PG cancelled it, and no new deposit was made."""
    service = account.service
    account.sandbox.deposit(account.payment_key)
    assert await account.notify()
    refund = await begun(account, restock=False)
    if refused:
        await service.sql.refunds.finish(refund, status="refused", code="X", now_ms=1)
    account.sandbox.deposit(account.payment_key, reverse=True)
    assert await account.notify()
    assert await service.settlement.deposit(account.order.order_id) is Status.EXPIRED
    sale = await service.sale_store.read(account.order.sale_id)
    assert sale is not None
    left = 100 if refused else 99
    assert (sale.items[0].total, sale.items[0].available) == (left, left)
    await account.is_written()
    assert (await service.audit.run(account.order.sale_id)).problems == ()


async def test_an_account_stays_open_while_its_refund_is_unreadable(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    account.sandbox.deposit(account.payment_key)
    account.cancelled_at_the_console()
    with monkeypatch.context() as patch:
        patch.setattr(account.service.sql.refunds, "get", _away)
        assert not await account.notify()
    assert await account.current_status() is Status.AWAITING_DEPOSIT
    assert await account.notify()
    await account.is_refunded()


async def test_a_done_refund_decides_on_the_units_after_its_end_was_lost(
    account: Account,
) -> None:
    """SQL has the order as it awaited its deposit: neither the sale nor the refund was flushed."""
    service, sale_id = account.service, account.order.sale_id
    await account.is_written()
    account.sandbox.deposit(account.payment_key)
    assert await account.notify()
    wish = msgspec.structs.replace(refund_wish(account.order, KIM), restock=False)
    assert await service.refunds.refund(wish)
    assert await account.current_status() is Status.REFUNDED
    await account.is_lost_with_its_sale()
    await service.rebuild.run(sale_id, operator="op")
    service.catalog.forget(sale_id)
    assert await account.current_status() is Status.AWAITING_DEPOSIT
    assert await service.settlement.deposit(account.order.order_id) is Status.REFUNDED
    await account.is_refunded(units=99)


async def test_an_account_with_a_refused_cancel_closes_after_its_reversal(
    account: Account, overtaken_by: Callable[[Callable[[], Awaitable[None]]], None]
) -> None:
    """The PG refuses to cancel what is paid, and repeats a refusal for its idempotency key."""
    service, order_id = account.service, account.order.order_id

    async def is_paid() -> None:
        account.sandbox.deposit(account.payment_key)

    await account.is_due()
    overtaken_by(is_paid)
    assert await service.settlement.deposit(order_id) is None
    assert await service.settlement.deposit(order_id) is Status.CONFIRMED
    account.sandbox.deposit(account.payment_key, reverse=True)
    assert await account.notify()
    assert await account.current_status() is Status.AWAITING_DEPOSIT
    assert await service.settlement.deposit(order_id) is Status.EXPIRED
    ledger = account.sandbox.ledger(order_id)
    assert ledger["charged"] == ledger["cancelled"]


async def test_a_deposit_webhook_of_an_order_lost_by_redis_is_retried(account: Account) -> None:
    await account.is_written()
    await account.is_lost()
    account.sandbox.deposit(account.payment_key)
    assert not await account.notify()


async def test_a_webhook_for_an_attempt_without_an_order_is_retried(
    account: Account,
) -> None:
    """SQL has its attempt, and no event of the order yet."""
    await account.is_lost()
    assert not await account.notify()
    await account.service.notifications.receive(account.order.order_id, "tboxforged0123456789")


async def test_webhooks_with_forged_keys_do_not_block_a_genuine_deposit(
    account: Account,
) -> None:
    account.sandbox.deposit(account.payment_key)
    webhook, sale_id = account.service.notifications, account.order.sale_id
    forged = [f"{sale_id}-{number:024}" for number in range(4 * SQL_ALL.count)]
    acknowledged = await asyncio.gather(
        *(webhook.receive(order_id, "tboxforged0123456789") for order_id in forged),
        return_exceptions=True,
    )
    # SQL was not queried for all of them.
    assert sum(isinstance(one, Unavailable) for one in acknowledged) >= SQL_ALL.count
    assert await account.notify()
    assert await account.current_status() is Status.CONFIRMED


async def begun(account: Account, *, restock: bool) -> RefundRecord:
    """A refund whose process died before its call to the PG."""
    wish = msgspec.structs.replace(refund_wish(account.order), restock=restock)
    now_ms = account.service.clock.now_ms()
    record = await account.service.sql.refunds.begin(wish.written(), now_ms=now_ms)
    assert isinstance(record, RefundRecord)
    return record


class SetClock:
    """A monotonic clock that the test sets; the wall clock is the machine's."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def now_ms(self) -> int:
        return SystemClock().now_ms()

    def monotonic(self) -> float:
        return self.seconds


async def test_an_overdue_undecided_account_is_checked_with_growing_pauses(
    account: Account,
) -> None:
    """It stays due: without a pause the PG would be polled in a tight loop."""
    service, clock = account.service, SetClock()
    settler = Settler(service.store, service.settlement, clock=clock)
    await account.is_due()
    account.inject_fault("error_before_commit", times=None)
    checks = []
    for _ in range(80):
        if await settler.run_once(account.order.sale_id):
            checks.append(clock.seconds - 100)
        clock.seconds += 1
    assert checks == [0, 1, 3, 7, 15, 31, 61]
    assert await account.current_status() is Status.AWAITING_DEPOSIT
    account.sandbox.clear_faults()
    clock.seconds += 30
    assert await settler.run_once(account.order.sale_id) == 1
    assert await account.current_status() is Status.EXPIRED
    assert await settler.run_once(account.order.sale_id) == 0


async def test_an_overdue_undecided_account_raises_an_alarm(
    account: Account,
) -> None:
    """Its units stay held, and no other check reports it."""
    account.inject_fault("error_before_commit", times=None)
    deposit = account.service.settlement.deposit
    with raising(Alarm.PAYMENT_UNDECIDED, times=0):
        assert await deposit(account.order.order_id) is None
    await account.is_due()
    with raising(Alarm.PAYMENT_UNDECIDED):
        assert await deposit(account.order.order_id) is None


#: Two 404s at any distance count.
IMPATIENT = msgspec.structs.replace(LIMITS, missing_apart_seconds=0.0)


def is_unknown_to_the_pg(account: Account, patch: pytest.MonkeyPatch) -> None:
    """The PG answers 404 for the account, by its key and by its order; it shows other payments."""
    gateway = account.service.gateway
    look_up, look_up_order = gateway.look_up, gateway.look_up_order

    async def by_key(payment_key: str) -> Answer:
        if payment_key == account.payment_key:
            return PaymentMissing("NOT_FOUND_PAYMENT")
        return await look_up(payment_key)

    async def by_order(order_id: str) -> Answer:
        if order_id == account.order.order_id:
            return PaymentMissing("NOT_FOUND_PAYMENT")
        return await look_up_order(order_id)

    patch.setattr(gateway, "look_up", by_key)
    patch.setattr(gateway, "look_up_order", by_order)


def is_two_days_later(account: Account, patch: pytest.MonkeyPatch) -> None:
    """By the service's clock: the account is past its due date."""
    clock = account.service.clock
    now_ms = clock.now_ms
    patch.setattr(clock, "now_ms", lambda: now_ms() + 2 * 86_400_000)


async def test_an_overdue_account_proven_unknown_to_the_pg_expires(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_account(tmp_path, valkey_url, IMPATIENT) as account:
        service, order_id = account.service, account.order.order_id
        is_unknown_to_the_pg(account, monkeypatch)
        for _ in range(3):
            # Not due yet: its buyer may still pay.
            assert await service.settlement.deposit(order_id) is None
        is_two_days_later(account, monkeypatch)
        assert await service.settlement.deposit(order_id) is Status.EXPIRED
        # Late money is looked for, as after each end without an answer that proves it.
        checks = await service.sql.payments.list_due_checks(10**15, 10)
        assert [check.payment_key for check in checks] == [account.payment_key]
        await account.is_written()
        assert (await service.audit.run(account.order.sale_id)).problems == ()


async def test_an_overdue_account_unknown_to_the_pg_is_listed(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The PG shows no other payment of ours: the API key may be another merchant's by now."""
    async with open_account(tmp_path, valkey_url, IMPATIENT) as account:
        service, order_id = account.service, account.order.order_id
        service.health._seen_until = 0.0
        is_unknown_to_the_pg(account, monkeypatch)
        await account.is_written()
        assert (await service.audit.run(account.order.sale_id)).problems == ()
        is_two_days_later(account, monkeypatch)
        for _ in range(3):
            assert await service.settlement.deposit(order_id) is None
        [problem] = (await service.audit.run(account.order.sale_id)).problems
        assert order_id in problem
        assert "AWAITING_DEPOSIT" in problem
        found = await service.store.read(order_id)
        assert found is not None
        assert "The history has the PG's answers" in await service.explain.next_step(found)


async def _away(*_: Any, **__: Any) -> None:
    raise OperationalError("INSERT", {}, OSError("SQL is away"))


async def test_an_answer_about_the_account_resets_the_count_of_404s(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """404, ten minutes later an open account whose cancel is unanswered, a second later 404."""
    async with open_account(tmp_path, valkey_url, LIMITS) as account:
        service, order_id = account.service, account.order.order_id
        now_ms, past_ms = service.clock.now_ms, [2 * 86_400_000]
        monkeypatch.setattr(service.clock, "now_ms", lambda: now_ms() + past_ms[0])
        with pytest.MonkeyPatch.context() as patch:
            is_unknown_to_the_pg(account, patch)
            assert await service.settlement.deposit(order_id) is None
        past_ms[0] += 600_000

        async def unanswered(**_: object) -> Answer:
            return Unknown("504")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(service.gateway, "cancel", unanswered)
            assert await service.settlement.deposit(order_id) is None
        past_ms[0] += 1_000
        with pytest.MonkeyPatch.context() as patch:
            is_unknown_to_the_pg(account, patch)
            assert await service.settlement.deposit(order_id) is None


async def test_an_account_ended_by_404s_is_checked_twice_more(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lookups of the open account do not count."""
    async with open_account(tmp_path, valkey_url, IMPATIENT) as account:
        service, order_id = account.service, account.order.order_id
        payments = service.sql.payments

        async def is_checked_now() -> None:
            for check in await payments.list_due_checks(10**15, 10):
                await payments.reschedule_check(check, 1, check.looks)
            await service.recheck.run_once()

        for _ in range(3):
            await is_checked_now()
        is_unknown_to_the_pg(account, monkeypatch)
        is_two_days_later(account, monkeypatch)
        assert await service.settlement.deposit(order_id) is None
        assert await service.settlement.deposit(order_id) is Status.EXPIRED
        await is_checked_now()
        assert await payments.list_due_checks(10**15, 10)
        await is_checked_now()
        assert await payments.list_due_checks(10**15, 10) == []
