"""The HTTP protocol of one connection, on a loop and a transport that the test drives."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from api.http.connection import exchange as http_exchange
from api.http.connection import protocol
from api.http.connection.connections import Connections
from api.http.connection.head import HEAD_BYTES_MAX, HEADERS_MAX
from api.http.connection.protocol import (
    HALF_CLOSED_SECONDS,
    LAST_REQUEST_SECONDS,
    LINGER_SECONDS,
    REQUEST_SECONDS,
    STALLED_SECONDS,
    HttpProtocol,
)
from tests.http.connection.streams import draw, segments

IDLE_SECONDS = 75
GET = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
NAMES = ["one", "two", "three"]


class Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """A loop whose clock the test advances."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []
        self.soon: deque[Callable[[], None]] = deque()

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + seconds, call))
        return self.timers[-1]

    def call_soon(self, call: Callable[[], None], **_: Any) -> None:
        self.soon.append(call)

    def turn(self) -> None:
        for _ in range(len(self.soon)):
            self.soon.popleft()()

    @property
    def armed(self) -> list[Timer]:
        return [timer for timer in self.timers if not timer.cancelled]

    def move(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.armed if timer.at <= self.now]
        self.timers = [timer for timer in self.armed if timer.at > self.now]
        for timer in due:
            timer.call()


class Transport:
    def __init__(self) -> None:
        self.protocol: Any = None
        self.closed = self.aborted = self.ended = self.paused = False
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True
        self.protocol.connection_lost(None)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False

    def get_extra_info(self, *_: object) -> None:
        return None

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written.append(data)

    @property
    def statuses(self) -> list[int]:
        return [int(data.split(b" ")[1]) for data in self.written if data.startswith(b"HTTP/1.1 ")]


class Path:
    """Accepts every request; the test answers it."""

    def __init__(self) -> None:
        self.taken: list[tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes]] = []
        self.asked: list[Any] = []

    def accepts(self, *_: object) -> bool:
        return True

    def take(self, head: Any, body: bytes, asked: Any) -> bool:
        self.taken.append((head.method, head.target, head.headers, body))
        self.asked.append(asked)
        return True

    def answer(self) -> None:
        """Answer the oldest open request."""
        self.asked.pop(0).write(204, b"x-test: 1\r\n\r\n")


class Connected:
    """A connection whose requests all take the direct path."""

    def __init__(self, connections: Connections) -> None:
        self.path, self.loop, self.transport = Path(), Loop(), Transport()
        application: Any = SimpleNamespace(state=SimpleNamespace(prepare_path=self.path))
        config = uvicorn.Config(application, ws="none", log_config=None, timeout_keep_alive=75)
        config.load()
        config.app = application
        self.state = ServerState()
        self.protocol: Any = HttpProtocol(config, self.state, {}, self.loop)  # type: ignore[arg-type]
        self.transport.protocol = self.protocol
        self.connections = connections
        self.protocol.connection_made(self.transport)

    def receive(self, *data: bytes) -> None:
        for piece in data:
            self.protocol.data_received(piece)

    def answer(self) -> None:
        self.path.answer()
        self.loop.turn()


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    made = Connections(limit=1_000)
    monkeypatch.setattr(protocol, "connections", made)
    return made


@pytest.fixture
def connected(connections: Connections) -> Connected:
    return Connected(connections)


def test_an_idle_connection_is_closed_at_its_timeout(connected: Connected) -> None:
    connected.receive(GET)
    connected.answer()
    connected.loop.move(IDLE_SECONDS - 1)
    assert not connected.transport.closed
    connected.loop.move(1)
    assert connected.transport.closed
    assert connected.transport.statuses == [204]


def test_a_busy_connection_stays_open_with_one_timer(connected: Connected) -> None:
    for _ in range(20):
        connected.receive(GET)
        connected.answer()
        assert len(connected.loop.armed) == 1
        connected.loop.move(IDLE_SECONDS - 1)
    assert not connected.transport.closed
    connected.loop.move(1)
    assert connected.transport.closed, "idle since the last answer, not since the timer was set"


