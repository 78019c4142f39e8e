"""Concurrency: never more holds than units, and every unit has an owner.

The crowd goes through HTTP; the limit of connections is the client's, not the service's.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.service import Served, item

pytestmark = pytest.mark.system

PIECES = 100
BUYERS = 500
#: Requests in progress at once: far more than the service has processes, and few enough that one
#: client process is not the bottleneck.
CONNECTIONS = 64
COPIES = 20
#: For three sales of every unit, on a busy machine.
WAVES_SECONDS_MAX = 120.0
#: Of a request that is shed.
PATIENCE_SECONDS = 20.0
CRLF = "\r\n"


class Answer:
    """An answer to a member of the crowd."""

    def __init__(self, head: bytes, body: bytes) -> None:
        status, _, fields = head.decode("latin-1").partition("\r\n")
        self.status_code = int(status.split(" ")[1])
        self.headers = {
            name.lower(): value
            for name, _, value in (field.partition(": ") for field in fields.split("\r\n"))
        }
        self.content: dict[str, Any] = json.loads(body)

    @property
    def kind(self) -> str:
        """The order's status, or the refusal's code."""
        return self.content.get("code") or self.content["status"]


class Crowd:
    """Prepares by the thousand over a bounded number of connections.

    A client library takes three times as long for a request as the service does, so that the
    crowd would come one by one.
    """

    def __init__(self, served: Served) -> None:
        self.served = served
        self._address = urlsplit(served.url)
        self._free: asyncio.LifoQueue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
        self._free = asyncio.LifoQueue()

    async def open(self, connections: int = CONNECTIONS) -> None:
        for _ in range(connections):
            connection = await asyncio.open_connection(self._address.hostname, self._address.port)
            self._free.put_nowait(connection)

    async def aclose(self) -> None:
        while not self._free.empty():
            _, writer = self._free.get_nowait()
            writer.close()
            await writer.wait_closed()

    async def prepare(
        self, sale_id: str, buyer: dict[str, str], body: dict[str, Any], *, key: str = "k"
    ) -> Answer:
        """One prepare, repeated as clients do while the service sheds load on a busy machine."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = await self._prepare_once(sale_id, buyer, body, key)
            if answer.status_code != 503 or time.monotonic() > give_up_at:
                return answer
            await asyncio.sleep(float(answer.headers["retry-after"]))

    async def _prepare_once(
        self, sale_id: str, buyer: dict[str, str], body: dict[str, Any], key: str
    ) -> Answer:
        content = json.dumps(body)
        lines = (
            f"POST /v1/sales/{sale_id}/reservations HTTP/1.1",
            f"Host: {self._address.netloc}",
            f"Authorization: {buyer['Authorization']}",
            f"Idempotency-Key: {key}",
            "Content-Type: application/json",
            f"Content-Length: {len(content)}",
        )
        reader, writer = connection = await self._free.get()
        writer.write(f"{CRLF.join(lines)}{CRLF}{CRLF}{content}".encode())
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])  # type: ignore[index]
            answer = Answer(head[:-4], await reader.readexactly(length))
        # Not after an error: the rest of its answer would be the next one's.
        self._free.put_nowait(connection)
        return answer


@pytest.fixture
async def crowd(served: Served) -> AsyncIterator[Crowd]:
    crowd = Crowd(served)
    await crowd.open()
    yield crowd
    await crowd.aclose()


@pytest.fixture
async def http(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=CONNECTIONS)
    async with httpx.AsyncClient(
        base_url=served.url, limits=limits, timeout=30, trust_env=False
    ) as client:
        yield client


def wish(*lines: tuple[str, int]) -> dict[str, Any]:
    return {
        "items": [{"sku": sku, "quantity": quantity} for sku, quantity in lines],
        "amount": sum(1000 * quantity for _, quantity in lines),
    }


def kinds(answers: Iterable[Answer]) -> Counter[str]:
    return Counter(answer.kind for answer in answers)


def assert_adds_up(report: dict[str, Any]) -> None:
    assert report["ok"], report["problems"]
    for row in report["skus"]:
        counters = (row["available"], row["held"], row["sold"])
        assert sum(counters) == row["total"], row
        assert min(counters) >= 0, row


