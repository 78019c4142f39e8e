"""Requests to release an account or to resolve a payment, over each death of a process."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import OperationalError

from reservation import failpoints
from reservation.adapters.sql.tables import order_requests
from reservation.bootstrap import Service
from reservation.domain.errors import Unavailable
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.workers.settler import Settler
from tests.faults.payments.shop import (
    LIMITS,
    approve,
    current_status,
    kept_money,
    shop,
    wait_for_status,
)
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

PATIENCE_SECONDS = 20.0


class Died(BaseException):
    """Nothing in the service may catch this."""


class Scene:
    """One order, and the processes that work on it."""

    def __init__(self, bench: Bench, sandbox: RunningSandbox) -> None:
        self.bench = bench
        self.service: Service = bench.service
        self.sandbox = sandbox

    async def awaiting(self) -> tuple[Reservation, str]:
        """An order whose buyer has an open virtual account."""
        order = await self.bench.hold(await self.bench.sale(virtual_accounts=True))
        key = self.sandbox.put_payment(order.order_id, order.amount, method="virtual_account")
        await self.service.confirmation.confirm(order, payment_key=key, may_claim=True)
        await wait_for_status(self.service, order, Status.AWAITING_DEPOSIT)
        return await self.now(order), key

    async def confirming(self, *, approved: bool = True) -> tuple[Reservation, str]:
        """An order whose process died after its claim; its lease has ended."""
        order = await self.bench.hold(await self.bench.sale())
        key = self.sandbox.put_payment(order.order_id, order.amount)
        await self.bench.claim(order, key)
        if approved:
            approve(self.sandbox, key, order)
        await self.lease_ends(order)
        return await self.now(order), key

    async def now(self, order: Reservation) -> Reservation:
        found = await self.service.store.read(order.order_id)
        assert found is not None
        return found

    async def lease_ends(self, order: Reservation) -> None:
        key = self.service.keys.of(order.sale_id).confirming
        await self.service.connections.command("ZADD", key, "XX", 1, order.order_id)

    async def all_due(self) -> None:
        """The leases of dead processes on requests end."""
        async with self.service.sql.database.write() as connection:
            await connection.execute(update(order_requests).values(due_at_ms=0))

    async def requests(self, order: Reservation) -> list[Any]:
        async with self.service.sql.database.read() as connection:
            found = await connection.execute(
                select(order_requests).where(order_requests.c.order_id == order.order_id)
            )
            return list(found.all())

    def refuse_look_ups(self, order: Reservation, times: int = 1000) -> None:
        """The PG answers look-ups of the order with an error."""
        self.sandbox.order_fault(
            "error_before_commit", orderId=order.order_id, operations=["look_up"], times=times
        )

    async def quiet(self) -> None:
        """Wait until this process works on no request."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.service.requests._under_way:  # noqa: ASYNC110 - the condition has no event
                await asyncio.sleep(0.01)

    async def ended(self, order: Reservation) -> None:
        """Wait until this process has carried out the requests of the order."""
        await self.quiet()
        assert all(row.ended_at_ms is not None for row in await self.requests(order))

    async def carried_out(self, order: Reservation, *statuses: Status) -> None:
        """A worker carries the requests out until the order has one of these statuses."""
        await self.quiet()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                await self.all_due()
                await self.lease_ends(order)
                await self.service.requests.run_once()
                await self.quiet()
                rows = await self.requests(order)
                if all(row.ended_at_ms is not None for row in rows):
                    break
                await asyncio.sleep(0.01)
        assert await current_status(self.service, order) in statuses

    async def history(self, order: Reservation) -> list[tuple[str, dict[str, Any]]]:
        """The requests in the order's history."""
        await self.bench.flush(order.sale_id)
        rows = await self.service.sql.orders.history(order.order_id)
        return [(row.what, msgspec.json.decode(row.facts)) for row in rows if row.kind == "request"]

    async def audited(self, order: Reservation) -> None:
        await self.bench.flush(order.sale_id)
        assert await self.bench.audited(order.sale_id) == ()

    async def stock(self, order: Reservation) -> tuple[int, int, int]:
        sale = await self.service.sale_store.read(order.sale_id)
        assert sale is not None
        item = sale.items[0]
        return item.available, item.held, item.sold


@pytest.fixture
async def scene(tmp_path: Path, valkey_url: str) -> AsyncGenerator[Scene]:
    async with shop(tmp_path, valkey_url) as (bench, sandbox):
        yield Scene(bench, sandbox)


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.disarm()


def once(point: str, action: Callable[[], object]) -> None:
    """Run an action the first time that the point is passed."""

    def reached(_: str) -> None:
        failpoints.arm(point, lambda _: None)
        action()

    failpoints.arm(point, reached)


def dies() -> None:
    raise Died


