"""One request and its response, in the two forms that a connection runs.

`AsgiExchange` runs an ASGI application for a request. `DirectExchange` waits for a complete
response, without an application. A connection runs one exchange at a time.
"""

import asyncio
import re
from collections import deque
from http import HTTPStatus
from typing import Any, Final, Protocol
from urllib.parse import unquote

import structlog

from api.http.connection.head import HEAD_ENDS, Head
from api.http.middleware import request_id
from api.http.problem_details import INTERNAL_ERROR_DETAIL, PROBLEM_JSON, document_of

__all__ = [
    "Answering",
    "AsgiExchange",
    "DirectExchange",
    "DirectHandler",
    "asgi_scope",
    "head_of",
    "problem_message",
    "server_lines",
]

log = structlog.get_logger(__name__)

STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
#: Statuses without a body, which have neither content-length nor chunks.
_NO_BODY: Final = frozenset((204, 304))
_NOT_A_NAME = re.compile(rb"[^!#$%&'*+.^_`|~0-9A-Za-z-]")
_NOT_A_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Answering(Protocol):
    """The connection, as an exchange uses it."""

    write_paused: bool

    def write(self, data: bytes) -> None:
        """Send these bytes; does nothing on a closed connection."""
        ...

    async def drained(self) -> None:
        """Wait until the client has read enough of the sent bytes."""
        ...

    def server_lines(self) -> bytes:
        """The header lines that the server adds to every response."""
        ...

    def keeps_alive(self, head: Head) -> bool:
        """Whether the connection stays open after the response to this request."""
        ...

    def answered(self, *, keep_alive: bool) -> None:
        """The response is written; read the next request, or close."""
        ...

    def abort(self) -> None:
        """Abort in the middle of a response, so that the client sees that it is incomplete."""
        ...


class DirectHandler(Protocol):
    """Answers some requests without ASGI; the application's is `app.state.prepare_path`."""

    def accepts(self, method: bytes, url: bytes) -> bool:
        """Whether the request line is one that `take` may answer."""
        ...

    def take(self, head: Head, body: bytes, request: "DirectExchange") -> bool:
        """Answer a complete request, now or later; False leaves it to the application."""
        ...


class _ServerLines:
    """The server's own headers, as lines; uvicorn makes a new list each second."""

    made_of: list[tuple[bytes, bytes]] | None = None
    lines: bytes = b""


def server_lines(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The server's own headers as lines, cached for as long as uvicorn keeps its list."""
    if _ServerLines.made_of is not headers:
        _ServerLines.made_of = headers
        _ServerLines.lines = b"".join(b"%b: %b\r\n" % (name, value) for name, value in headers)
    return _ServerLines.lines


def head_of(status: int, lines: bytes) -> bytes:
    """Status line and the server's own header lines."""
    known = STATUS_LINES.get(status)
    return (known or b"HTTP/1.1 %d \r\n" % status) + lines


def problem_message(
    status: int, code: str, detail: str, instance: str, **facts: Any
) -> tuple[bytes, bytes]:
    """Header lines, without the server's own, and body of a refusal."""
    content, headers = document_of(code, detail, status=status, instance=instance, facts=facts)
    headers |= {"Content-Type": PROBLEM_JSON, "Content-Length": str(len(content))}
    headers["X-Request-Id"] = instance
    lines = "".join(f"{name.lower()}: {value}\r\n" for name, value in headers.items())
    return lines.encode("latin-1"), content


def asgi_scope(
    head: Head,
    server: tuple[str, int | None] | None,
    client: tuple[str, int] | None,
    state: dict[str, Any],
) -> dict[str, Any]:
    """The request as an ASGI 3 scope."""
    raw_path, _, query = head.target.partition(b"?")
    path = raw_path.decode("ascii")
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1" if head.minor else "1.0",
        "server": server,
        "client": client,
        "scheme": "http",
        "method": head.method.decode("ascii"),
        "root_path": "",
        "path": unquote(path) if "%" in path else path,
        "raw_path": raw_path,
        "query_string": query,
        "headers": head.headers,
        "state": state.copy(),
    }


class DirectExchange:
    """A request with a response that is written as a whole."""

    __slots__ = ("_connection", "_head", "disconnected")

    #: Such a response is written with one call, so it is never half sent.
    started = False

    def __init__(self, connection: Answering, head: Head) -> None:
        self._connection = connection
        self._head = head
        self.disconnected = False

    def answer(self, status: int, message: bytes) -> None:
        """Write the response at the end of this loop turn; `message` follows the server's lines."""
        if not _due:
            asyncio.get_running_loop().call_soon(_write_due)
        _due.append((self, status, message))

    def write(self, status: int, message: bytes) -> None:
        """Write the response now."""
        if self.disconnected:
            return
        connection = self._connection
        keep_alive = connection.keeps_alive(self._head)
        if not keep_alive:
            lines, empty, content = message.partition(HEAD_ENDS)
            message = b"".join((lines, b"\r\nconnection: close", empty, content))
        connection.write(
            b"".join((STATUS_LINES[status], connection.server_lines(), message)),
        )
        connection.answered(keep_alive=keep_alive)

    def disconnect(self) -> None:
        """Mark the client as disconnected."""
        self.disconnected = True


