"""Webhook receiver of a world: a real listener that passes on the allowed webhooks."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

__all__ = ["Hooks"]

_OK = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
_LATER = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"

#: Whether a webhook was understood, given the order and the payment that it names.
DeliverWebhook = Callable[[str, str], Awaitable[bool]]


class Hooks:
    """Answers 200 to every webhook; those of orders in `acknowledged` are passed on first.

    A webhook may always be lost, so nothing may depend on the others.
    """

    def __init__(self) -> None:
        self.acknowledged: set[str] = set()
        self.under_way = 0
        self.count = 0

    @asynccontextmanager
    async def listening(
        self, listener: socket.socket, deliver_webhook: DeliverWebhook
    ) -> AsyncGenerator[None]:
        """Take webhooks in until the block ends."""
        lines: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            lines[task] = writer
            try:
                while body := await _body(reader):
                    writer.write(_OK if await self._deliver(body, deliver_webhook) else _LATER)
                    await writer.drain()
            except ConnectionError:
                return
            finally:
                writer.close()
                del lines[task]

        server = await asyncio.start_server(serve, sock=listener)
        try:
            yield
        finally:
            server.close()
            # Our side closes the PG's connections: each reader then comes to its end.
            for writer in lines.values():
                writer.close()
            await asyncio.gather(*lines)

    async def _deliver(self, body: bytes, deliver_webhook: DeliverWebhook) -> bool:
        notice = json.loads(body)
        ids = notice.get("data", notice)
        if ids["orderId"] not in self.acknowledged:
            return True
        self.count += 1
        self.under_way += 1
        try:
            return await deliver_webhook(ids["orderId"], ids.get("paymentKey"))
        finally:
            self.under_way -= 1


async def _body(reader: asyncio.StreamReader) -> bytes:
    """The next request's body; empty if the PG has hung up."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2])
            for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length:")
        )
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        return b""