async def test_a_released_account_is_cancelled_at_the_pg(scene: Scene) -> None:
    order, key = await scene.awaiting()
    await scene.service.requests.release(order)
    await scene.ended(order)
    assert await current_status(scene.service, order) is Status.RELEASED
    assert scene.sandbox.http.get(f"/v1/payments/{key}").json()["status"] == "CANCELED"
    assert await scene.stock(order) == (100, 0, 0)
    assert await scene.history(order) == [
        ("release", {"by": "buyer"}),
        ("ended", {"request": "release", "status": "RELEASED", "by": "buyer"}),
    ]
    events = await scene.service.sql.orders.history(order.order_id)
    assert '"cause":"buyer"' in events[-2].facts + events[-1].facts + events[-3].facts
    await scene.audited(order)


async def test_an_operators_release_is_recorded_with_who_and_why(scene: Scene) -> None:
    order, _ = await scene.awaiting()
    await scene.service.requests.release(order, operator="김", reason="전화 요청")
    await scene.ended(order)
    assert await current_status(scene.service, order) is Status.RELEASED
    made, ended = await scene.history(order)
    assert made == ("release", {"operator": "김", "reason": "전화 요청"})
    assert ended[1]["status"] == "RELEASED"
    rows = await scene.service.sql.orders.history(order.order_id)
    (event,) = [row for row in rows if row.what == "declined"]
    facts = msgspec.json.decode(event.facts)
    assert (facts["cause"], facts["operator"], facts["note"]) == ("operator", "김", "전화 요청")


async def test_an_account_that_was_paid_before_its_release_is_sold(scene: Scene) -> None:
    order, key = await scene.awaiting()
    scene.sandbox.deposit(key)
    await scene.service.requests.release(order)
    await scene.ended(order)
    assert await current_status(scene.service, order) is Status.CONFIRMED
    assert kept_money(scene.sandbox, order) == order.amount
    assert (await scene.history(order))[-1][1]["status"] == "CONFIRMED"


@pytest.mark.parametrize("point", ["request:after_look_up", "cancel:after_bar"])
async def test_an_account_that_is_paid_while_it_is_cancelled_is_sold(
    scene: Scene, point: str
) -> None:
    order, key = await scene.awaiting()
    once(point, lambda: scene.sandbox.deposit(key))
    await scene.service.requests.release(order)
    await scene.carried_out(order, Status.CONFIRMED)
    assert kept_money(scene.sandbox, order) == order.amount
    assert await scene.stock(order) == (99, 0, 1)
    await scene.audited(order)


#: Each moment at which the process of a release may die.
RELEASE_POINTS = (
    "request:after_add",
    "request:after_look_up",
    "cancel:after_bar",
    "conclude:before_finish",
    "conclude:after_finish",
    "request:before_end",
)


@pytest.mark.slow
@pytest.mark.parametrize("deposited", [False, True])
@pytest.mark.parametrize("point", RELEASE_POINTS)
async def test_a_worker_completes_a_release_whose_process_died(
    scene: Scene, point: str, deposited: bool
) -> None:
    """With `deposited` the money comes after the death, where the account is still open then."""
    order, key = await scene.awaiting()
    once(point, dies)
    try:
        await scene.service.requests.release(order)
    except Died:
        assert point == "request:after_add"
    await scene.quiet()
    assert [row.ended_at_ms for row in await scene.requests(order)] == [None]
    was_open = (
        scene.sandbox.http.get(f"/v1/payments/{key}").json()["status"] == "WAITING_FOR_DEPOSIT"
    )
    if deposited and was_open:
        scene.sandbox.deposit(key)
        await scene.carried_out(order, Status.CONFIRMED)
        assert kept_money(scene.sandbox, order) == order.amount
        assert await scene.stock(order) == (99, 0, 1)
    else:
        await scene.carried_out(order, Status.RELEASED)
        assert kept_money(scene.sandbox, order) == 0
        assert await scene.stock(order) == (100, 0, 0)
    await scene.audited(order)


async def test_a_repeated_release_is_one_request(scene: Scene) -> None:
    order, _ = await scene.awaiting()
    scene.refuse_look_ups(order, times=1)
    for _ in range(5):
        await scene.service.requests.release(order)
    await scene.carried_out(order, Status.RELEASED)
    assert len(await scene.requests(order)) == 1


async def test_a_release_waits_while_the_pg_does_not_answer(scene: Scene) -> None:
    """An unknown outcome stays a state: the order keeps its units."""
    order, key = await scene.awaiting()
    scene.refuse_look_ups(order)
    await scene.service.requests.release(order)
    await scene.all_due()
    await scene.service.requests.run_once()
    await scene.quiet()
    assert await current_status(scene.service, order) is Status.AWAITING_DEPOSIT
    assert [row.ended_at_ms for row in await scene.requests(order)] == [None]
    assert await scene.stock(order) == (99, 1, 0)
    scene.sandbox.clear_faults()
    scene.sandbox.deposit(key)
    await scene.carried_out(order, Status.CONFIRMED)


async def test_a_request_that_sql_cannot_store_changes_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, key = await scene.awaiting()

    async def away(**_: object) -> None:
        raise OperationalError("INSERT", {}, Exception("away"))

    with monkeypatch.context() as patch:
        patch.setattr(scene.service.sql.order_requests, "add", away)
        with pytest.raises(Unavailable):
            await scene.service.requests.release(order)
    assert await current_status(scene.service, order) is Status.AWAITING_DEPOSIT
    status = scene.sandbox.http.get(f"/v1/payments/{key}").json()["status"]
    assert status == "WAITING_FOR_DEPOSIT"


