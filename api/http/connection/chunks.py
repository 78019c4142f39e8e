"""Decodes a chunked body incrementally and finds its exact end (RFC 9112, 7.1)."""

import re
from enum import Enum, auto
from typing import Final, NoReturn

from api.http.connection.head import BODY_BYTES_MAX, RequestRefused, refuse_body

__all__ = ["ChunkedBody"]

#: A chunk's size line with its extensions, which are ignored.
LINE_BYTES_MAX: Final = 1024
#: Trailers are read and ignored.
TRAILER_BYTES_MAX: Final = 8 * 1024
_TEXT: Final = rb"\t\x20-\x7e\x80-\xff"
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[" + _TEXT + rb"]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[" + _TEXT + rb"]*")


class _Part(Enum):
    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILER = auto()


class ChunkedBody:
    """The body of one request while it arrives."""

    def __init__(self) -> None:
        self.body = bytearray()
        self._part = _Part.SIZE
        #: Bytes that the current chunk still lacks.
        self._left = 0
        self._trailer_bytes = 0
        self._pending = b""

    def feed(self, data: bytes) -> bytes | None:
        """Take the next bytes; returns the bytes after the body once it is complete, else None.

        Raises:
            RequestRefused: the chunks are malformed, or together too large.
        """
        data = self._pending + data
        at = 0
        while True:
            if self._part is _Part.DATA:
                taken = data[at : at + self._left]
                self.body += taken
                self._left -= len(taken)
                at += len(taken)
                if self._left:
                    self._pending = b""
                    return None
                self._part = _Part.DATA_END
            end = data.find(b"\r\n", at)
            if end < 0:
                self._pending = data[at:]
                self._check_pending()
                return None
            line = data[at:end]
            at = end + 2
            if self._ends_with(line):
                return data[at:]

    def _ends_with(self, line: bytes) -> bool:
        """Take one line; whether it is the last of the body."""
        if self._part is _Part.SIZE:
            self._begin_chunk(line)
        elif self._part is _Part.DATA_END:
            if line:
                _refuse("A chunk exceeds its declared size.")
            self._part = _Part.SIZE
        elif not line:
            return True
        else:
            self._trailer_bytes += len(line) + 2
            if self._trailer_bytes > TRAILER_BYTES_MAX or _TRAILER.fullmatch(line) is None:
                _refuse("The trailers are malformed or too large.")
        return False

    def _begin_chunk(self, line: bytes) -> None:
        size = _SIZE.fullmatch(line) if len(line) <= LINE_BYTES_MAX else None
        if size is None:
            _refuse("A chunk's size line is malformed.")
        self._left = int(size[1], 16)
        if len(self.body) + self._left > BODY_BYTES_MAX:
            refuse_body()
        self._part = _Part.DATA if self._left else _Part.TRAILER

    def _check_pending(self) -> None:
        """Refuse an unterminated line as soon as it is invalid."""
        if self._part is _Part.DATA_END:
            most = 0
        elif self._part is _Part.SIZE:
            most = LINE_BYTES_MAX
        else:
            most = TRAILER_BYTES_MAX - self._trailer_bytes
        # A trailing CR may be half of the line's end.
        line = self._pending.removesuffix(b"\r")
        if len(line) > most or b"\n" in line or b"\r" in line:
            _refuse("A chunk's size line is malformed or does not end in CR LF.")


def _refuse(detail: str) -> NoReturn:
    raise RequestRefused(400, "malformed_request", detail)
