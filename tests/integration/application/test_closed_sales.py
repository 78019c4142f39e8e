"""Orders of a sale whose state in Redis is older than in SQL."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from reservation.application.reservations import waits as waits_module
from reservation.application.reservations.queries import later_of
from reservation.bootstrap import opened
from reservation.domain.errors import AlreadyConfirmed, Unavailable
from reservation.domain.payment import Attempt, Cause, Outcome, PaymentOutcome, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from tests.support.acknowledgement import acknowledged_bench, reopened
from tests.support.in_process import Bench, bench
from tests.support.replication import Pair, pair

DECLINED = Outcome(name=PaymentOutcome.DECLINED, reason=Reason(Cause.PROVIDER_DECLINED, "NO_MONEY"))
FORGOTTEN = Outcome(name=PaymentOutcome.VOIDED, reason=Reason(Cause.INTENT_NOT_WRITTEN))
LONG_SECONDS = 30.0


@pytest.fixture
async def place(tmp_path: Path, valkey_url: str) -> AsyncIterator[Bench]:
    async with bench(tmp_path / "var", valkey_url) as found:
        yield found


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Pair]:
    with pair(tmp_path / "servers") as started:
        yield started


@pytest.fixture
async def acknowledged_place(tmp_path: Path, servers: Pair) -> AsyncIterator[Bench]:
    async with acknowledged_bench(servers, tmp_path / "var") as found:
        await reopened(found.service.connections)
        yield found


async def closed(place: Bench, sale_id: str) -> None:
    await place.service.redis_monitor.check_redis()
    assert sale_id in place.service.redis_monitor.gaps


async def paid_in_sql_alone(place: Bench) -> Reservation:
    """An order that is CONFIRMED in SQL and HELD again in Redis; its sale is closed."""
    order = await place.hold(await place.sale())
    memory = await place.remembered(order.sale_id)
    await place.finish(order, (await place.claim(order)).fence)
    await place.flush(order.sale_id)
    await place.put_back(order.sale_id, memory)
    await closed(place, order.sale_id)
    return order


async def found(place: Bench, order: Reservation) -> Reservation:
    seen = await place.service.queries.find(order.order_id)
    assert seen is not None
    return seen


async def test_an_order_paid_in_sql_but_held_in_redis_is_read_as_paid(place: Bench) -> None:
    order = await paid_in_sql_alone(place)
    seen = await found(place, order)
    assert seen.status is Status.CONFIRMED
    assert seen.payment_key is not None
    assert (await place.service.explain.next_step(seen)).startswith("CONFIRMED: sold")


async def test_a_buyers_list_shows_the_order_as_paid(place: Bench) -> None:
    order = await paid_in_sql_alone(place)
    listed = await place.service.queries.all_of_buyer(order.sale_id, order.buyer_id)
    assert [(one.order_id, one.status) for one in listed] == [(order.order_id, Status.CONFIRMED)]


async def test_a_buyers_list_contains_an_order_lost_by_redis(place: Bench) -> None:
    sale_id = await place.sale()
    first = await place.hold(sale_id)
    memory = await place.remembered(sale_id)
    second = await place.hold(sale_id)
    await place.flush(sale_id)
    await place.put_back(sale_id, memory)
    await closed(place, sale_id)
    listed = await place.service.queries.all_of_buyer(sale_id, "ann")
    assert {one.order_id for one in listed} == {first.order_id, second.order_id}


async def test_an_older_state_does_not_end_a_wait(
    place: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits_module, "POLL_SECONDS", 0.01)
    order = await paid_in_sql_alone(place)
    seen = await found(place, order)
    waiting = asyncio.create_task(place.service.queries.next_change(seen, LONG_SECONDS))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(waiting), 0.3)
    # The wait continues on the current sale.
    await place.service.rebuild.run(order.sale_id, operator="op")
    await place.service.redis_monitor.check_redis()
    known = await place.service.catalog.get(order.sale_id)
    now = await place.service.store.read(order.order_id)
    assert now is not None
    await place.service.store.refund(
        now, epoch=known.epoch, restock=True, reason=Reason(Cause.OPERATOR, operator="op")
    )
    async with asyncio.timeout(LONG_SECONDS):
        assert (await waiting).status is Status.REFUNDED


async def test_a_paid_order_is_not_released(place: Bench) -> None:
    order = await paid_in_sql_alone(place)
    seen = await found(place, order)
    kept = await place.service.releases.if_held(seen, reason=Reason(Cause.PAYMENT_PAGE))
    assert kept.status is Status.CONFIRMED


async def test_an_order_paid_in_sql_is_no_next_deadline_of_its_item(place: Bench) -> None:
    order = await paid_in_sql_alone(place)
    assert (await place.service.explain.item(order.sale_id, "a")).next_deadlines == ()


async def test_an_order_paid_by_another_process_is_read_as_paid(place: Bench) -> None:
    """The numbers of Redis' events pass those of SQL, and the events differ."""
    sale_id = await place.sale()
    order = await place.hold(sale_id)
    await place.flush(sale_id)
    memory = await place.remembered(sale_id)
    await place.finish(order, (await place.claim(order)).fence)
    await place.flush(sale_id)
    await place.put_back(sale_id, memory)
    # A process that has not seen the payment continues from there.
    async with opened(place.service.settings) as fresh:
        other = Bench(fresh)
        for _ in range(5):
            await other.hold(sale_id)
        await fresh.releases.release(order, reason=Reason(Cause.BUYER))
    in_redis = await place.service.store.read(order.order_id)
    row = await place.service.sql.orders.get(order.order_id)
    assert in_redis is not None
    assert row is not None
    assert (in_redis.status, row.status) == (Status.RELEASED, Status.CONFIRMED)
    assert in_redis.seq > row.seq
    await closed(place, sale_id)
    assert (await found(place, order)).status is Status.CONFIRMED


