"""Assembles one request, its head and its body, from the bytes of a connection."""

import re
from enum import Enum, auto
from typing import Final, NoReturn

from api.http.connection.head import (
    BODY_BYTES_MAX,
    CHUNKED,
    HEAD_ENDS,
    Head,
    RequestRefused,
    check_start,
    read_head,
    refuse_body,
)

__all__ = ["Complete", "RequestReader"]

#: Empty lines before a request, which old clients send after a body.
EMPTY_LINES_MAX: Final = 4
#: A chunk's size line with its extensions, which are ignored.
LINE_BYTES_MAX: Final = 1024
#: Trailers are read and ignored.
TRAILER_BYTES_MAX: Final = 8 * 1024
_TEXT: Final = rb"\t\x20-\x7e\x80-\xff"
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[" + _TEXT + rb"]*)?")
_TRAILER = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[" + _TEXT + rb"]*")

#: Head, body, and the bytes after them.
Complete = tuple[Head, bytes, bytes]


class _Part(Enum):
    SIZE = auto()
    DATA = auto()
    DATA_END = auto()
    TRAILER = auto()


class ChunkedBody:
    """A chunked body while it arrives; finds its exact end (RFC 9112, 7.1)."""

    def __init__(self) -> None:
        self.body: bytearray = bytearray()
        self._part = _Part.SIZE
        #: Bytes that the current chunk still lacks.
        self._left = 0
        self._trailer_bytes = 0
        self._pending: bytes = b""

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


class RequestReader:
    """The received part of one request."""

    def __init__(self) -> None:
        #: Set once it has arrived, while the body has not.
        self.head: Head | None = None
        #: Received, and to be passed again together with the next bytes.
        self.kept = b""
        self._chunks: ChunkedBody | None = None
        #: The number of kept bytes already searched for the end of a head.
        self._searched = 0
        self._empty_lines = 0
        self._continued = False

    @property
    def has_begun(self) -> bool:
        """Whether any byte of it has arrived; empty lines before it do not count."""
        return bool(self.kept) or self.head is not None

    @property
    def held_bytes(self) -> int:
        """The memory that it takes."""
        return len(self.kept) + (0 if self._chunks is None else len(self._chunks.body))

    def read(self, data: bytes) -> Complete | None:
        """The request, or None if it is incomplete.

        Args:
            data: the kept bytes and the new ones.

        Raises:
            RequestRefused: it is not a valid request.
        """
        head = self.head
        if head is None:
            end = data.find(HEAD_ENDS, self._searched)
            if end < 0 or data[:2] == b"\r\n":
                return self._search_on(data)
            head = read_head(data[:end])
            end += 4
            if head.length == len(data) - end:
                # The common case: complete, and not pipelined.
                return head, data[end:], b""
            data = data[end:]
            if head.length == CHUNKED:
                self.head, self._chunks = head, ChunkedBody()
        if self._chunks is not None:
            rest = self._chunks.feed(data)
            if rest is not None:
                return head, bytes(self._chunks.body), rest
            # The decoder holds the bytes that it has taken.
            self.kept = b""
        elif len(data) >= head.length:
            return head, data[: head.length], data[head.length :]
        else:
            self.kept = data
        self.head = head
        return None

    def must_continue(self) -> bool:
        """Whether the client waits for `100 Continue`; true once."""
        if self.head is None or self._continued or self.held_bytes:
            return False
        self._continued = True
        return self.head.expects_continue

    def _search_on(self, data: bytes) -> Complete | None:
        """Handle a partial head, or an empty line before it."""
        if data[:2] == b"\r\n":
            self._empty_lines += 1
            self._searched = 0
            if self._empty_lines > EMPTY_LINES_MAX:
                raise RequestRefused(
                    400, "malformed_request", "The request begins with too many empty lines."
                )
            complete = self.read(data[2:])
            if complete is not None:
                self._empty_lines = 0
            return complete
        check_start(data, self._searched)
        self._searched = max(0, len(data) - len(HEAD_ENDS) + 1)
        self.kept = data
        return None


def _refuse(detail: str) -> NoReturn:
    raise RequestRefused(400, "malformed_request", detail)
