"""A bounded pool of connections to the PG, each with one call at a time."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import httpx

__all__ = ["ConnectionPool"]


class ConnectionPool:
    """Clients with one connection each, reused in LIFO order.

    httpx's connection pool scans all its connections at each step of each call. With 64 concurrent
    confirms, the scans took most of the time: 340 calls a second on one core, and a p99 of 1.3 s
    against a PG that responds at once. This pool costs a list and a semaphore for any number of
    connections.

    It shares no code with the pool of Redis connections: the list of idle ones is all they have in
    common.

    Args:
        make: creates a client; it connects at its first call.
        most: maximum number of clients.
        wait_seconds: time-out of the wait for a free client.
    """

    def __init__(
        self, make: Callable[[], httpx.AsyncClient], *, most: int, wait_seconds: float
    ) -> None:
        self._make = make
        self._wait_seconds = wait_seconds
        self._room = asyncio.Semaphore(most)
        self._idle: list[httpx.AsyncClient] = []
        self._closed = False

    @asynccontextmanager
    async def one(self) -> AsyncGenerator[httpx.AsyncClient]:
        """A client for one call.

        Raises:
            httpx.PoolTimeout: none became free in time, so nothing was sent.
        """
        try:
            async with asyncio.timeout(self._wait_seconds):
                await self._room.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout("all connections to the PG are in use") from None
        try:
            client = self._idle.pop() if self._idle else self._make()
            try:
                yield client
            except BaseException:
                # Aborted, cancelled or timed out: the connection may have unread bytes, so drop it.
                await client.aclose()
                raise
            if self._closed:
                await client.aclose()
            else:
                self._idle.append(client)
        finally:
            self._room.release()

    async def aclose(self) -> None:
        """Close idle clients now, and the others when their calls end."""
        self._closed = True
        while self._idle:
            await self._idle.pop().aclose()
