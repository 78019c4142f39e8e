"""Webhooks: each event at least once, in order for each order, whatever receivers do."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from standardwebhooks import Webhook

from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.webhook_rows import EndpointChange, EndpointRow
from reservation.adapters.webhooks.sender import Attempt, WebhookSender
from reservation.application.events.endpoints import WebhookEndpoints
from reservation.application.events.feed import EventFeed
from reservation.domain.clock import SystemClock
from reservation.domain.errors import InvalidWebhookEndpoint, WebhookEndpointDisabled
from reservation.domain.webhooks import RETRIES, RetrySchedule
from reservation.workers.webhooks import Webhooks
from tests.support.outbox import Tape
from tests.support.webhook_receiver import Receiver, receiving

CLOCK = SystemClock()
#: Three days in a few seconds.
FAST = RetrySchedule((0.01, 0.02, 0.05, 0.1))
#: For receivers that never respond: with as many attempts as a busy machine may need.
HASTY_SECONDS = 0.5
PATIENT = RetrySchedule((0.05,) * 500)


@pytest.fixture
async def sender() -> AsyncIterator[WebhookSender]:
    sender = WebhookSender(allow_private=True)
    yield sender
    await sender.aclose()


@pytest.fixture
async def hasty() -> AsyncIterator[WebhookSender]:
    sender = WebhookSender(allow_private=True, attempt_seconds=HASTY_SECONDS)
    yield sender
    await sender.aclose()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
async def tape(sql: SqlStore) -> Tape:
    await sql.sales.register("s", "{}", 1)
    tape = Tape("s")
    tape.put(a=100_000)
    return tape


async def add(
    sql: SqlStore, sender: WebhookSender, url: str, *events: str, **more: Any
) -> EndpointRow:
    change = EndpointChange(
        url=url,
        events=events or ("*",),
        sale_id=more.get("sale_id"),
        description="",
        enabled=True,
    )
    return await WebhookEndpoints(sql, sender, clock=CLOCK).create(change, "op")


def worker(
    sql: SqlStore, sender: WebhookSender, name: str = "w-1", schedule: RetrySchedule = FAST
) -> Webhooks:
    return Webhooks(
        sql,
        EventFeed(sql),
        sender,
        clock=CLOCK,
        name=name,
        has=lambda _: True,
        schedule=schedule,
    )


@asynccontextmanager
async def delivering(
    sql: SqlStore, sender: WebhookSender, schedule: RetrySchedule = FAST
) -> AsyncIterator[Webhooks]:
    running = worker(sql, sender, schedule=schedule)
    await running.run_once()
    try:
        yield running
    finally:
        await running.aclose()


async def publish(sql: SqlStore, tape: Tape) -> None:
    for start in range(0, len(tape.events), 1_000):
        await sql.events.apply(tape.sale_id, tape.events[start : start + 1_000])
    while await sql.feed.assign():
        pass


async def eventually(read: Callable[[], Awaitable[Any]], wanted: Callable[[Any], bool]) -> Any:
    async with asyncio.timeout(60):
        while True:
            if wanted(found := await read()):
                return found
            await asyncio.sleep(0.02)


async def until_delivered(sql: SqlStore, endpoint: EndpointRow, count: int) -> None:
    async def delivered() -> int:
        rows = await sql.webhooks.page(
            endpoint.endpoint_id, status="delivered", before=None, limit=10_000
        )
        return len(rows)

    await eventually(delivered, lambda found: found == count)


async def test_an_independent_library_verifies_each_webhook(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    tape.sell("s-1", a=1)
    await publish(sql, tape)
    async with delivering(sql, sender):
        await receiver.until(lambda found: len(found) >= 2)
    library = Webhook(endpoint.secret)
    for one in receiver.received:
        assert library.verify(one.body, one.headers) == one.document
    held, confirmed = (one.document for one in receiver.received)
    assert held["data"]["reservation"]["status"] == "HELD"
    assert set(confirmed) == {
        "type",
        "timestamp",
        "id",
        "saleId",
        "partition",
        "seq",
        "epoch",
        "data",
    }
    assert (held["type"], confirmed["type"]) == ("reservation.held", "order.confirmed")
    assert receiver.received[0].headers["content-type"] == "application/json"


async def test_an_endpoint_gets_only_its_types_and_its_sale(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    await sql.sales.register("t", "{}", 1)
    other = Tape("t")
    other.put(a=5)
    other.sell("t-1", a=1)
    await add(sql, sender, receiver.url, "order.confirmed", sale_id="s")
    tape.sell("s-1", a=1)
    await publish(sql, other)
    await publish(sql, tape)
    async with delivering(sql, sender):
        await receiver.until(lambda found: len(found) >= 1)
    assert [one.document["data"]["reservation"]["orderId"] for one in receiver.received] == ["s-1"]


async def test_events_from_before_the_endpoint_come_only_with_a_replay(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    tape.prepare("s-1", a=1)
    await publish(sql, tape)
    endpoint = await add(sql, sender, receiver.url)
    tape.prepare("s-2", a=1)
    await publish(sql, tape)
    async with delivering(sql, sender):
        await receiver.until(lambda found: len(found) >= 1)
        assert receiver.ids == ["evt_3"]
        await WebhookEndpoints(sql, sender, clock=CLOCK).replay(endpoint.endpoint_id, 0, "op")
        await receiver.until(lambda found: len(found) >= 3)
    assert receiver.ids == ["evt_3", "evt_2", "evt_3"]
    assert receiver.received[0].body == receiver.received[2].body


@pytest.mark.parametrize("fault", [500, 404, "reset", "redirect"])
async def test_a_failed_delivery_is_repeated_under_its_id(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape, fault: int | str
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    receiver.faults = [fault, fault]
    tape.prepare("s-1", a=1)
    tape.move("released", "s-1", "HELD", "RELEASED", cause="buyer")
    await publish(sql, tape)
    async with delivering(sql, sender):
        await until_delivered(sql, endpoint, 2)
    assert receiver.ids == ["evt_2", "evt_2", "evt_2", "evt_3"]
    assert len({one.body for one in receiver.received[:3]}) == 1


@pytest.mark.parametrize("fault", ["hang", "drip"])
async def test_a_receiver_that_does_not_end_its_response_is_given_up(
    sql: SqlStore, hasty: WebhookSender, receiver: Receiver, tape: Tape, fault: str
) -> None:
    endpoint = await add(sql, hasty, receiver.url)
    receiver.faults = [fault, fault]
    tape.prepare("s-1", a=1)
    tape.move("released", "s-1", "HELD", "RELEASED", cause="buyer")
    await publish(sql, tape)
    async with delivering(sql, hasty, PATIENT):
        await until_delivered(sql, endpoint, 2)
    assert receiver.ids == sorted(receiver.ids)
    assert receiver.ids.count("evt_2") >= 3


async def test_a_delivery_fails_after_its_last_attempt_and_the_next_one_follows(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    receiver.faults = [500] * 5
    tape.prepare("s-1", a=1)
    tape.move("released", "s-1", "HELD", "RELEASED", cause="buyer")
    await publish(sql, tape)
    async with delivering(sql, sender):
        await until_delivered(sql, endpoint, 1)
    (failed,) = await sql.webhooks.page(
        endpoint.endpoint_id, status="failed", before=None, limit=10
    )
    assert (failed.event_id, failed.attempts, failed.status_code) == (2, 5, 500)
    assert receiver.ids == ["evt_2"] * 5 + ["evt_3"]


async def test_a_failed_delivery_can_be_sent_again(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    receiver.faults = [500] * 5
    tape.prepare("s-1", a=1)
    await publish(sql, tape)
    endpoints = WebhookEndpoints(sql, sender, clock=CLOCK)
    async with delivering(sql, sender):
        rows = await eventually(
            lambda: sql.webhooks.page(endpoint.endpoint_id, status="failed", before=None, limit=10),
            lambda rows: len(rows) == 1,
        )
        await endpoints.resend(rows[0].delivery_id, "op")
        await until_delivered(sql, endpoint, 1)
    assert receiver.ids == ["evt_2"] * 6


async def test_retry_after_delays_the_next_attempt(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    receiver.always, receiver.response_headers = 503, {"Retry-After": "3600"}
    tape.prepare("s-1", a=1)
    await publish(sql, tape)
    async with delivering(sql, sender):
        (row,) = await eventually(
            lambda: sql.webhooks.page(endpoint.endpoint_id, status=None, before=None, limit=9),
            lambda rows: rows and rows[0].attempts == 1,
        )
    assert row.next_at_ms - (row.attempted_at_ms or 0) == pytest.approx(3_600_000, abs=1)


async def test_gone_disables_the_endpoint_and_keeps_its_deliveries(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    receiver.faults = [410]
    tape.prepare("s-1", a=1)
    await publish(sql, tape)
    async with delivering(sql, sender) as running:
        found = await eventually(
            lambda: sql.webhooks.get(endpoint.endpoint_id), lambda row: row and not row.enabled
        )
        assert found.disabled_reason == "410 Gone"
        with pytest.raises(WebhookEndpointDisabled):
            await WebhookEndpoints(sql, sender, clock=CLOCK).test(endpoint.endpoint_id, "op")
        change = msgspec.convert(
            {name: getattr(endpoint, name) for name in EndpointChange.__struct_fields__},
            EndpointChange,
        )
        await running.run_once()
        await WebhookEndpoints(sql, sender, clock=CLOCK).change(endpoint.endpoint_id, change, "op")
        await running.run_once()
        await until_delivered(sql, endpoint, 1)
    assert receiver.ids == ["evt_2", "evt_2"]


class CountingSender(WebhookSender):
    """A sender that counts the attempts that are made at the same time."""

    def __init__(self, url: str) -> None:
        super().__init__(allow_private=True, attempt_seconds=HASTY_SECONDS)
        self._url = url
        self._active = 0
        self.active_max = 0

    async def send(self, url: str, headers: dict[str, str], body: bytes) -> Attempt:
        if url != self._url:
            return await super().send(url, headers, body)
        self._active += 1
        self.active_max = max(self.active_max, self._active)
        try:
            return await super().send(url, headers, body)
        finally:
            self._active -= 1


async def test_a_dead_endpoint_delays_no_other(
    sql: SqlStore, receiver: Receiver, tape: Tape
) -> None:
    async with receiving() as dead:
        dead.always = "hang"
        counting = CountingSender(dead.url)
        await add(sql, counting, dead.url)
        endpoint = await add(sql, counting, receiver.url)
        for number in range(100):
            tape.prepare(f"s-{number}", a=1)
        await publish(sql, tape)
        async with delivering(sql, counting, PATIENT):
            await until_delivered(sql, endpoint, 100)
        assert counting.active_max == 8
        await counting.aclose()


async def test_a_success_leaves_the_deliveries_of_a_refused_order_to_their_schedule(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    running = worker(sql, sender, schedule=RetrySchedule((3_600.0,) * 3))
    receiver.always = 500
    for number in range(5):
        tape.prepare(f"s-{number}", a=1)
    await publish(sql, tape)
    await running.run_once()
    await eventually(
        lambda: sql.webhooks.list_pending(endpoint.endpoint_id, 10),
        lambda rows: len(rows) == 5 and all(row.attempts == 1 for row in rows),
    )
    receiver.always = None
    rows = await sql.webhooks.list_pending(endpoint.endpoint_id, 10)
    await sql.webhooks.resend(rows[0].delivery_id, CLOCK.now_ms())
    await until_delivered(sql, endpoint, 1)
    row = await sql.webhooks.get(endpoint.endpoint_id)
    assert row is not None
    assert row.failing_since_ms is None
    left = await sql.webhooks.list_pending(endpoint.endpoint_id, 10)
    assert [one.attempts for one in left] == [1, 1, 1, 1]
    # An operator who enables the endpoint again sends all that wait.
    definition = EndpointChange(
        url=row.url, events=row.events, sale_id=None, description="", enabled=False
    )
    for enabled in (False, True):
        change = msgspec.structs.replace(definition, enabled=enabled)
        assert await sql.webhooks.change(endpoint.endpoint_id, change, CLOCK.now_ms())
    await until_delivered(sql, endpoint, 5)
    await running.aclose()


async def test_a_repeated_rotation_keeps_the_secret_that_receivers_have(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    endpoints = WebhookEndpoints(sql, sender, clock=CLOCK)
    await endpoints.rotate(endpoint.endpoint_id, "op")
    await endpoints.rotate(endpoint.endpoint_id, "op")
    tape.prepare("s-1", a=1)
    await publish(sql, tape)
    async with delivering(sql, sender):
        await receiver.until(lambda found: len(found) == 1)
    (one,) = receiver.received
    Webhook(endpoint.secret).verify(one.body, one.headers)


async def test_a_rotated_secret_signs_beside_the_new_one(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    rotated = await WebhookEndpoints(sql, sender, clock=CLOCK).rotate(endpoint.endpoint_id, "op")
    tape.prepare("s-1", a=1)
    await publish(sql, tape)
    async with delivering(sql, sender):
        await receiver.until(lambda found: len(found) == 1)
    (one,) = receiver.received
    assert len(one.headers["webhook-signature"].split()) == 2
    for secret in (endpoint.secret, rotated.secret):
        Webhook(secret).verify(one.body, one.headers)


async def test_a_test_webhook_arrives_and_is_logged(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver
) -> None:
    endpoint = await add(sql, sender, receiver.url, "order.confirmed")
    row = await WebhookEndpoints(sql, sender, clock=CLOCK).test(endpoint.endpoint_id, "op")
    async with delivering(sql, sender):
        await until_delivered(sql, endpoint, 1)
    assert receiver.ids == [row.message_id]
    assert receiver.received[0].document["type"] == "webhook.test"


async def test_one_process_at_a_time_sends_to_an_endpoint(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    ids, now_ms = [endpoint.endpoint_id], 1_000
    lease = sql.webhooks.lease
    assert await lease(ids, holder="a", now_ms=now_ms, until_ms=2_000) == ids
    assert await lease(ids, holder="b", now_ms=now_ms + 999, until_ms=3_000) == []
    assert await lease(ids, holder="a", now_ms=now_ms + 999, until_ms=3_500) == ids
    assert await lease(ids, holder="b", now_ms=3_500, until_ms=5_000) == ids
    await sql.webhooks.release(ids, holder="b")
    assert await lease(ids, holder="a", now_ms=3_501, until_ms=6_000) == ids


async def test_a_worker_that_dies_loses_no_event_and_keeps_the_order(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    orders = 60
    for number in range(orders):
        tape.sell(f"s-{number}", a=1)
    await publish(sql, tape)
    for life in range(4):
        running = worker(sql, sender, f"w-{life}")
        await running.run_once()
        seen = len(receiver.received)
        await receiver.until(lambda found, seen=seen: len(found) >= seen + 15)
        # As a killed process: nothing more is recorded, and its lease is left to end.
        for one in running._running.values():
            assert one.task is not None
            one.task.cancel()
        await sql.webhooks.release([endpoint.endpoint_id], holder=f"w-{life}")
    async with delivering(sql, sender):
        await until_delivered(sql, endpoint, 2 * orders)
    arrived: dict[str, list[str]] = {}
    for one in receiver.received:
        document = one.document
        types = arrived.setdefault(document["data"]["reservation"]["orderId"], [])
        if document["type"] not in types:
            types.append(document["type"])
    assert len(arrived) == orders
    assert set(map(tuple, arrived.values())) == {("reservation.held", "order.confirmed")}


async def test_the_log_of_deliveries_is_bounded(
    sql: SqlStore, sender: WebhookSender, receiver: Receiver, tape: Tape
) -> None:
    endpoint = await add(sql, sender, receiver.url)
    for number in range(20):
        tape.prepare(f"s-{number}", a=1)
    await publish(sql, tape)
    async with delivering(sql, sender):
        await until_delivered(sql, endpoint, 20)
    assert await sql.webhooks.prune(endpoint.endpoint_id, before_ms=0, keep=5) == 15
    assert await sql.webhooks.prune(endpoint.endpoint_id, before_ms=0, keep=5) == 0
    rows = await sql.webhooks.page(endpoint.endpoint_id, status=None, before=None, limit=50)
    assert [row.event_id for row in rows] == [21, 20, 19, 18, 17]
    now_ms = CLOCK.now_ms()
    assert await sql.webhooks.prune(endpoint.endpoint_id, before_ms=now_ms + 1, keep=50) == 5


@pytest.mark.parametrize(
    ("url", "events"),
    [
        ("ftp://shop.example/hook", ["*"]),
        ("https://shop.example/hook", []),
        ("https://shop.example/hook", ["*", "order.confirmed"]),
        ("https://shop.example/hook", ["order.paid"]),
        ("https://user:secret@shop.example/hook", ["*"]),
        ("https://169.254.169.254/latest", ["*"]),
    ],
)
async def test_an_invalid_endpoint_is_refused(
    sql: SqlStore, sender: WebhookSender, url: str, events: list[str]
) -> None:
    change = EndpointChange(
        url=url, events=tuple(events), sale_id=None, description="", enabled=True
    )
    with pytest.raises(InvalidWebhookEndpoint):
        await WebhookEndpoints(sql, sender, clock=CLOCK).create(change, "op")
    assert await sql.webhooks.list_all() == []


def test_the_retries_last_about_three_days() -> None:
    total = sum(RETRIES.pause(attempt, 0.5) or 0 for attempt in range(1, 20))
    assert 2.8 * 86_400 < total < 3.2 * 86_400
