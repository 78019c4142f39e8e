"""The bases of everything that travels over the wire, and the texts that it may carry."""

from typing import Final

from msgspec import Struct

from reservation.domain.text import TEXT

__all__ = ["WORDS", "RequestModel", "ResponseModel"]

#: Of names and reasons.
WORDS: Final = TEXT


class ResponseModel(Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of everything that we send."""


class RequestModel(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Base of everything that we take: a field that we do not know is refused."""
