"""The HTTP/1.1 protocol of the server: one connection, one request at a time.

The input is split into requests before any other code sees it. A request reaches the application,
or the application's direct handler, only when its head is valid by RFC 9112 and its body is
complete. The next request on the connection is read after the response to this one is written. So a
body belongs to its request, responses keep the order of their requests, and the memory of a
connection is bounded.
"""

import asyncio
import contextvars
from typing import Any, Final, cast

import structlog
from uvicorn.config import Config
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from api.http.connection.connections import UNREAD_BYTES_MAX, connections
from api.http.connection.exchange import (
    AsgiExchange,
    DirectExchange,
    DirectHandler,
    asgi_scope,
    head_of,
    problem_message,
    server_lines,
)
from api.http.connection.head import CHUNKED, Head, RequestRefused
from api.http.connection.request import RequestReader
from api.http.draining import Draining
from api.http.middleware import request_id
from reservation.telemetry.log_rate_limit import LogRateLimit
from reservation.telemetry.metrics import HTTP_REFUSALS

__all__ = ["HttpProtocol"]

log = structlog.get_logger(__name__)

#: Deadline for a complete request after its first byte, and for the first byte of a connection's
#: first request.
REQUEST_SECONDS: Final = 20.0
#: A client that does not read its responses is disconnected after this.
STALLED_SECONDS: Final = 60.0
#: A client that has half-closed its side still gets a response that is ready this soon.
HALF_CLOSED_SECONDS: Final = 5.0
#: After a refusal, further input is read and dropped: closing at once would reset the connection,
#: and the client would lose the refusal.
LINGER_SECONDS: Final = 5.0
#: At shutdown: how long a new or recently used connection may still send a request that was in
#: transit. It is answered, and the connection closes with the response.
LAST_REQUEST_SECONDS: Final = 1.0
#: Larger bodies of prepares go to the application.
DIRECT_BODY_BYTES_MAX: Final = 4 * 1024
#: A connection may hold this much even when all of them together exceed their limit: it is enough
#: for the requests of buyers.
HELD_BYTES_SPARED: Final = 48 * 1024

_refusal_lines = LogRateLimit(1)


