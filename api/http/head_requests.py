"""HEAD on every route that has GET: the same headers without the body."""

import re
from typing import Final, Literal, cast

from litestar import Litestar
from litestar.exceptions import MethodNotAllowedException
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send
from litestar.utils import normalize_path

__all__ = ["HeadResponses", "allowed"]

#: GET on these claims a hold or gives it back. Link checkers and mail scanners send HEAD, so HEAD
#: stays 405 on the return URLs of the payment gateway.
_CHANGES: Final = re.compile(r"/v1/payments/[^/]+/(success|fail)")


_Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_METHODS: Final[tuple[_Method, ...]] = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class HeadResponses:
    """ASGI middleware: calls the application with GET and sends only the headers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD" or _changes(scope["path"]):
            await self._app(scope, receive, send)
            return
        ended = False

        async def send_head(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                await send(message)
            elif message["type"] == "http.response.body" and not ended:
                # An event stream has no end: the response to HEAD ends with its first event.
                ended = True
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        # A copy: the server reads the method from its own scope when it frames the response.
        asked = cast("HTTPScope", {**scope, "method": "GET"})
        await self._app(asked, receive, send_head)


def allowed(app: Litestar, path: str) -> str:
    """The methods of a path, as the Allow header of a 405 lists them."""
    normal = normalize_path(path)
    methods = [method for method in _METHODS if _is_routed(app, normal, method)]
    if "GET" in methods and not _changes(path):
        methods.insert(1, "HEAD")
    return ", ".join(methods)


def _is_routed(app: Litestar, path: str, method: _Method) -> bool:
    try:
        app.asgi_router.handle_routing(path, method)
    except MethodNotAllowedException:
        return False
    return True


def _changes(path: str) -> bool:
    return _CHANGES.fullmatch(normalize_path(path)) is not None
