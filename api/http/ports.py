"""Restricts the operators' paths to the internal port."""

import re
from typing import Any, Final, cast

from litestar.types import ASGIApp, Receive, Scope, Send
from litestar.utils import normalize_path

__all__ = ["PublicPort", "is_internal"]

_INTERNAL: Final = re.compile(
    r"/(metrics|health|ops|docs|docs-assets|schema|v1/admin)(/.*)?", re.DOTALL
)
#: Load balancers probe it on the public port.
_ON_BOTH: Final = "/health/live"
#: No route has this path.
_UNKNOWN: Final = "/-"


def is_internal(path: str) -> bool:
    """Whether only the internal port serves this path, normalized as by the router."""
    normal = normalize_path(path)
    return normal != _ON_BOTH and _INTERNAL.fullmatch(normal) is not None


class PublicPort:
    """The outermost ASGI middleware: on the public port an internal path is treated as unknown.

    The path is replaced by one that no route has, so that the response equals that of an unknown
    path in every respect, for every method.
    """

    def __init__(self, app: ASGIApp, *, internal_port: int) -> None:
        self._app = app
        self._internal_port = internal_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and is_internal(scope["path"]):
            server: Any = scope.get("server")
            if server is None or server[1] != self._internal_port:
                raw = _UNKNOWN.encode()
                scope = cast("Scope", {**scope, "path": _UNKNOWN, "raw_path": raw})
        await self._app(scope, receive, send)