async def test_five_hundred_buyers_get_exactly_a_hundred_units(
    served: Served, crowd: Crowd
) -> None:
    sale_id = served.sale(items=[item("a", total=PIECES)])
    answers = await asyncio.gather(
        *(crowd.prepare(sale_id, served.buyer(), wish(("a", 1))) for _ in range(BUYERS))
    )
    assert kinds(answers) == {"HELD": PIECES, "sold_out": BUYERS - PIECES}
    assert len({a.content["orderId"] for a in answers if a.status_code == 201}) == PIECES
    assert served.stock(sale_id) == (0, PIECES, 0)
    assert_adds_up(served.audit(sale_id))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("pieces", [1, PIECES])
@pytest.mark.parametrize(
    "rounds", [pytest.param(10, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)]
)
async def test_each_unit_is_held_once_in_every_round(
    served: Served, pieces: int, rounds: int
) -> None:
    """Each of the five hundred clients has its own connection, and all arrive at once."""
    crowd = Crowd(served)
    await crowd.open(BUYERS)
    for _ in range(rounds):
        sale_id = served.sale(items=[item("a", total=pieces)])
        answers = await asyncio.gather(
            *(crowd.prepare(sale_id, served.buyer(), wish(("a", 1))) for _ in range(BUYERS))
        )
        assert kinds(answers) == {"HELD": pieces, "sold_out": BUYERS - pieces}
        assert len({a.content["orderId"] for a in answers if a.status_code == 201}) == pieces
        assert served.stock(sale_id) == (0, pieces, 0)
        assert_adds_up(served.audit(sale_id))
    await crowd.aclose()


async def test_baskets_of_several_items_are_held_completely(served: Served, crowd: Crowd) -> None:
    """Half want `b` first and half want it last, so that no order of items decides."""
    sale_id = served.sale(items=[item("a", total=PIECES), item("b", total=2 * PIECES), item("c")])
    baskets = [
        (("a", 1), ("b", 2)),
        (("b", 2), ("a", 1)),
        (("c", 1), ("b", 1), ("a", 1)),
    ]
    answers = await asyncio.gather(
        *(
            crowd.prepare(sale_id, served.buyer(), wish(*baskets[number % 3]))
            for number in range(BUYERS)
        )
    )
    counted = kinds(answers)
    assert set(counted) == {"HELD", "sold_out"}
    # Every basket has one unit of `a`, of which there are least: all of them go.
    assert counted["HELD"] == PIECES
    held = Counter[str]()
    for answer in answers:
        for line in answer.content["items"] if answer.status_code == 201 else ():
            held[line["sku"]] += line["quantity"]
    for sku, total in (("a", PIECES), ("b", 2 * PIECES), ("c", 100)):
        assert served.stock(sale_id, sku) == (total - held[sku], held[sku], 0)
    assert_adds_up(served.audit(sale_id))


async def test_twenty_copies_of_a_request_make_one_hold(served: Served, crowd: Crowd) -> None:
    sale_id = served.sale(items=[item("a", total=PIECES)])

    async def copies() -> list[Answer]:
        buyer, body = served.buyer(), wish(("a", 1))
        return await asyncio.gather(
            *(crowd.prepare(sale_id, buyer, body, key="same") for _ in range(COPIES))
        )

    groups = await asyncio.gather(*(copies() for _ in range(BUYERS)))
    won = [group for group in groups if any(answer.status_code == 201 for answer in group)]
    assert len(won) == PIECES
    for group in won:
        # A repeated request gets the same answer, from every process.
        assert {answer.status_code for answer in group} == {201}
        assert len({answer.content["orderId"] for answer in group}) == 1
        replayed = [answer.headers.get("idempotent-replayed") for answer in group]
        assert replayed.count(None) == 1
    for group in groups:
        if group not in won:
            assert kinds(group) == {"sold_out": COPIES}
    assert served.stock(sale_id) == (0, PIECES, 0)
    assert_adds_up(served.audit(sale_id))


