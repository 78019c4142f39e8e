"""Decodes JSON bodies once and strictly: a quoted number is not a number."""

from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.datastructures import State

from reservation.domain.errors import MalformedRequest

__all__ = ["StrictRequest", "decode_strictly"]

T = TypeVar("T")


class StrictRequest(Request[Any, Any, State]):
    """A request whose JSON is decoded as its handler's type.

    The framework converts decoded values leniently, as it must for queries and headers, where every
    value is text; values that already have the right type pass through unchanged.
    """

    async def json(self) -> Any:
        """The body as the handler's type.

        Raises:
            MalformedRequest: naming the first member that does not fit.
        """
        field = self.route_handler.parsed_data_field
        if field is None:
            return await super().json()
        return decode_strictly(await self.body(), field.annotation)


def decode_strictly(body: bytes, kind: type[T]) -> T:
    """The body as this type.

    Raises:
        MalformedRequest: naming the first member that does not fit.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except UnicodeDecodeError as error:
        raise MalformedRequest("The body is not UTF-8.") from error
    except msgspec.MsgspecError as error:
        raise MalformedRequest(f"The body is invalid: {error}") from error