def test_a_slow_request_does_not_count_as_idle(connected: Connected) -> None:
    connected.receive(GET)
    connected.loop.move(10 * IDLE_SECONDS)
    assert not connected.transport.closed
    connected.answer()
    connected.loop.move(IDLE_SECONDS)
    assert connected.transport.closed


def test_a_silent_connection_is_closed_without_a_response(connected: Connected) -> None:
    connected.loop.move(REQUEST_SECONDS)
    assert connected.transport.closed
    assert connected.transport.written == []


@pytest.mark.parametrize(
    "beginning",
    [
        GET[:5],
        GET[:-2],
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nabcd",
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab",
    ],
    ids=["a method", "a head", "a body", "a chunk"],
)
def test_an_incomplete_request_times_out(connected: Connected, beginning: bytes) -> None:
    connected.receive(GET)
    connected.answer()
    connected.loop.move(IDLE_SECONDS / 2)
    for piece in (beginning[:1], beginning[1:]):
        connected.receive(*[piece] * bool(piece))
        connected.loop.move(REQUEST_SECONDS / 2)
    assert connected.transport.statuses == [204, 408]
    assert connected.transport.ended
    connected.loop.move(LINGER_SECONDS)
    assert connected.transport.aborted


def test_empty_lines_do_not_start_a_request(connected: Connected) -> None:
    post = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nok"
    for number in range(20):
        connected.receive(post + b"\r\n" if number % 2 else b"\r\n" + post)
        connected.answer()
    connected.loop.move(REQUEST_SECONDS)
    assert not connected.transport.closed
    connected.loop.move(IDLE_SECONDS - REQUEST_SECONDS)
    assert connected.transport.closed
    assert connected.transport.statuses == [204] * 20


def test_trickling_bytes_do_not_extend_the_timeout(connected: Connected) -> None:
    for byte in GET[:20]:
        connected.receive(bytes([byte]))
        connected.loop.move(REQUEST_SECONDS / 20)
    assert connected.transport.statuses == [408]


def test_a_pipelined_request_is_read_after_the_response(connected: Connected) -> None:
    connected.receive(GET * 3 + GET[:4])
    assert len(connected.path.taken) == 1
    assert connected.transport.paused
    connected.answer()
    connected.answer()
    assert len(connected.path.taken) == 3
    assert connected.transport.paused
    connected.answer()
    assert not connected.transport.paused, "the rest of the fourth is still to come"
    connected.receive(GET[4:])
    assert len(connected.path.taken) == 4


def test_reading_pauses_while_the_client_does_not_read(connected: Connected) -> None:
    connected.receive(GET * 2)
    connected.protocol.pause_writing()
    connected.answer()
    assert len(connected.path.taken) == 1
    connected.protocol.resume_writing()
    connected.loop.turn()
    assert len(connected.path.taken) == 2
    connected.protocol.pause_writing()
    connected.loop.move(STALLED_SECONDS)
    assert connected.transport.aborted
    assert connected.path.asked[-1].disconnected


def test_pipelined_requests_are_dropped_with_their_connection(connected: Connected) -> None:
    connected.receive(GET * 100)
    assert connected.connections.unread_bytes == 99 * len(GET)
    connected.protocol.connection_lost(ConnectionResetError())
    assert connected.connections.unread_bytes == 0
    assert connected.protocol._unread == b""
    assert connected.loop.armed == []
    assert len(connected.connections) == len(connected.state.connections) == 0
    connected.answer()
    assert connected.transport.written == []


