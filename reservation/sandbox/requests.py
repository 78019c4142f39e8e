"""Request decoding."""

from collections.abc import Callable
from typing import TypeVar

import msgspec
from litestar import Request
from litestar.datastructures import State

from reservation.sandbox.refusals import Refusal

__all__ = ["AnyRequest", "read_body"]

AnyRequest = Request[object, object, State]

_Body = TypeVar("_Body")


async def read_body(request: AnyRequest, decode: Callable[[bytes], _Body]) -> _Body:
    """Decode the body; an invalid one raises the PG's refusal, with the reason."""
    try:
        return decode(await request.body())
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal("INVALID_REQUEST", f"잘못된 요청입니다. ({error})") from None
