"""Rejects unknown query parameters: a misspelt filter must not list everything."""

from weakref import WeakKeyDictionary

from litestar.handlers import HTTPRouteHandler
from litestar.handlers.base import BaseRouteHandler

from api.http.auth.bearer import Connection
from reservation.domain.errors import MalformedRequest

__all__ = ["requires_known_query"]

_known: WeakKeyDictionary[BaseRouteHandler, frozenset[str]] = WeakKeyDictionary()


async def requires_known_query(connection: Connection, handler: BaseRouteHandler) -> None:
    """Guard: only parameters that the handler declares, or 400."""
    given = connection.query_params.keys()
    if not given:
        return
    known = _known.get(handler)
    if known is None:
        known = _known[handler] = _parameters_of(handler, connection)
    unknown = sorted(given - known)
    if unknown:
        others = f"; allowed: {', '.join(sorted(known))}" if known else ""
        raise MalformedRequest(
            f"{unknown[0][:100]!r} is not a query parameter of this endpoint{others}."
        )


def _parameters_of(handler: BaseRouteHandler, connection: Connection) -> frozenset[str]:
    if not isinstance(handler, HTTPRouteHandler):
        return frozenset()
    model = handler.create_kwargs_model(path_parameters=connection.path_params)
    return frozenset(parameter.field_alias for parameter in model.expected_query_params)
