"""Base classes of the wire schemas, and the pattern of their texts."""

from typing import Final

from msgspec import Struct

from reservation.domain.text import LINES, TEXT

__all__ = ["PARAGRAPHS", "WORDS", "RequestModel", "ResponseModel"]

#: Pattern of names and reasons.
WORDS: Final = TEXT
#: Pattern of descriptions.
PARAGRAPHS: Final = LINES


class ResponseModel(Struct, frozen=True, kw_only=True, rename="camel"):
    """Base of every response body."""


class RequestModel(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Base of every request body: an unknown field is refused."""
