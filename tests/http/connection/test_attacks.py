"""Attacks of one client on the others: memory, connections, and their answers."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.http.connection.proxies import proxied
from tests.http.connection.wire import Wire, request, wired
from tests.support.service import Served, running_service

pytestmark = pytest.mark.system

MIB = 1024 * 1024
#: A request must be complete after 20 s.
GIVEN_UP_SECONDS = 25.0
#: Half-open connections, and the files that the process may open.
HALF_OPEN, FILES = 2_000, 1_024
REASON = msgspec.json.encode({"reason": "x"})


def memory_of(served: Served) -> int:
    """Resident bytes of the processes that serve HTTP."""
    pages = 0
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if b"api.server.entrypoints" in command and b"api" in command:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == served.process.pid:
                    pages += int((folder / "statm").read_text().split()[1])
    assert pages
    return pages * os.sysconf("SC_PAGE_SIZE")


def most_grown(served: Served, attack: Callable[[], None]) -> int:
    """The processes' peak growth during the attack and right after it."""
    before = most = memory_of(served)
    with ThreadPoolExecutor(1) as attackers:
        attacking = attackers.submit(attack)
        while not attacking.done():
            most = max(most, memory_of(served))
            time.sleep(0.02)
        attacking.result()
    return max(most, memory_of(served)) - before


def pushed(url: str, start: bytes, piece: bytes, total: int) -> int:
    """Send a piece again and again until the other side stops reading; returns the bytes taken."""
    sent = 0
    with wired(url) as wire, suppress(ConnectionError, TimeoutError):
        wire.send(start)
        while sent < total:
            wire.send(piece)
            sent += len(piece)
    return sent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET / HTTP/1.1\r\nHost: h\r\n", b"a: b\r\n" * 10_000),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: ", b"x" * 65_536),
        (b"GET /", b"x" * 65_536),
        (
            b"POST /v1/guests HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"a: b\r\n" * 10_000,
        ),
        (
            b"POST /v1/guests HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n1;",
            b"x" * 65_536,
        ),
    ],
    ids=["header lines", "one line", "a path", "trailers", "an extension"],
)
def test_a_head_of_200_megabytes_takes_no_memory(edge: Served, start: bytes, piece: bytes) -> None:
    grown = most_grown(edge, lambda: void(pushed(edge.url, start, piece, 200 * MIB)))
    assert grown < 20 * MIB


def void(_: object) -> None:
    """Only the effect counts."""


def test_pipelined_requests_before_unread_responses_take_no_memory(edge: Served) -> None:
    pipelined = request("GET", "/health/live") * 1_000

    def attack() -> None:
        with wired(edge.url, seconds=2.0) as wire, suppress(TimeoutError):
            # It is not read, so at some point nothing more can be sent.
            for _ in range(2_000):
                wire.send(pipelined)

    assert most_grown(edge, attack) < 20 * MIB


@pytest.mark.slow
def test_incomplete_requests_time_out(edge: Served) -> None:
    head = request("POST", "/v1/guests", b"x" * 100)[:-100]
    chunks = request("POST", "/v1/guests", b"5\r\nab", Transfer_Encoding="chunked")
    beginnings = [b"", b"GE", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: h\r\nX: y", head]
    beginnings += [head + b"x" * 50, chunks]
    began = time.monotonic()
    with ExitStack() as stack:
        wires = [stack.enter_context(wired(edge.url)) for _ in beginnings]
        for wire, beginning in zip(wires, beginnings, strict=True):
            wire.send(beginning)
        for wire, beginning in zip(wires, beginnings, strict=True):
            wire.socket.settimeout(max(0.1, began + GIVEN_UP_SECONDS - time.monotonic()))
            if beginning:
                assert wire.answer().problem == (408, "request_timeout")
            assert wire.rest() == b""
    assert time.monotonic() - began < GIVEN_UP_SECONDS


@contextmanager
def half_open(url: str, count: int) -> Iterator[list[socket.socket]]:
    """Half-open connections of an attacker, each with half a request."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    opened: list[socket.socket] = []
    try:
        for number in range(count):
            connection = socket.create_connection((host, int(port)), timeout=20)
            opened.append(connection)
            if number % 2:
                with suppress(ConnectionError):
                    connection.sendall(b"POST /v1/guests HTTP/1.1\r\nHost: h\r\nX: ")
        yield opened
    finally:
        for connection in opened:
            connection.close()


@pytest.mark.slow
@pytest.mark.parametrize("fast_path", ["on", "off"])
def test_other_clients_are_served_beside_2000_half_open_connections(
    tmp_path: Path, fast_path: str
) -> None:
    with running_service(
        tmp_path / "data",
        before=("sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh"),
        RESERVATION_WORKERS="1",
        RESERVATION_FAST_PATH=fast_path,
    ) as served:
        sale_id = served.sale()
        with half_open(served.url, HALF_OPEN):
            for _ in range(20):
                with wired(served.url) as wire:
                    wire.send(request("GET", "/health/live"))
                    assert wire.answer().status == 200
            assert served.prepare(sale_id, served.buyer()).status_code == 201
            ready = served.http.get("/health/ready").json()
            assert (ready["status"], "connections-full" in ready["warnings"]) == ("ok", True)
        lines = [line for line in served.log.read_text().splitlines() if "connections_full" in line]
        assert lines
        assert len(lines) < 60
        assert "Traceback" not in served.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("proxy", "filler"),
    [
        ("nginx with websocket lines", 40_000),
        ("Caddy", 200_000),
        ("nginx with websocket lines, unbuffered", 40_000),
    ],
)
def test_credentials_are_not_reused_for_the_next_client(
    edges: Any, tmp_path: Path, proxy: str, filler: int
) -> None:
    """An attacker's body ends in the beginning of a request; an operator's request comes next."""
    served = edges("on")
    stolen: list[str] = []
    with proxied(proxy, served.url, tmp_path) as url:
        for _ in range(12):
            sale_id = served.sale()
            close = (
                f"POST /v1/admin/sales/{sale_id}/close HTTP/1.1\r\nHost: h\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(REASON)}\r\nX-Tail: "
            )
            body = b"\r\n" * (filler // 2) + close.encode()
            with wired(url) as stranger:
                offer = {"Connection": "Upgrade", "Upgrade": "websocket"}
                stranger.send(request("POST", "/v1/payments/toss/webhooks", body, **offer))
                assert stranger.answer().status in {200, 400, 413}
                paused = Wire(url)
                path = f"/v1/admin/sales/{sale_id}/pause"
                paused.send(
                    request("POST", path, REASON, Content_Type="application/json", **served.admin)
                )
                answer = paused.answer()
                paused.close()
            status = served.http.get(f"/v1/sales/{sale_id}").json()["status"]
            if (answer.status, status) != (200, "paused"):
                stolen.append(f"{answer.status} {status}")
    assert stolen == []
