"""A receiver of webhooks on loopback, with faults that a test chooses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from aiohttp import web


class Received(msgspec.Struct, frozen=True):
    """One request that arrived."""

    headers: dict[str, str]
    body: bytes

    @property
    def message_id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def document(self) -> dict[str, Any]:
        return msgspec.json.decode(self.body)


class Receiver:
    """The requests in the order of arrival, and the next responses.

    `faults` are taken one per request; without any the response is 204. Each is a status, or one
    of `hang`, `drip`, `reset` (accepted, and the connection reset before the response), `redirect`.
    """

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.faults: list[int | str] = []
        #: For every request; takes precedence over `faults`.
        self.always: int | str | None = None
        self.response_headers: dict[str, str] = {}
        self.url = ""
        self._changed = asyncio.Condition()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(headers, body))
        async with self._changed:
            self._changed.notify_all()
        fault = self.always if self.always is not None else None
        if fault is None and self.faults:
            fault = self.faults.pop(0)
        return await self._fail(request, fault)

    async def _fail(self, request: web.Request, fault: int | str | None) -> web.StreamResponse:
        match fault:
            case "hang":
                await asyncio.sleep(3_600)
            case "drip":
                response = web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(b".")
                    await asyncio.sleep(0.02)
            case "reset":
                assert request.transport is not None
                request.transport.abort()
            case "redirect":
                return web.Response(status=307, headers={"Location": self.url})
            case int():
                return web.Response(status=fault, headers=self.response_headers)
            case _:
                pass
        return web.Response(status=204)

    async def until(self, condition: Callable[[list[Received]], bool]) -> None:
        """Wait until the condition holds for the requests that have arrived."""
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: condition(self.received))

    @property
    def ids(self) -> list[str]:
        return [one.message_id for one in self.received]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A receiver on a free port."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    receiver.url = f"http://{host}:{port}/hook"
    try:
        yield receiver
    finally:
        await runner.cleanup()