#: Responses of this loop turn, written back to back: a client or proxy that receives one every few
#: microseconds stays awake, and waking it for each one costs both sides more than the response.
_due: deque[tuple[DirectExchange, int, bytes]] = deque()


def _write_due() -> None:
    try:
        while _due:
            exchange, status, message = _due.popleft()
            exchange.write(status, message)
    finally:
        # After an exception too: the other responses are still due.
        if _due:
            asyncio.get_running_loop().call_soon(_write_due)


class AsgiExchange:
    """A request that an ASGI application answers. Its body is complete before it begins."""

    def __init__(self, connection: Answering, head: Head, body: bytes) -> None:
        self._connection = connection
        self._head = head
        #: None once the application has received it.
        self._body: bytes | None = body
        self._disconnected = asyncio.Event()
        self.started = False
        self._complete = False
        self._keep_alive = False
        #: Of the response's body: bytes that content-length promised; None if it is chunked or
        #: ends with the connection.
        self._promised: int | None = None
        self._chunked = False
        self._has_body = True

    def disconnect(self) -> None:
        """Mark the client as disconnected."""
        self._disconnected.set()

    async def run(self, app: Any, scope: dict[str, Any]) -> None:
        """Run the application; the client always gets a response or a closed connection."""
        try:
            await app(scope, self._receive, self._send)
            if not self._complete and not self._disconnected.is_set():
                log.error("application_sent_no_response", path=scope["path"])
                self._fail()
        except asyncio.CancelledError:
            # The process ends before the application has answered.
            self._fail(503, "unavailable", "The service is restarting; retry the request.")
            raise
        except Exception:  # loop top: the connection outlives an application error
            log.exception("unhandled_error", path=scope["path"])
            self._fail()

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if not self._complete:
            await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._connection.write_paused and not self._disconnected.is_set():
            await self._connection.drained()
        if self._disconnected.is_set() and not self._complete:
            return
        match message["type"], self.started, self._complete:
            case "http.response.start", False, False:
                self._start(message["status"], message.get("headers", ()))
            case "http.response.body", True, False:
                self._send_body(message.get("body", b""), more=message.get("more_body", False))
            case _:
                raise RuntimeError(f"{message['type']} out of order")

    def _start(self, status: int, headers: Any) -> None:
        lines = [head_of(status, self._connection.server_lines())]
        closes = False
        for name, value in headers:
            if _NOT_A_NAME.search(name) or _NOT_A_VALUE.search(value):
                raise RuntimeError("a response header has a control character")
            lowered = name.lower()
            if lowered == b"content-length":
                self._promised = int(value)
            elif lowered == b"connection":
                closes = b"close" in value.lower()
                continue
            elif lowered == b"transfer-encoding":
                continue
            lines.append(b"%b: %b\r\n" % (lowered, value))
        self._has_body = self._head.method != b"HEAD" and status not in _NO_BODY
        endless = self._has_body and self._promised is None
        # HTTP/1.0 has no chunks: such a body ends with the connection.
        self._chunked = endless and self._head.minor == 1
        if self._chunked:
            lines.append(b"transfer-encoding: chunked\r\n")
        keep_open = not closes and not (endless and not self._chunked)
        self._keep_alive = keep_open and self._connection.keeps_alive(self._head)
        if not self._keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        self.started = True
        self._connection.write(b"".join(lines))

    def _send_body(self, body: bytes, *, more: bool) -> None:
        if not self._has_body:
            body = b""
        elif self._chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        elif self._promised is not None:
            self._promised -= len(body)
            if self._promised < 0 or (self._promised and not more):
                raise RuntimeError("the response body's length differs from its content-length")
        if body:
            self._connection.write(body)
        if not more:
            self._complete = True
            # For an application that still listens: a stream ended by HEAD.
            self._disconnected.set()
            self._connection.answered(keep_alive=self._keep_alive)

    def _fail(
        self, status: int = 500, code: str = "internal_error", detail: str = INTERNAL_ERROR_DETAIL
    ) -> None:
        if self._complete or self._disconnected.is_set():
            return
        self._complete = True
        if self.started:
            self._connection.abort()
            return
        instance = request_id(self._head.fields.get(b"x-request-id", b""))
        lines, content = problem_message(status, code, detail, instance)
        head = head_of(status, self._connection.server_lines())
        if self._head.method == b"HEAD":
            content = b""
        self._connection.write(b"".join((head, lines, b"connection: close\r\n\r\n", content)))
        self._connection.answered(keep_alive=False)
