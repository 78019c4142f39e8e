"""Assembles one request from the bytes of a connection, however they are segmented."""

from typing import Final

from api.http.connection.chunks import ChunkedBody
from api.http.connection.head import (
    CHUNKED,
    HEAD_ENDS,
    Head,
    RequestRefused,
    check_start,
    read_head,
)

__all__ = ["Complete", "RequestReader"]

#: Empty lines before a request, which old clients send after a body.
EMPTY_LINES_MAX: Final = 4

#: Head, body, and the bytes after them.
Complete = tuple[Head, bytes, bytes]


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
