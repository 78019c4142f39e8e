"""The server's HTTP protocol, with a short way past the framework for the hottest request.

uvicorn's own protocol makes a scope, a cycle and a task for each request before the application
sees it. Here a request that the application may take as a whole (`PreparePath`) is gathered first:
taken, its answer is written to the transport by a plain call; not taken, it goes the ordinary way
as if nothing had been tried. Parsing, keep-alive, pipelining and draining stay uvicorn's.
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    from api.draining import Draining
    from api.prepare_path import PreparePath

__all__ = ["HEAD_ENDS", "ShortWayProtocol"]

#: A body above this is not gathered here: the framework refuses it, or takes it piece by piece.
GATHERED_BYTES_MAX: Final = 4 * 1024
#: When the server ends: how long a connection that was made or used last may still send a request
#: that was under way. It is answered, and closed with the answer.
LINGER_SECONDS: Final = 1.0
#: The end of the last header line, and the empty one.
HEAD_ENDS: Final = b"\r\n\r\n"


class _NobodyWaits:
    """The event that uvicorn sets when a client goes; no task waits for it here."""

    def set(self) -> None:
        """Do nothing."""


_NOBODY_WAITS: Final = _NobodyWaits()


class _Gathered:
    """What stands for a request while it is gathered and answered; uvicorn sees a cycle."""

    __slots__ = ("_protocol", "body", "disconnected", "keep_alive", "response_complete")

    message_event = _NOBODY_WAITS

    def __init__(self, protocol: "ShortWayProtocol", *, keep_alive: bool) -> None:
        self._protocol = protocol
        self.body = b""
        self.disconnected = False
        self.keep_alive = keep_alive
        self.response_complete = False

    def answer(self, status: int, message: bytes) -> None:
        """Write the whole answer in one piece, soon; `message` follows the server's lines."""
        if not _due:
            self._protocol.loop.call_soon(_write_due, self._protocol.loop)
        _due.append((self, status, message))

    def write(self, status: int, message: bytes) -> None:
        """Write it now."""
        self.response_complete = True
        # Of two requests that came together only the later one is told that the connection is gone.
        if not self.disconnected and not self._protocol.transport.is_closing():
            self._protocol.write_answer(status, message, keep_alive=self.keep_alive)


#: Answers of this turn of the loop. They are written one right after the other: a client or proxy
#: that gets one every few microseconds stays awake, one that has to be woken for each costs both
#: sides more than the answer.
_due: deque[tuple[_Gathered, int, bytes]] = deque()


def _write_due(loop: asyncio.AbstractEventLoop) -> None:
    try:
        while _due:
            gathered, status, message = _due.popleft()
            gathered.write(status, message)
    finally:
        # Also where one of them broke: the others wait.
        if _due:
            loop.call_soon(_write_due, loop)


class _ServerLines:
    """The headers that the server itself adds, as lines; uvicorn makes a new list each second."""

    made_of: list[tuple[bytes, bytes]] | None = None
    lines: bytes = b""


class ShortWayProtocol(HttpToolsProtocol):
    """Gathers what may go the short way, and hands on all else."""

    parser: Any
    cycle: Any
    _path: "PreparePath | None" = None
    _draining: "Draining | None" = None
    _gathering: _Gathered | None = None
    #: When the connection fell idle, by the loop's clock; None while a request is under way.
    _idle_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        # Connections come only after the application has started.
        state = getattr(self.config.app, "state", None)
        self._path = getattr(state, "prepare_path", None)
        self._draining = getattr(state, "draining", None)
        self._idle_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
            self.timeout_keep_alive_task = None

    def shutdown(self) -> None:
        """End with the answer that is under way; an idle connection once no request can be."""
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
            return
        idle = 0.0 if self._idle_since is None else self.loop.time() - self._idle_since
        if idle >= LINGER_SECONDS:
            self.transport.close()
        else:
            self.loop.call_later(LINGER_SECONDS - idle, self._close_idle)

    def _close_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    # uvicorn sets a timer at each answer and takes it back at each request. Here one timer stays
    # for as long as the connection does, and looks at its end how long nothing has come.

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_again_after(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._look_again_after(left)
        else:
            super().timeout_keep_alive_handler()

    def _look_again_after(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def on_message_begin(self) -> None:
        # The scope is made when it is known that one is needed.
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        parser, cycle = self.parser, self.cycle
        if (
            self._path is None
            or not self._path.may_take(parser.get_method(), self.url)
            or (cycle is not None and not cycle.response_complete)
            or self.expect_100_continue
            or parser.should_upgrade()
            or parser.get_http_version() != "1.1"
            or self.flow.write_paused
        ):
            self._begin_ordinary()
            return
        self._gathering = self.cycle = _Gathered(self, keep_alive=parser.should_keep_alive())

    def on_body(self, body: bytes) -> None:
        gathering = self._gathering
        if gathering is None:
            super().on_body(body)
            return
        gathering.body += body
        if len(gathering.body) > GATHERED_BYTES_MAX:
            self._go_ordinary(gathering)

    def on_message_complete(self) -> None:
        gathering = self._gathering
        if gathering is None:
            super().on_message_complete()
            return
        self._gathering = None
        path = self._path
        if path is None or not path.take(self.url, self.headers, gathering.body, gathering):
            self._go_ordinary(gathering)
            super().on_message_complete()

    def _begin_ordinary(self) -> None:
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers.extend(headers)
        super().on_headers_complete()

    def _go_ordinary(self, gathering: _Gathered) -> None:
        self._gathering = None
        gathering.response_complete = True
        self._begin_ordinary()
        # The server may have begun to end meanwhile; then this is the connection's last answer.
        self.cycle.keep_alive = gathering.keep_alive
        super().on_body(gathering.body)

    def write_answer(self, status: int, message: bytes, *, keep_alive: bool) -> None:
        """Write an answer that is whole, as uvicorn would piece by piece.

        Args:
            status: of HTTP.
            message: the answer's header lines, the empty line and the body.
            keep_alive: whether the connection stays.
        """
        keep_alive = keep_alive and not (self._draining is not None and self._draining.active)
        if not keep_alive:
            lines, empty, content = message.partition(HEAD_ENDS)
            message = b"".join((lines, b"\r\nconnection: close", empty, content))
        self.transport.write(b"".join((STATUS_LINE[status], self._server_lines(), message)))
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _server_lines(self) -> bytes:
        made_of = self.server_state.default_headers
        if _ServerLines.made_of is not made_of:
            _ServerLines.made_of = made_of
            _ServerLines.lines = b"".join(b"%b: %b\r\n" % (name, value) for name, value in made_of)
        return _ServerLines.lines
