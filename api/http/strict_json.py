"""Bodies are decoded strictly and once: a number in quotes is no number."""

from typing import Any

import msgspec
from litestar import Request
from litestar.datastructures import State

from reservation.domain.errors import MalformedRequest

__all__ = ["StrictRequest"]


class StrictRequest(Request[Any, Any, State]):
    """A request whose JSON is what its handler asks for.

    The framework converts what it has decoded leniently, as it must for queries and headers, where
    everything is text; what is of the right type already it leaves alone.
    """

    async def json(self) -> Any:
        """The body as the handler's own type.

        Raises:
            MalformedRequest: naming the first thing that does not fit.
        """
        field = self.route_handler.parsed_data_field
        if field is None:
            return await super().json()
        try:
            return msgspec.json.decode(await self.body(), type=field.annotation)
        except UnicodeDecodeError as error:
            raise MalformedRequest("The body is not UTF-8.") from error
        except msgspec.MsgspecError as error:
            raise MalformedRequest(f"The body does not fit: {error}") from error