async def test_units_of_expiring_holds_are_sold_once(
    served: Served, crowd: Crowd, http: httpx.AsyncClient
) -> None:
    """Holds last a second and the crowd comes in waves, so that reaper and prepare meet."""
    sale_id = served.sale(holdSeconds=1, items=[item("a", total=PIECES)])
    path = f"/v1/admin/sales/{sale_id}/audit"
    done = asyncio.Event()
    orders: set[str] = set()
    audits = 0

    async def waves() -> None:
        began = time.monotonic()
        # Each unit is held three times and read meanwhile; a slow machine takes longer.
        while len(orders) < 3 * PIECES or audits < 3:
            assert time.monotonic() - began < WAVES_SECONDS_MAX
            wave = [crowd.prepare(sale_id, served.buyer(), wish(("a", 1))) for _ in range(150)]
            for answer in await asyncio.gather(*wave):
                assert answer.kind in {"HELD", "sold_out"}, answer.content
                if answer.kind == "HELD":
                    orders.add(answer.content["orderId"])
        done.set()

    async def sample() -> None:
        nonlocal audits
        while not done.is_set():
            report = (await http.get(path, headers=served.admin)).json()
            assert_adds_up(report)
            assert report["skus"][0]["held"] <= PIECES
            audits += 1
            await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as both:
        both.create_task(waves())
        both.create_task(sample())
    assert_adds_up(served.audit(sale_id))
    assert never_more_than(PIECES, await lives(http, served, sale_id))


async def lives(http: httpx.AsyncClient, served: Served, sale_id: str) -> list[tuple[str, str]]:
    """When each order began to hold and when it ended, as SQL has it."""
    spans: list[tuple[str, str]] = []
    query: dict[str, Any] = {"saleId": sale_id, "limit": 100}
    while True:
        page = (await http.get("/v1/admin/orders", params=query, headers=served.admin)).json()
        for order in page["orders"]:
            ended = order["status"] == "EXPIRED"
            spans.append((order["createdAt"], order["updatedAt"] if ended else "9"))
        if page["nextCursor"] is None:
            return spans
        query["cursor"] = page["nextCursor"]


def never_more_than(pieces: int, spans: list[tuple[str, str]]) -> bool:
    """Whether at no instant more orders were alive; an end and a beginning may share one."""
    steps = sorted([(at, 1) for at, _ in spans] + [(at, -1) for _, at in spans])
    alive = 0
    for _, step in steps:
        alive += step
        if alive > pieces:
            return False
    return True


async def test_concurrent_payments_and_releases_keep_the_books_balanced(
    served: Served, crowd: Crowd, http: httpx.AsyncClient
) -> None:
    """Winners pay, release or fail at once, while losers retry for returned units."""
    sale_id = served.sale(items=[item("a", total=30)])

    async def buyer(number: int) -> str:
        header = served.buyer()
        for attempt in range(20):
            answer = await crowd.prepare(sale_id, header, wish(("a", 1)), key=str(attempt))
            if answer.status_code == 201:
                return await outcome(answer.content, number)
            await asyncio.sleep(0.02)
        return "nothing"

    async def outcome(order: dict[str, Any], number: int) -> str:
        match number % 3:
            case 0:
                await http.post(
                    f"/v1/reservations/{order['orderId']}/release",
                    content=order["token"],
                    headers={"Content-Type": "text/plain"},
                )
            case 1:
                await http.get(order["payment"]["failUrl"])
            case _:
                sandbox = order["payment"]["checkoutUrl"].removesuffix("/checkout")
                body = {"orderId": order["orderId"], "amount": 1000}
                paid = (await http.post(f"{sandbox}/_payments", json=body)).json()
                await http.get(served.success_url(order, paid["paymentKey"]))
        path = f"/v1/reservations/{order['orderId']}"
        headers = {"X-Reservation-Token": order["token"]}
        return (await http.get(path, headers=headers)).json()["status"]

    ends = Counter(await asyncio.gather(*(buyer(number) for number in range(120))))
    assert set(ends) <= {"RELEASED", "CONFIRMED", "nothing"}
    sold = ends["CONFIRMED"]
    assert 0 < sold <= 30
    assert served.stock(sale_id) == (30 - sold, 0, sold)
    assert_adds_up(served.audit(sale_id))