class HttpProtocol(asyncio.Protocol):
    """One client connection."""

    transport: asyncio.Transport

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self.loop = _loop or asyncio.get_event_loop()
        self.server: tuple[str, int | None] | None = None
        self.client: tuple[str, int] | None = None
        self.write_paused = False
        self._app = cast("Any", config).loaded_app
        self._config = config
        self._server_state = server_state
        self._open: set[Any] = server_state.connections
        self._app_state = app_state
        self._keep_alive_seconds = float(config.timeout_keep_alive)
        self._path: DirectHandler | None = None
        self._draining = Draining()

        #: Received, and not yet part of an exchange.
        self._unread = b""
        #: This connection's share of `connections.unread_bytes`.
        self._counted = 0
        #: A request has partly arrived.
        self._begun = False
        self._reader = RequestReader()
        self._exchange: AsgiExchange | DirectExchange | None = None

        self._reading_paused = False
        #: The current request is the last one on this connection.
        self._last = False
        #: No further request is read.
        self._closing = False
        self._writable: asyncio.Event | None = None
        #: Deadline of the current wait, by the loop's clock; None while a response is pending.
        self._deadline: float | None = None
        self._waits_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    # Callbacks of asyncio.

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if not connections.admit(self):
            self._refuse_connection()
            return
        self._open.add(self)
        self.server = get_local_addr(transport)
        self.client = get_remote_addr(transport)
        # Connections come only after the application has started.
        state = getattr(self._config.app, "state", None)
        self._path = getattr(state, "prepare_path", None)
        self._draining = getattr(state, "draining", self._draining)
        self._wait(REQUEST_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - whatever ended it
        connections.discard(self)
        self._open.discard(self)
        self._closing = True
        self._deadline = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._drop_request()
        if self._exchange is not None:
            self._exchange.disconnect()
            self._exchange = None
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._exchange is None and not self.write_paused:
            self._read(self._unread + data if self._unread else data)
        else:
            data = self._unread + data
            self._keep(data, len(data))
            self._pause_reading()

    def eof_received(self) -> bool:
        """Whether the connection stays open for a pending response."""
        if self._exchange is None or self._exchange.started:
            return False
        self._last = True
        self._wait(HALF_CLOSED_SECONDS)
        return True

    def pause_writing(self) -> None:
        self.write_paused = True
        self._wait(STALLED_SECONDS)

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._writable is not None:
            self._writable.set()
        if self._closing:
            return
        if self._exchange is not None:
            self._deadline = None
        else:
            self._next_request()

    # Calls from uvicorn and the other connections.

    def shutdown(self) -> None:
        """Close after the pending response; if idle, once no request can be in transit."""
        self._last = True
        if self._exchange is not None or self._begun or self._unread or self._closing:
            return
        idle = self.loop.time() - self._waits_since
        if idle >= LAST_REQUEST_SECONDS:
            self._close()
        else:
            self._wait(LAST_REQUEST_SECONDS - idle)

    @property
    def waits_until(self) -> float | None:
        """The deadline for its next request; None while one is being answered."""
        return self._deadline if self._exchange is None else None

    def give_way(self) -> None:
        """Close at once: another connection needs the slot."""
        self._closing = True
        self.transport.abort()

    # Calls from an exchange.

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    async def drained(self) -> None:
        while self.write_paused:
            if self._writable is None:
                self._writable = asyncio.Event()
            self._writable.clear()
            await self._writable.wait()

    def server_lines(self) -> bytes:
        return server_lines(self._server_state.default_headers)

    def keeps_alive(self, head: Head) -> bool:
        return head.keep_alive and not self._last and not self._draining.active

    def answered(self, *, keep_alive: bool) -> None:
        self._exchange = None
        self._server_state.total_requests += 1
        if not keep_alive:
            self._close()
        elif not self.write_paused:
            self._next_request()

    def abort(self) -> None:
        self._exchange = None
        self._close()

    # Reading.

    def _next_request(self) -> None:
        """Read the next request, which may have arrived already."""
        if self._unread:
            # From the loop: the next request must not inherit this one's stack or context.
            self.loop.call_soon(self._read_on, context=contextvars.Context())
            return
        if self._reading_paused:
            self._resume_reading()
        self._wait(self._keep_alive_seconds)

    def _read_on(self) -> None:
        if self._unread and self._exchange is None and not self._closing and not self.write_paused:
            self._read(self._unread)

    def _read(self, data: bytes) -> None:
        """Continue the current request; `data` is all of its unread bytes, and any after it."""
        reader = self._reader
        try:
            complete = reader.read(data)
        except RequestRefused as refusal:
            self._refuse(refusal)
            return
        if complete is not None:
            self._begin(*complete)
            return
        if not reader.has_begun:
            if self._deadline is None:
                self._wait(self._keep_alive_seconds)
        elif not self._begun:
            self._begun = True
            self._wait(REQUEST_SECONDS)
        if reader.must_continue():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._keep(reader.kept, reader.held_bytes)
        self._resume_reading()

    def _begin(self, head: Head, body: bytes, rest: bytes) -> None:
        """Answer a complete request; `rest` belongs to those after it."""
        if self._begun or rest or self._unread or head.length == CHUNKED:
            self._drop_request()
            self._keep(rest, len(rest))
            if rest:
                self._pause_reading()
        self._deadline = None
        path = self._path
        if (
            path is not None
            and path.accepts(head.method, head.target)
            and head.minor
            and len(body) <= DIRECT_BODY_BYTES_MAX
        ):
            self._exchange = direct = DirectExchange(self, head)
            if path.take(head, body, direct):
                return
        self._exchange = exchange = AsgiExchange(self, head, body)
        scope = asgi_scope(head, self.server, self.client, self._app_state)
        task = self.loop.create_task(exchange.run(self._app, scope))
        self._server_state.tasks.add(task)
        task.add_done_callback(self._server_state.tasks.discard)

    def _drop_request(self) -> None:
        """Drop the received part of a request."""
        self._keep(b"", 0)
        self._begun = False
        self._reader = RequestReader()

    def _keep(self, data: bytes, held: int) -> None:
        """Keep bytes of this request, or of those after it."""
        self._unread = data
        connections.unread_bytes += held - self._counted
        self._counted = held
        if connections.unread_bytes > UNREAD_BYTES_MAX and held > HELD_BYTES_SPARED:
            self._log_refusal("unread_bytes", "The memory for unread request data is exhausted.")
            self.give_way()

    def _pause_reading(self) -> None:
        if not self._reading_paused and not self.transport.is_closing():
            self._reading_paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused and not self.transport.is_closing():
            self._reading_paused = False
            self.transport.resume_reading()

    # Closing.

    def _refuse(self, refusal: RequestRefused) -> None:
        head = self._reader.head
        given = b"" if head is None else head.fields.get(b"x-request-id", b"")
        self._log_refusal(refusal.code, refusal.detail)
        self._write_refusal(refusal.status, refusal.code, refusal.detail, request_id(given))
        self._drop_request()
        self._linger()

    def _refuse_connection(self) -> None:
        """Refuse at the connection limit; `connections` logs it."""
        HTTP_REFUSALS.labels("unavailable").inc()
        self._closing = True
        detail = "The server has too many connections."
        self._write_refusal(503, "unavailable", detail, request_id(b""), retryAfter=1)
        self.transport.close()

    def _write_refusal(
        self, status: int, code: str, detail: str, instance: str, **facts: Any
    ) -> None:
        lines, content = problem_message(status, code, detail, instance, **facts)
        head = head_of(status, self.server_lines())
        self.transport.write(b"".join((head, lines, b"connection: close\r\n\r\n", content)))

    def _log_refusal(self, code: str, detail: str) -> None:
        HTTP_REFUSALS.labels(code).inc()
        suppressed = _refusal_lines.should_suppress()
        if suppressed is not None:
            client = None if self.client is None else self.client[0]
            log.info(
                "request_refused", code=code, detail=detail, client=client, suppressed=suppressed
            )

    def _close(self) -> None:
        """Close after the pending writes."""
        if self._reading_paused and not self._closing:
            self._linger()
            return
        self._closing = True
        self.transport.close()
        # Against a client that reads nothing.
        self._wait(STALLED_SECONDS)

    def _linger(self) -> None:
        """Close after the client, which may still be sending."""
        self._closing = True
        self._resume_reading()
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()
        self._wait(LINGER_SECONDS)

    def _wait(self, seconds: float) -> None:
        self._waits_since = now = self.loop.time()
        self._deadline = deadline = now + seconds
        if self._timer is not None:
            # The timer reads the deadline when it fires, so only an earlier deadline resets it.
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self.loop.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        left = self._deadline - self.loop.time()
        if left > 0:
            self._wait(left)
        elif self._closing or self.write_paused or self._exchange is not None:
            self.transport.abort()
        elif self._begun:
            self._refuse(
                RequestRefused(
                    408,
                    "request_timeout",
                    f"The request was incomplete after {REQUEST_SECONDS:.0f} s.",
                )
            )
        else:
            self._close()
