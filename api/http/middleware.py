"""Outermost middleware: request id, duration, and a log line for a slow or failed request."""

import asyncio
import re
import secrets
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, cast

import structlog
from litestar import Request
from litestar.types import ASGIApp, Message, Receive, Scope, Send

from api.http.draining import Draining
from reservation.domain import base64url
from reservation.telemetry import tracing
from reservation.telemetry.log_rate_limit import LogRateLimit
from reservation.telemetry.metrics import HTTP_SECONDS, Durations

__all__ = [
    "STATE_KEY",
    "RequestMiddleware",
    "RequestObservation",
    "record",
    "request_id",
    "request_id_of",
]

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{8,64}")
#: Key of the request id in the scope's state.
STATE_KEY: Final = "request_id"
#: Ids drawn in one call: 3 kB of randomness.
_IDS_AT_ONCE: Final = 256
#: A slower request gets a log line, unless its operation waits by design.
SLOW_SECONDS: Final = 1.0
_WAITS: Final = frozenset({"watchStock", "getReservation", "paymentSucceeded"})
SERVER_ERROR: Final = 500
#: Readiness answers 503 to probes every second: that is not a failure.
_PROBE: Final = "ready"
#: Buyers' ids, amounts and states: no cache may store them.
_NOT_KEPT: Final = ("/v1/admin", "/health/")
#: Log lines a second about failed or slow requests: under load shedding, lines cost more than
#: responses. The next line counts the suppressed ones; the metrics count all of them.
LINES_A_SECOND_MAX: Final = 50


def request_id_of(request: Request[Any, Any, Any]) -> str:
    """The id under which this request is logged; every refusal carries it to the buyer."""
    return cast("dict[str, Any]", request.scope)["state"].get(STATE_KEY, "")


class RequestIds:
    """Random request ids, drawn in batches: one system call costs as much for many as for one."""

    def __init__(self) -> None:
        self._left: list[str] = []

    def new(self) -> str:
        """A new id of 16 characters."""
        if not self._left:
            drawn = base64url.encode(secrets.token_bytes(_IDS_AT_ONCE * 12))
            self._left = [drawn[start : start + 16] for start in range(0, len(drawn), 16)]
        return self._left.pop()


_ids = RequestIds()


def request_id(given: bytes) -> str:
    """The caller's own id if it is well formed, else a new one."""
    return given.decode() if given and _REQUEST_ID.fullmatch(given) else _ids.new()


class RequestMetrics:
    """Durations of the responses of one loop turn, counted together at its end.

    A count writes to a file shared by all processes, which costs more than the work it measures,
    and a batch answers dozens of requests at once.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], list[float]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        #: By operation and status: a lookup by labels takes longer than counting.
        self._histograms: dict[tuple[str, int], Durations] = {}

    def add(self, operation: str, status: int, seconds: float) -> None:
        """Add one duration."""
        if self._loop is None or self._loop.is_closed():
            # Once a turn: before Python 3.12 this is a system call.
            self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._count)
        alike = self._seconds.get((operation, status))
        if alike is None:
            self._seconds[operation, status] = [seconds]
        else:
            alike.append(seconds)

    def _count(self) -> None:
        answered, self._seconds, self._loop = self._seconds, {}, None
        for (operation, status), seconds in answered.items():
            histogram = self._histograms.get((operation, status))
            if histogram is None:
                histogram = HTTP_SECONDS.labels(operation, str(status))
                self._histograms[operation, status] = histogram
            histogram.observe_all(seconds)


_answered = RequestMetrics()


def record(operation: str, status: int, seconds: float, request_id: str) -> None:
    """Count a response, and log it if it was slow or failed."""
    _answered.add(operation, status, seconds)
    slow = seconds > SLOW_SECONDS and operation not in _WAITS
    if (status >= SERVER_ERROR and operation != _PROBE) or slow:
        _log_request(operation, status, seconds, request_id)


_lines = LogRateLimit(LINES_A_SECOND_MAX)


def _log_request(operation: str, status: int, seconds: float, request_id: str) -> None:
    suppressed = _lines.should_suppress()
    if suppressed is None:
        return
    more = {"suppressed": suppressed} if suppressed else {}
    write_line = log.warning if status >= SERVER_ERROR else log.info
    write_line(
        "request",
        operation=operation,
        status=status,
        seconds=round(seconds, 3),
        request_id=request_id,
        **more,
    )


class RequestObservation:
    """Id, duration, metrics, log line and span of one request."""

    __slots__ = ("_began", "request_id", "span")

    def __init__(self, given_id: bytes, began: float) -> None:
        """Begin the span.

        Args:
            given_id: the caller's own id, or empty.
            began: when the request was complete, by `time.perf_counter`.
        """
        self._began = began
        self.request_id = request_id(given_id)
        #: None while tracing is off.
        self.span = None if tracing.tracer is None else tracing.tracer.request(self.request_id)

    def inside(self) -> AbstractContextManager[None]:
        """Make the span current, so that spans started in the block are its children."""
        if self.span is None or tracing.tracer is None:
            return nullcontext()
        return tracing.tracer.inside(self.span)

    def end(self, operation: str, status: int, order_id: str | None = None) -> None:
        """Record the response; `order_id` is shown in the trace."""
        record(operation, status, time.perf_counter() - self._began, self.request_id)
        if self.span is not None and tracing.tracer is not None:
            if order_id is not None:
                tracing.tracer.note(self.span, order=order_id)
            tracing.tracer.answered(self.span, operation, status)


class RequestMiddleware:
    """ASGI middleware, outermost: refusals of the framework pass through it too."""

    def __init__(self, app: ASGIApp, draining: Draining, *, cors: bool = False) -> None:
        self._app = app
        self._draining = draining
        self._cors = cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given_id = dict(scope["headers"]).get(b"x-request-id", b"")
        observation = RequestObservation(given_id, time.perf_counter())
        its_id = observation.request_id
        state: dict[str, Any] = scope.setdefault("state", {})  # pyright: ignore[reportUnknownVariableType]
        state[STATE_KEY] = its_id
        status = SERVER_ERROR

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", []))
                self._complete(headers, scope["path"])
                headers.append((b"x-request-id", its_id.encode()))
                message["headers"] = headers
            await send(message)

        try:
            with observation.inside():
                await self._app(scope, receive, send_with_id)
        finally:
            handler: object = cast("dict[str, Any]", scope).get("route_handler")
            operation = getattr(handler, "operation_id", None)
            operation = operation if isinstance(operation, str) else "other"
            observation.end(operation, status)

    def _complete(self, headers: list[tuple[bytes, bytes]], path: str) -> None:
        """Add the headers of every response of this kind, refusals of the framework included."""
        names = {name.lower() for name, _ in headers}
        if self._cors and b"vary" not in names:
            # A cache must not serve an answer without an origin to a request with one.
            headers.append((b"vary", b"Origin"))
        if path.startswith(_NOT_KEPT) and b"cache-control" not in names:
            headers.append((b"cache-control", b"no-store"))
        if self._draining.active:
            headers.append((b"connection", b"close"))