def test_a_connection_pipelining_too_much_is_closed_under_memory_pressure(
    connected: Connected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "UNREAD_BYTES_MAX", 100_000)
    other = Connected(connected.connections)
    other.receive(GET + b"x" * 40_000)
    connected.receive(GET + b"x" * 70_000)
    assert connected.transport.aborted
    assert not other.transport.closed
    assert connected.connections.unread_bytes == 40_000


def test_a_malformed_request_is_refused_after_earlier_responses(connected: Connected) -> None:
    connected.receive(GET + b"NONSENSE\r\n\r\n" + GET)
    assert connected.transport.statuses == []
    connected.answer()
    assert connected.transport.statuses == [204, 400]
    assert connected.transport.ended
    connected.receive(GET)
    assert len(connected.path.taken) == 1
    assert connected.protocol.eof_received() is False


def test_a_half_closed_client_gets_its_response(connected: Connected) -> None:
    assert connected.protocol.eof_received() is False, "idle"
    connected.receive(GET)
    assert connected.protocol.eof_received() is True
    connected.answer()
    assert connected.transport.closed
    assert b"\r\nconnection: close\r\n" in connected.transport.written[-1]


def test_shutdown_does_not_wait_for_a_disconnected_client(connected: Connected) -> None:
    connected.receive(GET)
    assert connected.protocol.eof_received() is True
    connected.loop.move(HALF_CLOSED_SECONDS)
    assert connected.transport.aborted


@pytest.mark.parametrize("draining", [True, False], ids=["while draining", "at the shutdown"])
def test_the_last_response_announces_the_close(connected: Connected, *, draining: bool) -> None:
    connected.receive(GET)
    if draining:
        connected.protocol._draining.begin()
    else:
        connected.protocol.shutdown()
    connected.answer()
    assert b"\r\nconnection: close\r\n" in connected.transport.written[-1]
    assert connected.transport.closed


def test_a_request_received_in_part_before_shutdown_is_answered(connected: Connected) -> None:
    connected.receive(GET[:5])
    connected.protocol.shutdown()
    connected.receive(GET[5:])
    connected.answer()
    assert connected.transport.statuses == [204]
    assert connected.transport.closed


def test_an_idle_connection_closes_at_shutdown(connected: Connected) -> None:
    connected.receive(GET)
    connected.answer()
    connected.protocol.shutdown()
    assert not connected.transport.closed, "a request may be under way"
    connected.loop.move(LAST_REQUEST_SECONDS)
    assert connected.transport.closed
    other = Connected(connected.connections)
    other.loop.move(LAST_REQUEST_SECONDS)
    other.protocol.shutdown()
    assert other.transport.closed


def test_a_running_request_is_answered_during_shutdown(connected: Connected) -> None:
    connected.receive(GET)
    connected.answer()
    connected.protocol.shutdown()
    connected.receive(GET)
    connected.answer()
    assert b"\r\nconnection: close\r\n" in connected.transport.written[-1]
    assert connected.transport.closed


@pytest.mark.parametrize("size", [1, 1_000, 1_000_000])
def test_an_oversized_head_is_refused(connected: Connected, size: int) -> None:
    sent = 0
    connected.receive(b"GET / HTTP/1.1\r\nHost: h\r\nX: ")
    while not connected.transport.written:
        connected.receive(b"y" * size)
        sent += size
        assert sent <= HEAD_BYTES_MAX + size
    assert connected.transport.statuses == [431]
    assert connected.protocol._unread == b""


def test_the_largest_head_is_accepted_in_any_segmentation(connected: Connected) -> None:
    lines = [b"X: y"] * (HEADERS_MAX - 2)
    head = b"\r\n".join([b"GET / HTTP/1.1", b"Host: h", *lines, b"Z: "])
    head += b"z" * (HEAD_BYTES_MAX - len(head)) + b"\r\n\r\n"
    for size in (len(head), 1_000, 1):
        connected.receive(*(head[at : at + size] for at in range(0, len(head), size)))
        connected.answer()
    assert connected.transport.statuses == [204] * 3


