"""HTTP exchanges with the PG: one request, and one whole response of a bounded size."""

import asyncio
from collections.abc import Mapping
from functools import partial
from ssl import SSLContext, create_default_context

import aiohttp
import certifi
import msgspec
from aiohttp.client_proto import ResponseHandler
from yarl import URL

__all__ = ["HttpRequest", "HttpResponse", "HttpTransport", "NoResponse", "NotSent"]

#: Idle time-out, below that of common servers (5 s): a request on a connection that the server is
#: closing has an unknown outcome.
IDLE_SECONDS = 3.0
#: Limits of a response's head: a proxy in front of the PG may add much to it.
HEADER_BYTES_MAX = 64 * 1024
HEADERS_MAX = 1_000


class HttpRequest(msgspec.Struct, frozen=True):
    """A request; its URL is sent as it is."""

    method: str
    url: str
    headers: dict[str, str]
    content: bytes | None = None


class HttpResponse(msgspec.Struct, frozen=True):
    """A whole response; no content if it exceeds the maximum size."""

    status: int
    headers: Mapping[str, str]
    content: bytes | None


class NotSent(Exception):
    """No connection was made, or none was free in time: nothing was sent."""


class NoResponse(Exception):
    """The connection broke off before the response was whole: the outcome is unknown."""


class _Connection(ResponseHandler):
    """A connection that is reused only if the server has sent nothing since the last response.

    aiohttp takes such bytes as the next response: a late refusal of one payment would decide
    another one.
    """

    def is_connected(self) -> bool:
        return super().is_connected() and not self.should_close


class _Connector(aiohttp.TCPConnector):
    """A connector that makes such connections; aiohttp has no public option for it."""

    def __init__(self, *, limit: int, keepalive_timeout: float, ssl: SSLContext) -> None:
        super().__init__(limit=limit, keepalive_timeout=keepalive_timeout, ssl=ssl)  # pyright: ignore[reportUnknownMemberType]
        self._factory = partial[ResponseHandler](_Connection, loop=asyncio.get_running_loop())


class HttpTransport:
    """A bounded pool of connections, each with one exchange at a time.

    It never follows a redirect, keeps no cookies, decompresses nothing and ignores proxy settings
    of the environment. Only a GET is repeated, on a connection that the server closed while it was
    idle. A cancelled exchange closes its connection.

    Args:
        connections_max: maximum number of connections.
        connect_seconds: time-out of the wait for a free connection, or for a new one.
    """

    def __init__(self, *, connections_max: int, connect_seconds: float) -> None:
        trust = create_default_context(cafile=certifi.where())
        connector = _Connector(limit=connections_max, keepalive_timeout=IDLE_SECONDS, ssl=trust)
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            # Each call has an overall deadline, which the caller sets.
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_seconds),
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
            max_headers=HEADERS_MAX,
        )
        self._in_progress = 0
        self._closed = False

    async def send(self, request: HttpRequest, *, bytes_max: int) -> HttpResponse:
        """Send the request and read its response.

        Args:
            request: sent once.
            bytes_max: maximum size of the response's content; the rest is not read.

        Raises:
            NotSent: nothing was sent.
            NoResponse: the outcome is unknown.
        """
        if self._session.closed:
            raise NotSent("closed")
        self._in_progress += 1
        try:
            async with self._session.request(
                request.method,
                URL(request.url, encoded=True),
                data=request.content,
                headers=request.headers,
                allow_redirects=False,
            ) as response:
                content = await _read(response, bytes_max)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise NotSent(type(error).__name__) from error
        except aiohttp.ClientError as error:
            raise NoResponse(type(error).__name__) from error
        finally:
            self._in_progress -= 1
            await self._close_if_idle()
        return HttpResponse(response.status, response.headers, content)

    async def aclose(self) -> None:
        """Close the connections now, or when the exchanges in progress have ended."""
        self._closed = True
        await self._close_if_idle()

    async def _close_if_idle(self) -> None:
        if self._closed and not self._in_progress:
            await self._session.close()


async def _read(response: aiohttp.ClientResponse, bytes_max: int) -> bytes | None:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > bytes_max:
            response.close()
            return None
    return bytes(content)