async def test_resolve_settles_a_payment_that_the_pg_shows(scene: Scene) -> None:
    order, _ = await scene.confirming()
    await scene.service.requests.resolve(order, operator="Kim", reason="the buyer called")
    assert await current_status(scene.service, order) is Status.CONFIRMED
    await scene.ended(order)
    assert await scene.history(order) == [
        ("resolve", {"operator": "Kim", "reason": "the buyer called"}),
        ("ended", {"request": "resolve", "status": "CONFIRMED", "operator": "Kim"}),
    ]


async def test_resolve_does_not_wait_for_the_end_of_a_pause(
    tmp_path: Path, valkey_url: str
) -> None:
    """The settler found the PG unreachable, and would look again in a minute."""
    slow = msgspec.structs.replace(LIMITS, pause_least_seconds=60.0, pause_most_seconds=60.0)
    async with shop(tmp_path, valkey_url, limits=slow) as (bench, sandbox):
        scene = Scene(bench, sandbox)
        order, _ = await scene.confirming()
        settler = Settler(scene.service.store, scene.service.settlement, clock=bench.service.clock)
        scene.refuse_look_ups(order)
        await settler.run_once(order.sale_id)
        sandbox.clear_faults()
        assert await settler.run_once(order.sale_id) == 0
        assert await current_status(scene.service, order) is Status.CONFIRMING
        order = await scene.now(order)
        await scene.service.requests.resolve(order, operator="Kim", reason="x")
        assert await current_status(scene.service, order) is Status.CONFIRMED


async def test_resolve_leaves_a_payment_alone_while_its_confirm_is_sent(scene: Scene) -> None:
    order = await scene.bench.hold(await scene.bench.sale())
    key = scene.sandbox.put_payment(order.order_id, order.amount)
    await scene.bench.claim(order, key)
    order = await scene.now(order)
    await scene.service.requests.resolve(order, operator="Kim", reason="x")
    after = await scene.now(order)
    assert (after.status, after.fence) == (Status.CONFIRMING, order.fence)
    assert [row.ended_at_ms for row in await scene.requests(order)] == [None]
    approve(scene.sandbox, key, order)
    await scene.carried_out(order, Status.CONFIRMED)


async def test_resolve_of_an_open_account_only_looks(scene: Scene) -> None:
    order, key = await scene.awaiting()
    await scene.service.requests.resolve(order, operator="Kim", reason="x")
    await scene.ended(order)
    assert await current_status(scene.service, order) is Status.AWAITING_DEPOSIT
    status = scene.sandbox.http.get(f"/v1/payments/{key}").json()["status"]
    assert status == "WAITING_FOR_DEPOSIT"
    assert (await scene.history(order))[-1][1]["status"] == "AWAITING_DEPOSIT"
    scene.sandbox.deposit(key)
    await scene.service.requests.resolve(order, operator="Kim", reason="again")
    assert await current_status(scene.service, order) is Status.CONFIRMED


async def test_resolve_of_an_order_without_a_payment_changes_nothing(scene: Scene) -> None:
    order = await scene.bench.hold(await scene.bench.sale())
    await scene.service.requests.resolve(order, operator="Kim", reason="x")
    assert await current_status(scene.service, order) is Status.HELD
    assert await scene.requests(order) == []


#: Each moment at which the process of a resolve may die.
RESOLVE_POINTS = (
    "request:after_add",
    "settle:after_take_over",
    "settle:after_look_up",
    "settle:after_intent",
    "conclude:before_finish",
    "conclude:after_finish",
    "request:before_end",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "approved"),
    # A payment that the PG shows as paid is not confirmed again.
    [
        *((point, False) for point in RESOLVE_POINTS),
        *((point, True) for point in RESOLVE_POINTS if point != "settle:after_intent"),
    ],
)
async def test_a_worker_completes_a_resolve_whose_process_died(
    scene: Scene, point: str, approved: bool
) -> None:
    """Unapproved, the settler sends the confirm again: the money moves once."""
    order, _ = await scene.confirming(approved=approved)
    once(point, dies)
    try:
        await scene.service.requests.resolve(order, operator="Kim", reason="x")
    except Died:
        assert point == "request:after_add"
    assert [row.ended_at_ms for row in await scene.requests(order)] == [None]
    await scene.carried_out(order, Status.CONFIRMED)
    assert kept_money(scene.sandbox, order) == order.amount
    assert scene.sandbox.ledger(order.order_id)["charged"] == order.amount
    assert await scene.stock(order) == (99, 0, 1)
    await scene.audited(order)


async def test_two_workers_carry_a_request_out_once(scene: Scene) -> None:
    order, key = await scene.awaiting()
    once("request:after_add", dies)
    with pytest.raises(Died):
        await scene.service.requests.release(order)
    await scene.all_due()
    await asyncio.gather(*(scene.service.requests.run_once() for _ in range(4)))
    await scene.ended(order)
    cancels = scene.sandbox.http.get(f"/v1/payments/{key}").json()["cancels"]
    assert len(cancels) == 1
