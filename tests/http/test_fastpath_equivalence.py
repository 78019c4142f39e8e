"""Fast path of a prepare: answers byte for byte as the route, and takes only its own cases."""

import asyncio
import itertools
import re
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest
import uvicorn

from api.http.app import create_app
from api.http.auth.guests import Guests
from api.http.connection.protocol import HttpProtocol
from api.http.fastpath import load_shedding
from reservation.adapters.redis import prepare_queue as batch
from reservation.config.settings import Settings
from reservation.domain.errors import RateLimited, SoldOut
from tests.support.service import item, sale_document

SHOP = "https://shop.example"
START_SECONDS = 20.0
#: The differences between two orders of one wish, in the order in which they are masked.
VARYING = (
    (re.compile(rb"(?m)^date: .*\r$"), b"date: D\r"),
    (re.compile(rb"w\d[0-9a-f]{8}-[A-Za-z0-9_-]{24}"), b"ORDER"),
    (re.compile(rb"w\d[0-9a-f]{8}"), b"SALE"),
    (re.compile(rb"v1\.[\w-]+\.[\w-]+\.[\w-]+"), b"TOKEN"),
    (re.compile(rb'"customerKey":"[\w-]{32}"'), b'"customerKey":"C"'),
    (re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"), b"TIME"),
    (re.compile(rb'("instance":"|x-request-id: )[\w-]{16}'), rb"\1ID"),
)


class Counting:
    """The fast path, counting the requests it takes."""

    def __init__(self, path: Any) -> None:
        self._path = path
        self.accepts = path.accepts
        self.taken = 0

    def take(self, *given: Any) -> bool:
        taken = self._path.take(*given)
        self.taken += taken
        return taken


class Ways:
    """A served application whose fast path can be closed."""

    def __init__(self, settings: Settings, app: Any) -> None:
        self.settings = settings
        self.app = app
        path = app.state.prepare_path
        self.path: Any = None if path is None else Counting(path)
        self.admin = {"Authorization": f"Bearer {settings.admin_api_key}", "X-Operator": "tests"}

    async def sale(self, mark: str, **changes: Any) -> str:
        sale_id = f"w{mark}{secrets.token_hex(4)}"
        async with httpx.AsyncClient(base_url=self.settings.public_url, trust_env=False) as http:
            answer = await http.put(
                f"/v1/admin/sales/{sale_id}", json=sale_document(**changes), headers=self.admin
            )
            assert answer.status_code == 201, answer.text
            # Known to the process, as each sale is after its first request.
            await http.get(f"/v1/sales/{sale_id}")
        return sale_id

    async def connect(
        self, *, short: bool = True
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection with or without the fast path."""
        self.app.state.prepare_path = self.path if short else None
        port = int(self.settings.public_url.rpartition(":")[2])
        return await asyncio.open_connection("127.0.0.1", port)

    async def talk(self, requests: list[bytes], *, short: bool, at_once: bool) -> list[bytes]:
        """The answers on one connection with or without the fast path."""
        reader, writer = await self.connect(short=short)
        answers: list[bytes] = []
        try:
            if at_once:
                writer.write(b"".join(requests))
            for request in requests:
                if not at_once:
                    writer.write(request)
                answers.append(await _answer(reader))
        finally:
            writer.close()
        return answers


async def _answer(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(30):
        head = await reader.readuntil(b"\r\n\r\n")
        found = re.search(rb"(?m)^content-length: (\d+)\r$", head)
        if found is None:
            assert head.startswith(b"HTTP/1.1 204 "), head
            return head
        body = await reader.readexactly(int(found[1]))
    # Sequence numbers and tokens differ in length between two orders.
    return head.replace(found[0], b"content-length: fits\r") + body


@pytest.fixture
async def ways(tmp_path: Path, valkey_url: str) -> AsyncIterator[Ways]:
    async with serving(tmp_path, valkey_url) as served:
        yield served


@asynccontextmanager
async def serving(tmp_path: Path, valkey_url: str, **changes: str) -> AsyncGenerator[Ways]:
    """The application in this process, behind the server that `reservation serve` uses."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = str(listening.getsockname()[1])
    settings = Settings.load(
        {
            "RESERVATION_DATA_DIR": str(tmp_path),
            "RESERVATION_REDIS_URL": valkey_url,
            "RESERVATION_TOSS_API_URL": "http://127.0.0.1:9",
            "RESERVATION_PORT": port,
            "RESERVATION_CORS_ORIGINS": SHOP,
            "RESERVATION_PREPARE_RATE": "4/min",
            **changes,
        },
        None,
    )
    app = create_app(settings)
    config = uvicorn.Config(app, http=HttpProtocol, ws="none", lifespan="on", log_config=None)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        async with asyncio.timeout(START_SECONDS):
            while not server.started:
                assert not serving.done(), serving.exception()
                await asyncio.sleep(0.02)
        yield Ways(settings, app)
    finally:
        server.should_exit = True
        await serving


Prepare = dict[str, Any]


def prepare(token: str, sale_id: str, mark: str, change: Prepare) -> bytes:
    """One request's bytes; a change replaces a part of a good one."""
    body = change.get("body", {"items": [{"sku": "a", "quantity": 1}], "amount": 1000})
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    headers: list[tuple[str, str | None]] = [
        ("Host", "127.0.0.1"),
        ("Authorization", change.get("authorization", "Bearer {token}").format(token=token)),
        ("Idempotency-Key", change.get("key", "one")),
        ("Content-Type", change.get("content_type", "application/json")),
        *change.get("more", []),
    ]
    if not change.get("chunked"):
        headers.append(("Content-Length", str(len(content))))
    else:
        headers.append(("Transfer-Encoding", "chunked"))
        content = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
    path = change.get("path", "/v1/sales/{sale}/reservations").format(sale=sale_id)
    version = change.get("version", "1.1")
    lines = [f"{change.get('method', 'POST')} {path} HTTP/{version}"]
    lines += [f"{name}: {value}" for name, value in headers if value is not None]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def basket(*lines: tuple[str, int], amount: int, **more: Any) -> Prepare:
    items = [{"sku": sku, "quantity": quantity} for sku, quantity in lines]
    return {"body": {"items": items, "amount": amount, **more}}


ITEMS = [item("a"), item("b", price=700), item("rare", total=1)]
#: The requests on one connection, changes of the sale, and how many take the fast path.
CASES: dict[str, tuple[list[Prepare], dict[str, Any], int]] = {
    "a hold": ([{}], {}, 1),
    "a replay": ([{}, {}], {}, 2),
    "a name of the buyer's own": ([basket(("a", 1), amount=1000, orderName='"é" \\ 한')], {}, 1),
    "several lines": ([basket(("a", 2), ("b", 1), ("a", 1), amount=3700)], {}, 1),
    "another body": ([{}, basket(("a", 2), amount=2000)], {}, 2),
    "sold out": ([basket(("rare", 2), amount=2000)], {}, 1),
    "the limit": ([basket(("a", 11), amount=11000)], {}, 1),
    "a wrong amount": ([basket(("a", 1), amount=999)], {}, 1),
    "an unknown item": ([basket(("zzz", 1), amount=999)], {}, 1),
    "an unknown item behind a known one": ([basket(("a", 1), ("z", 1), amount=9)], {}, 1),
    # Above the rate a repeat is looked up first, on the route.
    "too fast": ([{"key": str(number)} for number in range(5)], {}, 4),
    "too fast, and a repeat": ([{"key": str(number)} for number in (0, 1, 2, 3, 2)], {}, 4),
    "too fast, and no JSON": (
        [*({"key": str(number)} for number in range(4)), {"key": "4", "body": b"{"}],
        {},
        4,
    ),
    "a bad key and a bad body": ([{"key": "", "body": b"{"}], {}, 1),
    "nothing is held": ([{}, {}], {"holdPolicy": "success"}, 2),
    "not open": ([{}], {"opensAt": "2190-01-01T00:00:00Z", "closesAt": "2190-01-02T00:00:00Z"}, 1),
    "over": ([{}], {"opensAt": "2020-01-01T00:00:00Z", "closesAt": "2020-01-02T00:00:00Z"}, 1),
    "no admission": ([{}], {"requireAdmission": True}, 1),
    "a made-up admission": (
        [{"more": [("X-Sale-Admission", "a.1.b")]}],
        {"requireAdmission": True},
        1,
    ),
    "an id of the caller's": ([{"more": [("X-Request-Id", "my-own-id.01")]}], {}, 1),
    "no id at all": ([{"more": [("X-Request-Id", "no way!")]}], {}, 1),
    "the shop's browser": ([{"more": [("Origin", SHOP)]}] * 2, {}, 2),
    "a refusal to the shop's browser": (
        [{"key": str(n), "more": [("Origin", SHOP)]} for n in range(5)],
        {},
        4,
    ),
    "another page's browser": ([{"more": [("Origin", "https://evil.example")]}], {}, 0),
    "the last request": ([{"more": [("Connection", "close")]}], {}, 1),
    "chunks": ([{"chunked": True}], {}, 1),
    "a form's content type": ([{"content_type": "application/x-www-form-urlencoded"}], {}, 1),
    "a file's content type": ([{"content_type": "multipart/form-data; boundary=x"}], {}, 1),
    "no content type": ([{"content_type": None}], {}, 1),
    "a bearer in small letters": ([{"authorization": "bearer   {token} "}], {}, 1),
    "no bearer": ([{"authorization": "Basic abc"}], {}, 1),
    "an empty bearer": ([{"authorization": "Bearer "}], {}, 1),
    "a made-up bearer": ([{"authorization": "Bearer made.up.token"}], {}, 1),
    "a changed bearer": ([{"authorization": "Bearer {token}x"}], {}, 1),
    "a bearer twice": ([{"more": [("Authorization", "Bearer x")]}], {}, 0),
    "no key": ([{"key": None}], {}, 1),
    "an empty key": ([{"key": ""}], {}, 1),
    "a long key": ([{"key": "k" * 256}], {}, 1),
    "the longest key": ([{"key": "k" * 255}], {}, 1),
    "a key that is not ASCII": ([{"key": "kéy"}], {}, 1),
    "no sale": ([{"path": "/v1/sales/nothing/reservations"}], {}, 0),
    "no sale's id": ([{"path": "/v1/sales/no%20thing/reservations"}], {}, 0),
    "a coded sale's id": ([{"path": "/v1/sales/%77{sale}/reservations"}], {}, 0),
    "a query": ([{"path": "/v1/sales/{sale}/reservations?a=b"}], {}, 0),
    "a slash more": ([{"path": "/v1/sales/{sale}/reservations/"}], {}, 0),
    "a slash inside": ([{"path": "/v1/sales/{sale}//reservations"}], {}, 0),
    "another method": ([{"method": "PUT"}], {}, 0),
    "a preflight": ([{"method": "OPTIONS", "more": [("Origin", SHOP)]}], {}, 0),
    "an older protocol": ([{"version": "1.0"}], {}, 0),
    "no JSON": ([{"body": b"{"}], {}, 1),
    "nothing": ([{"body": b""}], {}, 1),
    "no text": ([{"body": b'{"items":[{"sku":"\xff","quantity":1}],"amount":1}'}], {}, 1),
    "an unknown field": ([basket(("a", 1), amount=1000, hurry=True)], {}, 1),
    "no quantity": ([basket(("a", 0), amount=1000)], {}, 1),
    "a number in quotes": ([basket(("a", "1"), amount=1000)], {}, 1),  # pyright: ignore[reportArgumentType]
    "too much": ([{"body": b" " * 20_000}], {}, 0),
    "much, and good": (
        [{"body": b" " * 5_000 + msgspec.json.encode(basket(("a", 1), amount=1000)["body"])}],
        {},
        0,
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_fast_path_and_route_give_equal_responses(ways: Ways) -> None:
    for name, (changes, sale, takes) in CASES.items():
        for at_once in (False, True)[: len(changes)]:
            seen: list[list[bytes]] = []
            for mark, short in (("1", True), ("2", False)):
                sale_id = await ways.sale(mark, **{"items": ITEMS, **sale})
                _, token = Guests(ways.settings).new("")
                ways.path.taken = 0
                requests = [prepare(token, sale_id, mark, change) for change in changes]
                answers = await ways.talk(requests, short=short, at_once=at_once)
                seen.append([plain(answer) for answer in answers])
                if short:
                    # Requests behind one in progress take the route, in their turn.
                    assert ways.path.taken == takes or (at_once and takes > 1), name
                else:
                    assert ways.path.taken == 0, name
            assert seen[0] == seen[1], name
            assert all(answer.startswith(b"HTTP/1.1 ") for answer in seen[0]), name


class Reasons(NamedTuple):
    """The reasons for a refusal that apply to one request, in no order."""

    full_queue: bool
    bad_token: bool
    rate_limit_refusal: bool
    unknown_sale: bool
    bad_body: bool
    unknown_item: bool
    closed: bool

    @property
    def expected(self) -> tuple[int, str]:
        """The refusal by the order of the contract."""
        # A sale that is not known has no queue.
        if self.full_queue and not self.unknown_sale:
            return 503, "unavailable"
        order = [
            (self.bad_token, 401, "unauthenticated"),
            (self.rate_limit_refusal, 429, "rate_limited"),
            (self.unknown_sale, 404, "sale_not_found"),
            (self.bad_body, 400, "malformed_request"),
            (self.unknown_item, 404, "sku_not_found"),
            (self.closed, 410, "sale_closed"),
        ]
        return next(((status, code) for applies, status, code in order if applies), (201, ""))


COMBINATIONS = [Reasons(*reasons) for reasons in itertools.product((False, True), repeat=7)]


async def test_fast_path_and_route_send_the_same_first_refusal(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = {"opensAt": "2020-01-01T00:00:00Z", "closesAt": "2020-01-02T00:00:00Z"}
    sales = {(mark, True): await ways.sale(mark, items=ITEMS, **over) for mark in ("1", "2")}
    sales |= {(mark, False): await ways.sale(mark, items=ITEMS) for mark in ("1", "2")}
    queue_bound = batch.WAITING_MAX
    for number, reasons in enumerate(COMBINATIONS):
        monkeypatch.setattr(batch, "WAITING_MAX", 0 if reasons.full_queue else queue_bound)
        seen: list[bytes] = []
        for mark, short in (("1", True), ("2", False)):
            request = _request(ways, reasons, sales[mark, reasons.closed], f"{mark}-{number}")
            [answer] = await ways.talk([request], short=short, at_once=False)
            seen.append(plain(answer))
        assert seen[0] == seen[1], reasons
        status, code = reasons.expected
        head, _, content = seen[0].partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status), (reasons, seen[0])
        assert msgspec.json.decode(content).get("code", "") == code, reasons


def _request(ways: Ways, reasons: Reasons, sale_id: str, key: str) -> bytes:
    buyer_id, token = Guests(ways.settings).new("")
    api = ways.app.state.api
    while reasons.rate_limit_refusal and not api.prepares.wait(
        buyer_id, api.service.clock.monotonic()
    ):
        pass
    change: Prepare = {"key": key}
    if reasons.bad_token:
        change["authorization"] = "Bearer {token}x"
    if reasons.unknown_item:
        change |= basket(("zzz", 1), amount=1000)
    if reasons.bad_body:
        change["body"] = b"{"
    return prepare(token, "wXnone" if reasons.unknown_sale else sale_id, "", change)


def plain(answer: bytes) -> bytes:
    for pattern, put in VARYING:
        answer = pattern.sub(put, answer)
    return answer


async def test_fast_path_and_route_shed_load_equally(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await ways.sale("1")
    _, token = Guests(ways.settings).new("")
    monkeypatch.setattr(batch, "WAITING_MAX", 0)
    ways.path.taken = 0
    request = [prepare(token, sale_id, "1", {"key": "k", "more": [("Origin", SHOP)]})]
    seen = [
        [plain(answer) for answer in await ways.talk(request, short=short, at_once=False)]
        for short in (True, False)
    ]
    assert ways.path.taken == 1
    assert seen[0] == seen[1]
    assert seen[0][0].startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1\r\n" in seen[0][0]


async def test_every_excess_prepare_is_refused_over_several_turns(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    sale_id = await ways.sale("1")
    _, token = Guests(ways.settings).new("")
    monkeypatch.setattr(batch, "WAITING_MAX", 0)
    monkeypatch.setattr(load_shedding, "REFUSALS_PER_TURN", 3)
    streams = [await ways.connect() for _ in range(50)]
    for number, (_, writer) in enumerate(streams):
        writer.write(prepare(token, sale_id, "1", {"key": f"k-{number}"}))
    streams[7][1].transport.abort()
    for number, (reader, writer) in enumerate(streams):
        if number != 7:
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 503 ")
            writer.close()
    assert await _in_stock(ways, sale_id) == 100


async def test_without_the_fast_path_the_route_answers_each_prepare(
    tmp_path: Path, valkey_url: str
) -> None:
    async with serving(tmp_path, valkey_url, RESERVATION_FAST_PATH="off") as ways:
        assert ways.app.state.prepare_path is None
        sale_id = await ways.sale("1")
        _, token = Guests(ways.settings).new("")
        request = prepare(token, sale_id, "1", {})
        answers = await ways.talk([request, request], short=True, at_once=False)
        assert [answer[:13] for answer in answers] == [b"HTTP/1.1 201 "] * 2
        assert b"idempotent-replayed: true\r\n" in answers[1]


async def test_a_disconnected_buyer_does_not_affect_others(ways: Ways) -> None:
    sale_id = await ways.sale("1")
    _, token = Guests(ways.settings).new("")
    _, writer = await ways.connect()
    writer.write(prepare(token, sale_id, "1", {"key": "gone"}))
    await writer.drain()
    writer.transport.abort()
    # The hold may exist; its key finds it.
    answers = await ways.talk(
        [prepare(token, sale_id, "1", {"key": "gone"})], short=True, at_once=False
    )
    assert answers[0].startswith(b"HTTP/1.1 201 ")
    assert await _in_stock(ways, sale_id) == 99


async def test_a_body_can_arrive_in_pieces(ways: Ways) -> None:
    sale_id = await ways.sale("1")
    _, token = Guests(ways.settings).new("")
    reader, writer = await ways.connect()
    request = prepare(token, sale_id, "1", {})
    for start in range(0, len(request), 50):
        writer.write(request[start : start + 50])
        await writer.drain()
        await asyncio.sleep(0.002)
    assert (await _answer(reader)).startswith(b"HTTP/1.1 201 ")
    writer.close()


async def _in_stock(ways: Ways, sale_id: str) -> int:
    async with httpx.AsyncClient(base_url=ways.settings.public_url, trust_env=False) as http:
        sale = (await http.get(f"/v1/sales/{sale_id}")).json()
    return sale["items"][0]["available"]


async def test_a_cached_body_is_parsed_again_for_another_sale(ways: Ways) -> None:
    sale_id = await ways.sale("1")
    endpoint = ways.app.state.prepare_endpoint
    known = ways.app.state.api.service.catalog.cached(sale_id)
    body = msgspec.json.encode(basket(("a", 1), amount=1000)["body"])
    assert endpoint.wish(known, "ann", body, None) is endpoint.wish(known, "bob", body, None)
    renamed = tuple(msgspec.structs.replace(one, name="New") for one in known.sale.items)
    sale = msgspec.structs.replace(known.sale, items=renamed)
    # Lost and rebuilt, a sale may reach the same version by another path.
    again = msgspec.structs.replace(known, sale=sale, epoch="another")
    assert endpoint.wish(again, "ann", body, None).order_name == "New"


async def test_admitted_buyers_share_a_parsed_body(ways: Ways) -> None:
    sale_id = await ways.sale("1")
    endpoint, service = ways.app.state.prepare_endpoint, ways.app.state.api.service
    known = service.catalog.cached(sale_id)
    body = msgspec.json.encode(basket(("a", 1), amount=1000)["body"])
    now_ms = service.clock.now_ms()
    shown = {
        buyer_id: service.signer.admission(known.sale.page, buyer_id, now_ms=now_ms).encode()
        for buyer_id in ("ann", "bob")
    }
    admitted = endpoint.wish(known, "ann", body, shown["ann"])
    assert (admitted.admitted, endpoint.wish(known, "bob", body, shown["bob"])) == (True, admitted)
    assert endpoint.wish(known, "eve", body, shown["ann"]).admitted is False
    assert endpoint.wish(known, "eve", body, b"made.up.one").admitted is False


async def test_only_shared_refusals_are_cached_with_their_encoding(ways: Ways) -> None:
    path = ways.app.state.prepare_path
    with pytest.raises(RateLimited) as caught:
        raise RateLimited(retryAfter=1)
    assert path.refused(caught.value, b"", "the-id")[0] == 429
    assert path._refusals == {}
    shared = SoldOut(available={"a": 0}, nextDeadline=None)
    [first, second] = [
        path.refused(shared, b"", its_id)[1] for its_id in ("an-id-001", "an-id-002")
    ]
    assert first.replace(b"an-id-001", b"an-id-002") == second
    assert list(path._refusals) == [(shared, 9)]
    [head, content] = path.refused(shared, b"", "a-longer-one")[1].split(b"\r\n\r\n")
    assert f"content-length: {len(content)}\r\n".encode() in head


async def test_the_fast_path_reports_an_outage_as_503(ways: Ways) -> None:
    path = ways.app.state.prepare_path
    assert path.refused(TimeoutError(), b"", "an-id-001")[0] == 503
    assert path.refused(RuntimeError(), b"", "an-id-001")[0] == 500