def test_expect_continue_is_answered_after_the_head(connected: Connected) -> None:
    head = b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    connected.receive(head)
    assert connected.transport.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    connected.receive(b"o", b"k")
    assert connected.path.taken[0][3] == b"ok"
    connected.answer()
    connected.receive(head + b"ok")
    connected.answer()
    assert connected.transport.statuses == [100, 204, 204]


def test_trailers_are_not_merged_into_headers(connected: Connected) -> None:
    connected.receive(
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\nok\r\n0\r\nAuthorization: x\r\n\r\n"
    )
    [(_, _, headers, body)] = connected.path.taken
    assert (body, [name for name, _ in headers]) == (b"ok", [b"host", b"transfer-encoding"])


class Played:
    """The effect of a byte stream on a connection: the accepted requests, and its refusal."""

    def __init__(self, connections: Connections, pieces: Iterator[bytes], later: bool) -> None:
        self.connected = connected = Connected(connections)
        for piece in pieces:
            connected.receive(piece)
            while connected.path.asked and not later:
                self._answer()
        while connected.path.asked:
            self._answer()
        self.taken = connected.path.taken
        self.refusals = [status for status in connected.transport.statuses if status >= 400]

    def _answer(self) -> None:
        if self.connected.transport.closed:
            self.connected.path.asked.clear()
        else:
            self.connected.answer()

    @property
    def ids(self) -> list[str]:
        return [dict(headers)[b"x-request-id"].decode() for _, _, headers, _ in self.taken]


@pytest.fixture
def direct_path_for_every_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "DIRECT_BODY_BYTES_MAX", 10**6)


def played(connections: Connections, data: bytes, seed: int) -> Played:
    return Played(connections, segments(data, seed), later=seed % 3 == 0)


@pytest.mark.usefixtures("direct_path_for_every_body")
def test_requests_parse_equally_at_any_segmentation(
    connections: Connections,
) -> None:
    for seed in range(400):
        stream = draw(seed)
        found = played(connections, stream.data, seed)
        assert found.ids == [its_id for its_id, _ in stream.answers], seed
        assert len(found.refusals) == stream.refused, seed
        assert connections.unread_bytes == 0 or not found.connected.transport.closed
        found.connected.protocol.connection_lost(None)
    assert connections.unread_bytes == 0


@pytest.mark.usefixtures("direct_path_for_every_body")
def test_corrupted_requests_parse_equally_at_any_segmentation(connections: Connections) -> None:
    """The same requests and the same refusal for every segmentation."""
    for seed in range(400):
        choice = random.Random(seed)
        data = bytearray(draw(seed).data)
        for _ in range(choice.randint(1, 4)):
            at = choice.randrange(len(data))
            change = choice.choice((b"", b"\r", b"\n", b"\r\n", b"\0", b":", b" ", b"\xff", b"7"))
            data[at : at + choice.randint(0, 2)] = change
        outcomes: list[Any] = []
        for number in range(4):
            found = played(connections, bytes(data), 4 * seed + number)
            outcomes.append((found.taken, found.refusals))
            found.connected.protocol.connection_lost(None)
        assert outcomes[1:] == outcomes[:-1], seed


class Waiting:
    """A request that waits for its answer."""

    def __init__(self, written: list[str], name: str, *, broken: bool = False) -> None:
        self._written, self._name, self._broken = written, name, broken

    def write(self, *_: object) -> None:
        if self._broken:
            raise OSError("cannot be written")
        self._written.append(self._name)


async def test_a_failed_write_does_not_stop_later_responses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[str] = []
    due = deque((Waiting(written, name, broken=name == "two"), 201, b"") for name in NAMES)
    monkeypatch.setattr(http_exchange, "_due", due)
    with pytest.raises(OSError, match="cannot be written"):
        http_exchange._write_due()
    await asyncio.sleep(0)
    assert written == ["one", "three"]
