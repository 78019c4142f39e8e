"""HTTP/1.1 client over kept connections, cheap enough to leave the CPU to the service."""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from reservation.verification.scenario_steps import Answer, members_of

__all__ = ["TimedAnswer", "Wire"]

#: Longer than a user waits in front of a browser; the call's outcome is unknown then.
PATIENCE_SECONDS = 20.0


class TimedAnswer(Answer, frozen=True):
    """One answer, and the times of its request and its end."""

    replayed: bool
    asked_ns: int
    read_ns: int


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._read: asyncio.Future[None] | None = None
        self._body: list[bytes] = []
        self.status = 0
        self.replayed = False
        self.reusable = True
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Another loop's transports are of another class.
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._read is not None and not self._read.done():
            self._read.set_exception(exc or ConnectionResetError())

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() == b"idempotent-replayed":
            self.replayed = True

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.reusable = self.reusable and self._parser.should_keep_alive()
        self._parser = httptools.HttpResponseParser(self)
        if self._read is not None and not self._read.done():
            self._read.set_result(None)

    async def ask(self, request: bytes) -> bytes:
        """Send it; the body of the answer."""
        self._body, self.replayed, self.status = [], False, 0
        self._read = asyncio.get_running_loop().create_future()
        assert self.transport is not None
        self.transport.write(request)
        await self._read
        return b"".join(self._body)

    def close(self) -> None:
        self.reusable = False
        if self.transport is not None:
            self.transport.abort()


class Wire:
    """Connections to one server; as many as there are concurrent requests.

    Args:
        url: `http://host:port`.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._free: deque[_Connection] = deque()

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        *,
        cut_after: float | None = None,
    ) -> TimedAnswer:
        """One request; never raises for a network error.

        Args:
            method: of HTTP.
            path: with its query.
            headers: in addition to the usual ones.
            body: sent as JSON.
            cut_after: close the connection this many seconds after the request was sent.
        """
        content = b"" if body is None else msgspec.json.encode(body)
        request = self._packed(method, path, headers or {}, content)
        asked_ns = time.monotonic_ns()
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS if cut_after is None else cut_after):
                connection = await self._connection()
                text = await connection.ask(request)
        except (OSError, TimeoutError, httptools.HttpParserError):
            if connection is not None:
                connection.close()
            return TimedAnswer(0, {}, replayed=False, asked_ns=asked_ns, read_ns=0)
        read_ns = time.monotonic_ns()
        if connection.reusable:
            self._free.append(connection)
        else:
            connection.close()
        return TimedAnswer(
            connection.status, members_of(text), connection.replayed, asked_ns, read_ns
        )

    def close(self) -> None:
        """Close every connection."""
        while self._free:
            self._free.pop().close()

    async def _connection(self) -> _Connection:
        while self._free:
            connection = self._free.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, self._host, self._port)
        return made

    def _packed(self, method: str, path: str, headers: Mapping[str, str], content: bytes) -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            f"Content-Length: {len(content)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if content:
            lines.append("Content-Type: application/json")
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content
