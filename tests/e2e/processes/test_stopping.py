"""SIGTERM under load: each connection is served or refused, and none is reset."""

import asyncio
import errno
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from api.server.sockets import Listener, listen
from tests.support.service import STOP_SECONDS, Served, eventually, running_service

pytestmark = pytest.mark.e2e

#: A dropped handshake is sent again after a second; far above it, far below a hanging connection.
ANSWER_SECONDS_MAX = 4.0
BETWEEN_SECONDS = 0.05


def request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode()


def answer_of(connection: socket.socket) -> str:
    """The head and body of one answer, or its end."""
    text = b""
    while b"\r\n\r\n" not in text or not text.split(b"\r\n\r\n", 1)[1]:
        piece = connection.recv(65_536)
        if not piece:
            break
        text += piece
    return text.decode()


def try_once(port: int, path: str = "/health/live") -> str:
    """The result of one new connection: the answer, `refused`, or the name of another error."""
    try:
        with socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS_MAX) as connection:
            connection.sendall(request(path))
            return answer_of(connection) or "closed without an answer"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)


class Visitors:
    """A new connection every 50 ms, each in its own thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._timer = threading.Thread(target=self._run)
        self.found: list[tuple[float, str]] = []

    def _run(self) -> None:
        while not self._stop.wait(BETWEEN_SECONDS):
            thread = threading.Thread(target=self._visit, args=(time.monotonic(),))
            thread.start()
            self._threads.append(thread)

    def _visit(self, at: float) -> None:
        self.found.append((at, try_once(self._port)))

    @contextmanager
    def coming(self) -> Iterator[None]:
        self._timer.start()
        try:
            yield
        finally:
            self._stop.set()
            self._timer.join()
            for thread in self._threads:
                thread.join()


@pytest.mark.parametrize("drain", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_after_sigterm_a_connection_is_served_or_refused(tmp_path: Path, drain: int) -> None:
    with running_service(
        tmp_path / "var", RESERVATION_WORKERS="2", RESERVATION_DRAIN_SECONDS=str(drain)
    ) as service:
        port = service.settings.port
        visitors = Visitors(port)
        # The sandbox, Valkey and an open page make the stop last; the port must not wait for them.
        with (
            service.http.stream("GET", f"/v1/sales/{service.sale()}/events") as page,
            socket.create_connection(("127.0.0.1", port)) as kept,
            visitors.coming(),
        ):
            events = page.iter_raw()
            next(events)
            kept.sendall(request("/health/live"))
            assert "connection: close" not in answer_of(kept)
            signalled_at = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            if drain:
                drains(service, kept)
            service.process.wait(STOP_SECONDS)
            ended_at = time.monotonic()
            time.sleep(0.2)
    outcomes = {outcome for _, outcome in visitors.found}
    strange = {o for o in outcomes if o != "refused" and not o.startswith("HTTP/1.1 200 ")}
    assert not strange
    refused_from = min(at for at, outcome in visitors.found if outcome == "refused")
    # The port closes at one moment, long before the last process ends.
    assert all(outcome == "refused" for at, outcome in visitors.found if at > refused_from + 0.3)
    assert refused_from >= signalled_at + drain - 0.1
    assert refused_from < ended_at


def drains(service: Served, kept: socket.socket) -> None:
    """Not ready any more, still serving, and each answer ends its connection."""
    ready = ""
    while "503" not in ready:
        ready = try_once(service.settings.port, "/health/ready")
    head, _, body = ready.partition("\r\n\r\n")
    assert "connection: close" in head
    assert '"draining"' in body
    sale_id, buyer = service.sale(), service.buyer()
    held = service.prepare(sale_id, buyer)
    assert held.status_code == 201
    assert held.headers["connection"] == "close"
    kept.sendall(request("/health/live"))
    last = answer_of(kept)
    assert last.startswith("HTTP/1.1 200 ")
    assert "connection: close" in last
    assert kept.recv(1) == b""


@pytest.mark.slow
def test_a_second_signal_ends_the_drain(tmp_path: Path) -> None:
    with running_service(
        tmp_path / "var", RESERVATION_WORKERS="1", RESERVATION_DRAIN_SECONDS="300"
    ) as service:
        service.process.send_signal(signal.SIGTERM)
        while "503" not in try_once(service.settings.port, "/health/ready"):
            time.sleep(BETWEEN_SECONDS)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(STOP_SECONDS) == 0


@pytest.mark.slow
def test_a_payment_interrupted_by_a_stop_gets_202_and_is_settled(tmp_path: Path) -> None:
    with ExitStack() as stack:
        service = stack.enter_context(running_service(tmp_path / "var", RESERVATION_WORKERS="1"))
        pool = stack.enter_context(ThreadPoolExecutor(2))
        sale_id = service.sale()
        orders = [service.hold(sale_id, service.buyer()) for _ in range(2)]
        for order in orders:
            service.order_fault(order, "hang", seconds=30)
        urls = [service.success_url(order, service.pay(order)) for order in orders]
        accepted = ("application/json", "text/html")
        answers = [
            pool.submit(httpx.get, url, headers={"Accept": kind}, timeout=30, trust_env=False)
            for url, kind in zip(urls, accepted, strict=True)
        ]
        for order in orders:
            eventually(
                lambda order=order: service.get_reservation(order)["status"],
                lambda s: s == "CONFIRMING",
            )
        service.process.send_signal(signal.SIGTERM)
        as_json, in_browser = (answer.result(30) for answer in answers)
        assert as_json.status_code == 202, as_json.text
        assert as_json.json()["status"] == "CONFIRMING"
        assert in_browser.status_code == 303
        assert "outcome=settling" in in_browser.headers["location"]
        assert service.process.wait(STOP_SECONDS) == 0
    began = time.monotonic()
    with running_service(tmp_path / "var", RESERVATION_WORKERS="1") as service:
        for order in orders:
            # The lease of the process that is gone would end after 75 s.
            eventually(
                lambda order=order: service.get_reservation(order)["status"],
                lambda status: status == "CONFIRMED",
                within=50,
            )
        assert time.monotonic() - began < 60
        assert service.audit(sale_id)["ok"]


async def test_a_closing_listener_resets_no_queued_connection() -> None:
    """Connections that wait to be accepted are accepted; later ones are refused in every holder."""
    listening = await listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    inherited = listening.dup()
    loop = asyncio.get_running_loop()
    listener = Listener(listening)
    waiting = [await connected(port) for _ in range(20)]
    closing = asyncio.create_task(listener.close())
    # Busy for longer than the handshake's time, like a process in a flood.
    await asyncio.sleep(0.3)
    assert not closing.done()
    for _ in waiting:
        accepted, _ = await loop.sock_accept(inherited)
        with accepted:
            await loop.sock_sendall(accepted, b"served")
    await asyncio.wait_for(closing, ANSWER_SECONDS_MAX)
    for connection in waiting:
        with connection:
            assert await loop.sock_recv(connection, 10) == b"served"
    with inherited, pytest.raises(ConnectionRefusedError):
        await connected(port)


async def test_a_connection_to_a_closing_listener_is_refused() -> None:
    listening = await listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    with listening.dup():
        closing = asyncio.create_task(Listener(listening).close())
        await asyncio.sleep(0)
        # Its handshake is dropped, and refused when it is sent again a second later.
        with pytest.raises(ConnectionRefusedError):
            await asyncio.wait_for(connected(port), ANSWER_SECONDS_MAX)
        await closing


async def connected(port: int) -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    except OSError:
        connection.close()
        raise
    return connection
