"""The bearer token of a request."""

from typing import Any, Final

from litestar.connection import ASGIConnection

__all__ = ["Connection", "bearer_in", "bearer_of"]

Connection = ASGIConnection[Any, Any, Any, Any]

_BEARER: Final = "bearer "


def bearer_of(connection: Connection) -> str | None:
    """The bearer token of a request, if it carries one."""
    return bearer_in(connection.headers.get("authorization", ""))


def bearer_in(authorization: str) -> str | None:
    """The bearer token in an Authorization header's value."""
    if authorization[: len(_BEARER)].lower() != _BEARER:
        return None
    return authorization[len(_BEARER) :].strip() or None
