"""HTTP without sockets: ASGI applications of simulated processes, called over simulated links."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, ClassVar, Self
from urllib.parse import unquote, urlsplit

import aiohttp
import msgspec

from reservation.adapters.toss.transport import HttpRequest, HttpResponse, NoResponse, NotSent
from tests.faults.simulation.loop import CURRENT, NEUTRAL, VirtualLoop
from tests.faults.simulation.network import Fate, Link
from tests.faults.simulation.processes import Process
from tests.faults.simulation.trace import Trace

__all__ = [
    "CutOff",
    "Request",
    "Response",
    "SimulatedSession",
    "SimulatedTransport",
    "Unreachable",
    "Web",
]


class Unreachable(Exception):
    """Connection refused: nothing was sent."""


class CutOff(Exception):
    """The connection broke before the answer was there."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request."""

    method: str
    url: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


class Response(msgspec.Struct, frozen=True):
    """A whole answer."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Web:
    """Routes requests to the listening processes.

    Args:
        loop: where it all runs.
        trace: records every exchange.
        hosts: for each host, its link and its processes up now; one of them is drawn.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        trace: Trace,
        hosts: Mapping[str, tuple[Link, Callable[[], list[Process]]]],
    ) -> None:
        self._loop = loop
        self._trace = trace
        self._hosts = hosts

    async def ask(self, asker: Process, request: Request) -> Response:
        """Send a request from a process; a lost one blocks its caller until the time-out.

        Raises:
            Unreachable, CutOff: the one before and the other after it was sent.
        """
        if not asker.alive:
            raise Unreachable("this process is dead")
        host = urlsplit(request.url).netloc
        link, listening = self._hosts[host]
        fate = link.fate(asker.draw)
        servers = listening()
        server = asker.draw.choice(servers) if servers else None
        exchange = _Exchange(self._loop, self._trace, link, asker, server, request, fate)
        try:
            return await exchange.answer
        finally:
            exchange.given_up()


class _Exchange:
    """One request on its way there and back."""

    def __init__(
        self,
        loop: VirtualLoop,
        trace: Trace,
        link: Link,
        asker: Process,
        server: Process | None,
        request: Request,
        fate: Fate,
    ) -> None:
        self._loop, self._trace, self._link = loop, trace, link
        self._asker, self._server, self._request = asker, server, request
        self._fate = fate
        self.answer: asyncio.Future[Response] = loop.create_future()
        self._end = 0
        self._gone = asyncio.Event()
        kind = "asks" if fate is Fate.WELL else f"http-{fate.value}"
        target = urlsplit(request.url)
        trace.note(kind, asker.name, f"{request.method} {target.netloc}{target.path}")
        if fate is Fate.REQUEST_LOST:
            return
        arrive = self._break_off if fate is Fate.RESET else self._arrive
        loop.call_later(link.seconds(asker.draw), arrive, context=NEUTRAL)

    def given_up(self) -> None:
        """The caller has its answer, or has gone."""
        self._gone.set()

    def _arrive(self) -> None:
        server = self._server
        if server is None or server.serves is None or not server.alive:
            self._fail(Unreachable("connection refused"))
            return
        self._end = server.at_end(self._server_died)
        task = server.start(_call(server.serves, self._request, self._gone))
        task.add_done_callback(self._done, context=NEUTRAL)

    def _done(self, task: asyncio.Task[Response]) -> None:
        assert self._server is not None
        self._server.forget(self._end)
        if task.cancelled() or isinstance(task.exception(), CutOff):
            self._break_off()
            return
        response = task.result()
        self._trace.note("answers", self._server.name, f"{response.status}")
        if self._fate is Fate.REPLY_LOST:
            return
        back = self._break_off if self._fate is Fate.RESET_AFTER else self._give
        self._loop.call_later(self._link.seconds(self._server.draw), back, response)

    def _server_died(self) -> None:
        # By the kernel of its machine, which closes the sockets of the dead process.
        seconds = self._link.seconds(self._asker.draw)
        self._loop.call_later(seconds, self._break_off, context=NEUTRAL)

    def _give(self, response: Response) -> None:
        if not self.answer.done():
            self.answer.set_result(response)

    def _break_off(self, _: Response | None = None) -> None:
        self._fail(CutOff("connection reset"))

    def _fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


async def _call(app: Any, request: Request, gone: asyncio.Event) -> Response:
    """One request through an ASGI application."""
    url = urlsplit(request.url)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": unquote(url.path),
        "raw_path": url.path.encode(),
        "query_string": url.query.encode(),
        "root_path": "",
        "headers": [(b"host", url.netloc.encode()), *request.headers],
        "client": ("127.0.0.1", 40_000),
        "server": ("127.0.0.1", 80),
    }
    messages = [{"type": "http.request", "body": request.body, "more_body": False}]
    status, whole = 0, False
    headers: tuple[tuple[bytes, bytes], ...] = ()
    parts: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, headers, whole
        if message["type"] == "http.response.start":
            status, headers = message["status"], tuple(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))
            whole = not message.get("more_body", False)

    await app(scope, receive, send)
    if not whole:
        raise CutOff("the answer was never finished")
    return Response(status, headers, b"".join(parts))


class SimulatedTransport:
    """The gateway client's transport on a simulated link, for whatever process makes it."""

    #: Set for the length of a run.
    web: ClassVar[Web]

    def __init__(self, **_: object) -> None:
        self._process = CURRENT.get()

    async def send(self, request: HttpRequest, *, bytes_max: int) -> HttpResponse:
        asked = Request(
            method=request.method,
            url=request.url,
            headers=tuple(
                (name.lower().encode(), value.encode()) for name, value in request.headers.items()
            ),
            body=request.content or b"",
        )
        try:
            answer = await self.web.ask(self._process, asked)
        except Unreachable as error:
            raise NotSent(str(error)) from error
        except CutOff as error:
            raise NoResponse(str(error)) from error
        headers = {name.decode().lower(): value.decode() for name, value in answer.headers}
        content = answer.body if len(answer.body) <= bytes_max else None
        return HttpResponse(answer.status, headers, content)

    async def aclose(self) -> None:
        """Nothing is open."""


class SimulatedSession:
    """aiohttp's session on a simulated link, for whatever process makes it: it only posts."""

    #: Set for the length of a run.
    web: ClassVar[Web]

    def __init__(self, *, timeout: aiohttp.ClientTimeout, **_: object) -> None:
        self._process = CURRENT.get()
        self._timeout = timeout

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nothing is open."""

    @asynccontextmanager
    async def post(
        self, url: str, *, data: bytes, headers: Mapping[str, str], **_: object
    ) -> AsyncGenerator[Response]:
        asked = Request(
            method="POST",
            url=url,
            headers=tuple((name.encode(), value.encode()) for name, value in headers.items()),
            body=data,
        )
        try:
            async with asyncio.timeout(self._timeout.total):
                answer = await self.web.ask(self._process, asked)
        except (Unreachable, CutOff) as error:
            raise aiohttp.ClientConnectionError(str(error)) from error
        yield answer
