"""Cursors of pages: where a page ended, as opaque text."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Final

import msgspec

__all__ = ["PAGE_MAX", "cursor_of", "place_of"]

#: Rows of one page.
PAGE_MAX: Final = 100


def cursor_of(created_at_ms: int, order_id: str) -> str:
    """The cursor of the next page."""
    return urlsafe_b64encode(msgspec.json.encode([created_at_ms, order_id])).decode()


def place_of(cursor: str) -> tuple[int, str]:
    """Decode a cursor: the time and order id at which the previous page ended.

    Raises:
        ValueError: a wrong alphabet, or wrong JSON.
    """
    return msgspec.json.decode(urlsafe_b64decode(cursor), type=tuple[int, str])
