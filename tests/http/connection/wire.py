"""Raw HTTP client: sends any bytes, in any segments, and reads the answers one by one."""

import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

__all__ = ["ANSWER_SECONDS", "Answer", "Wire", "request", "wired"]

#: Far above a busy machine's time for one answer.
ANSWER_SECONDS = 20.0


class Answer(msgspec.Struct, frozen=True):
    """One answer, whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> tuple[int, str]:
        """Status and code; fails if it is not a problem document."""
        assert self.headers["content-type"] == "application/problem+json", self
        document: dict[str, Any] = msgspec.json.decode(self.body)
        assert document["status"] == self.status
        assert document["instance"] == self.headers["x-request-id"]
        return self.status, document["code"]

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Wire:
    """One connection."""

    def __init__(self, url: str, *, seconds: float = ANSWER_SECONDS) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=seconds)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_pieces(self, pieces: Iterable[bytes], pause: float = 0.0) -> None:
        """Send each piece in its own segment, as far as TCP lets a sender choose."""
        for piece in pieces:
            self.socket.sendall(piece)
            time.sleep(pause)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer; `100 Continue` counts as one."""
        head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        status = int(head[0].split(" ")[1])
        headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in head[1:] if line)
        }
        if method == "HEAD" or status in (100, 204, 304):
            body = b""
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            body = b"".join(self._chunks())
        elif "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        else:
            body = self.rest()
        return Answer(status, headers, body)

    def answers(self) -> list[Answer]:
        """All that come until the other side closes."""
        found: list[Answer] = []
        with suppress(EOFError, ConnectionError):
            while True:
                found.append(self.answer())
        return found

    def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        with suppress(ConnectionResetError):
            while self._more():
                pass
        rest, self._received = self._received, b""
        return rest

    def is_closed(self, within: float) -> bool:
        """Whether the other side closes in time, and sends nothing before."""
        self.socket.settimeout(within)
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        self.socket.close()

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._until(b"\r\n").split(b";")[0], 16):
            yield self._exactly(size)
            self._exactly(2)
        while self._until(b"\r\n") != b"\r\n":
            pass

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._received:
            if not self._more():
                raise EOFError(self._received)
        found, _, self._received = self._received.partition(mark)
        return found + mark

    def _exactly(self, count: int) -> bytes:
        while len(self._received) < count:
            if not self._more():
                raise EOFError(self._received)
        found, self._received = self._received[:count], self._received[count:]
        return found

    def _more(self) -> bool:
        data = self.socket.recv(65_536)
        self._received += data
        return bool(data)


@contextmanager
def wired(url: str, *, seconds: float = ANSWER_SECONDS) -> Iterator[Wire]:
    """A connection that is closed at the end."""
    wire = Wire(url, seconds=seconds)
    try:
        yield wire
    finally:
        wire.close()


def request(
    method: str, path: str, body: bytes | None = None, *, host: str = "edge", **headers: str
) -> bytes:
    """A well-formed request; underscores in the names of headers are hyphens."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None and "Transfer_Encoding" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b"")
