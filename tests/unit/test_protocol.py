"""A connection that stays open between requests: one timer for all of them."""

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from api import protocol
from api.protocol import ShortWayProtocol

#: uvicorn's own: how long a connection may be idle.
IDLE_SECONDS = 5
NAMES = ["one", "two", "three"]


class Timer:
    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """A loop whose clock the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + seconds, call))
        return self.timers[-1]

    def move(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer.at <= self.now]
        self.timers = [timer for timer in self.timers if timer.at > self.now]
        for timer in due:
            if not timer.cancelled:
                timer.call()


class Transport:
    def __init__(self) -> None:
        self.closed = False
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, *_: object) -> None:
        return None

    def write(self, data: bytes) -> None:
        self.written.append(data)


async def application(_scope: object, _receive: object, _send: object) -> None:
    """Nothing is asked of it here."""


def connected() -> tuple[Any, Loop, Transport]:
    config = uvicorn.Config(application, ws="none", log_config=None)
    config.load()
    loop, transport = Loop(), Transport()
    protocol: Any = ShortWayProtocol(config, ServerState(), {}, loop)  # type: ignore[arg-type]
    protocol.connection_made(transport)
    protocol.flow = SimpleNamespace(resume_reading=lambda: None, resume_writing=lambda: None)
    return protocol, loop, transport


def answer(protocol: Any) -> None:
    """One request, up to its end."""
    protocol.data_received(b"")
    protocol.on_response_complete()


def test_a_connection_that_is_idle_for_long_is_closed() -> None:
    protocol, loop, transport = connected()
    answer(protocol)
    loop.move(IDLE_SECONDS - 1)
    assert not transport.closed
    loop.move(1)
    assert transport.closed


def test_a_connection_in_use_stays_and_has_one_timer() -> None:
    protocol, loop, transport = connected()
    for _ in range(20):
        answer(protocol)
        assert len(loop.timers) == 1
        loop.move(IDLE_SECONDS - 1)
    assert not transport.closed
    loop.move(1)
    assert transport.closed, "idle since the last answer, not since the timer was set"


def test_a_request_that_takes_long_is_no_idle_time() -> None:
    protocol, loop, transport = connected()
    answer(protocol)
    protocol.data_received(b"")
    loop.move(10 * IDLE_SECONDS)
    assert not transport.closed
    protocol.on_response_complete()
    loop.move(IDLE_SECONDS)
    assert transport.closed


def test_a_lost_connection_leaves_no_timer() -> None:
    protocol, loop, _ = connected()
    answer(protocol)
    protocol.connection_lost(ConnectionResetError())
    assert [timer.cancelled for timer in loop.timers] == [True]


def test_an_answer_to_a_connection_that_is_gone_is_not_written() -> None:
    """Of two requests that came together only the later one was told."""
    connection, _, transport = connected()
    gathered = protocol._Gathered(connection, keep_alive=True)
    transport.close()
    gathered.write(201, b"\r\n\r\n{}")
    assert gathered.response_complete
    assert transport.written == []


class Soon:
    """A loop that remembers what is to be called soon."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def call_soon(self, *call: Any) -> None:
        self.calls.append(call)


class Waiting:
    """A request that waits for its answer."""

    def __init__(
        self, told: list[str], name: str, *, gone: bool = False, broken: bool = False
    ) -> None:
        self.disconnected = gone
        self._told, self._name, self._broken = told, name, broken

    def write(self, *_: object) -> None:
        if self._broken:
            raise OSError("cannot be written")
        if not self.disconnected:
            self._told.append(self._name)


def test_an_answer_that_cannot_be_written_leaves_those_behind_it_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    loop: Any = Soon()
    due = deque((Waiting(told, name, broken=name == "two"), 201, b"") for name in NAMES)
    monkeypatch.setattr(protocol, "_due", due)
    with pytest.raises(OSError, match="cannot be written"):
        protocol._write_due(loop)
    [(again, *given)] = loop.calls
    again(*given)
    assert told == ["one", "three"]