async def test_events_missing_in_sql_are_read_from_the_outbox(place: Bench) -> None:
    """Redis lost a change of one order, and SQL has yet to receive those of another."""
    sale_id = await place.sale()
    order = await place.hold(sale_id)
    claimed = await place.claim(order)
    await place.flush(sale_id)
    await place.finish(order, claimed.fence, DECLINED)
    known = await place.service.catalog.fresh(sale_id)
    place.service.data_loss.report(sale_id, known.epoch, "a test")
    seen = await found(place, order)
    assert (seen.status, len(seen.attempts)) == (Status.RELEASED, 1)


async def test_a_payment_voided_before_its_confirm_is_not_shown(place: Bench) -> None:
    """SQL has the claim, and has yet to receive the event that removes its payment."""
    sale_id = await place.sale()
    order = await place.hold(sale_id)
    claimed = await place.claim(order)
    await place.flush(sale_id)
    await place.finish(order, claimed.fence, FORGOTTEN)
    known = await place.service.catalog.fresh(sale_id)
    place.service.data_loss.report(sale_id, known.epoch, "a test")
    seen = await found(place, order)
    assert (seen.status, seen.payment_key) == (Status.HELD, None)


async def test_a_webhook_without_a_payment_key_is_retried(place: Bench) -> None:
    order = await paid_in_sql_alone(place)
    with pytest.raises(Unavailable):
        await place.service.notifications.receive(order.order_id, None, status="DONE")


def an_order(**changes: object) -> Reservation:
    made = Reservation(
        order_id="o",
        sale_id="s",
        buyer_id="b",
        status=Status.HELD,
        lines=(),
        amount=1000,
        currency="KRW",
        order_name="n",
        created_at_ms=1,
        updated_at_ms=1,
        expires_at_ms=2,
        seq=5,
    )
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("in_redis", "in_sql", "later"),
    [
        (None, an_order(seq=1), 1),
        (an_order(seq=5), an_order(seq=5), 5),
        (an_order(seq=4), an_order(seq=6, status=Status.CONFIRMED, payment_key="k"), 6),
        (an_order(seq=9, status=Status.RELEASED), an_order(seq=6, status=Status.EXPIRED), 9),
        # Another history in Redis: it never had the payment.
        (an_order(seq=9), an_order(seq=6, status=Status.CONFIRMED, payment_key="k"), 6),
        (
            an_order(seq=9, payment_key="l", attempts={"l": Attempt("declined").text()}),
            an_order(seq=6, status=Status.CONFIRMED, payment_key="k"),
            6,
        ),
        # The same history, further on.
        (
            an_order(seq=9, status=Status.REFUNDED, payment_key="k"),
            an_order(seq=6, status=Status.CONFIRMED, payment_key="k"),
            9,
        ),
        (
            an_order(seq=9, attempts={"k": Attempt("declined").text()}),
            an_order(seq=6, status=Status.CONFIRMING, payment_key="k"),
            9,
        ),
        # Its payment was voided before any money was requested; another one may have begun.
        (
            an_order(seq=9, fence=1),
            an_order(seq=6, status=Status.CONFIRMING, payment_key="k", fence=1),
            9,
        ),
        (
            an_order(seq=9, status=Status.CONFIRMING, payment_key="l", fence=2),
            an_order(seq=6, status=Status.CONFIRMING, payment_key="k", fence=1),
            9,
        ),
        # Another history in Redis: it never had the claim, or a payment that cannot be voided.
        (
            an_order(seq=9),
            an_order(seq=6, status=Status.CONFIRMING, payment_key="k", fence=1),
            6,
        ),
        (
            an_order(seq=9, fence=2),
            an_order(seq=6, status=Status.CONFIRMED, payment_key="k", fence=1),
            6,
        ),
    ],
)
def test_the_later_state_has_the_higher_seq_and_the_payment(
    in_redis: Reservation | None, in_sql: Reservation, later: int
) -> None:
    assert later_of(in_redis, in_sql).seq == later


@pytest.mark.system
async def test_a_paid_order_is_not_released_where_replicas_must_acknowledge(
    acknowledged_place: Bench,
) -> None:
    """The acknowledged read is of Redis alone, which has the older state."""
    order = await paid_in_sql_alone(acknowledged_place)
    seen = await found(acknowledged_place, order)
    releases = acknowledged_place.service.releases
    with pytest.raises(AlreadyConfirmed):
        await releases.release(seen, reason=Reason(Cause.BUYER))
    kept = await releases.if_held(seen, reason=Reason(Cause.PAYMENT_PAGE))
    assert kept.status is Status.CONFIRMED
    answered = await acknowledged_place.service.queries.acknowledged(seen)
    assert answered.status is Status.CONFIRMED
