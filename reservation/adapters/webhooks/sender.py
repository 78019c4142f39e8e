"""Sends one webhook: one POST, and the status of its response."""

import asyncio
import time
from email.utils import parsedate_to_datetime
from ssl import create_default_context
from typing import Final

import aiohttp
import certifi
import msgspec

from reservation import __version__
from reservation.adapters.webhooks.addresses import GuardedResolver, RefusedAddress, check_url

__all__ = ["Attempt", "WebhookSender"]

#: Time-out of an attempt as a whole: connection, request and response.
ATTEMPT_SECONDS: Final = 15.0
#: The response's content is read up to this size, so that the connection can be used again.
RESPONSE_BYTES_MAX: Final = 64 * 1024
#: Connections of one process, and to one endpoint.
CONNECTIONS_MAX: Final = 256
IDLE_SECONDS: Final = 3.0
#: A longer wait that a receiver requests counts as this.
RETRY_AFTER_SECONDS_MAX: Final = 12 * 3_600.0
_MAX_SECONDS_DIGITS: Final = 9


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an attempt."""

    #: None without a response.
    status: int | None = None
    #: A word if there was no response: `timeout`, `refused_address`, `connection`, `closed`.
    error: str | None = None
    #: The wait that the receiver requests, in seconds.
    retry_after: float | None = None

    @property
    def delivered(self) -> bool:
        """Whether the receiver has accepted the webhook."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether the receiver wants no further webhooks."""
        return self.status == 410


class WebhookSender:
    """A bounded pool of connections to endpoints. It follows no redirect and keeps no cookies.

    Args:
        allow_private: whether endpoints may be on private and loopback addresses.
        attempt_seconds: time-out of an attempt.
    """

    def __init__(self, *, allow_private: bool, attempt_seconds: float = ATTEMPT_SECONDS) -> None:
        self._allow_private = allow_private
        self._attempt_seconds = attempt_seconds
        self._session: aiohttp.ClientSession | None = None

    def check(self, url: str) -> None:
        """Check the URL of an endpoint, without resolving its host.

        Raises:
            RefusedAddress: it is not allowed.
        """
        check_url(url, allow_private=self._allow_private)

    async def send(self, url: str, headers: dict[str, str], body: bytes) -> Attempt:
        """Send one POST; every failure is an attempt's result."""
        try:
            address = check_url(url, allow_private=self._allow_private)
            async with asyncio.timeout(self._attempt_seconds):
                async with self._open().post(
                    address,
                    data=body,
                    headers={
                        **headers,
                        "Content-Type": "application/json",
                        "User-Agent": f"stock-reservation/{__version__}",
                    },
                    allow_redirects=False,
                ) as response:
                    await _drain(response)
                    return Attempt(
                        status=response.status,
                        retry_after=_seconds(response.headers.get("Retry-After")),
                    )
        except TimeoutError:
            return Attempt(error="timeout")
        except RefusedAddress:
            return Attempt(error="refused_address")
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, RefusedAddress)
            return Attempt(error="refused_address" if refused else "connection")
        except (aiohttp.ClientError, OSError, ValueError):
            return Attempt(error="closed")

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        """The session; made at its first use, which is in the event loop."""
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=CONNECTIONS_MAX,
                keepalive_timeout=IDLE_SECONDS,
                ssl=create_default_context(cafile=certifi.where()),
                resolver=GuardedResolver(allow_private=self._allow_private),
                # Each connection is to addresses that were checked for it.
                use_dns_cache=False,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session


async def _drain(response: aiohttp.ClientResponse) -> None:
    size = 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > RESPONSE_BYTES_MAX:
            response.close()
            return


def _seconds(text: str | None) -> float | None:
    """The wait in `Retry-After`, which is a number of seconds or a date."""
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        seconds = float(text[:_MAX_SECONDS_DIGITS])
    else:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(0.0, seconds), RETRY_AFTER_SECONDS_MAX)
