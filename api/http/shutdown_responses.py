"""Responses to requests cut short by shutdown: a problem document, or a page that reloads."""

import asyncio
from typing import Any, Final, cast

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from api.http.draining import Draining
from api.http.middleware import STATE_KEY
from api.http.problem_details import PROBLEM_JSON, document_of
from api.http.routes.pages import PLEASE_WAIT, PLEASE_WAIT_HEADERS
from reservation.domain.errors import OutcomeUnknown

__all__ = ["ShutdownResponses"]

_STATUS: Final = 503
_SENTENCE: Final = (
    "The service is shutting down and the outcome is unknown: repeat the same request."
)


class ShutdownResponses:
    """ASGI middleware: at shutdown the server cancels every request still without a response."""

    def __init__(self, app: ASGIApp, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except asyncio.CancelledError:
            if started or not self._draining.active:
                raise
            await _answer(scope, send)


async def _answer(scope: Any, send: Send) -> None:
    headers = dict(scope["headers"])
    browser = b"text/html" in headers.get(b"accept", b"")
    if browser and scope["path"].startswith("/v1/payments/"):
        content = PLEASE_WAIT
        fields = {**PLEASE_WAIT_HEADERS, "Content-Type": "text/html; charset=utf-8"}
    else:
        content, fields = document_of(
            OutcomeUnknown.code,
            _SENTENCE,
            status=_STATUS,
            instance=scope["state"][STATE_KEY],
            facts={"retryAfter": 1},
        )
        fields["Content-Type"] = PROBLEM_JSON
    fields["Content-Length"] = str(len(content))
    lines = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    start = {"type": "http.response.start", "status": _STATUS, "headers": lines}
    await send(cast("Message", start))
    await send({"type": "http.response.body", "body": content, "more_body": False})
