"""Refusals of requests that RFC 9112 forbids: problem documents, and the connection closes."""

import pytest

from tests.http.connection.wire import request, wired
from tests.support.service import Served

HEAD_BYTES_MAX = 32 * 1024
BAD = (400, "malformed_request")
LARGE = (431, "head_too_large")
UNKNOWN = (501, "not_implemented")
VERSION = (505, "http_version_not_supported")

#: After `GET /health/live HTTP/1.1` and a line end.
HEADS: dict[str, tuple[bytes, tuple[int, str]]] = {
    "no host": (b"X: y\r\n\r\n", BAD),
    "two hosts": (b"Host: a\r\nHost: a\r\n\r\n", BAD),
    "a host that is none": (b"Host: a b\r\n\r\n", BAD),
    "a list of hosts": (b"Host: a@b/c\r\n\r\n", BAD),
    "two lengths": (b"Host: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", BAD),
    "a list of lengths": (b"Host: a\r\nContent-Length: 1, 1\r\n\r\nx", BAD),
    "a negative length": (b"Host: a\r\nContent-Length: -1\r\n\r\nx", BAD),
    "a signed length": (b"Host: a\r\nContent-Length: +1\r\n\r\nx", BAD),
    "a hexadecimal length": (b"Host: a\r\nContent-Length: 0x1\r\n\r\nx", BAD),
    "an empty length": (b"Host: a\r\nContent-Length:\r\n\r\nx", BAD),
    "a length of 30 digits": (b"Host: a\r\nContent-Length: " + b"1" * 30 + b"\r\n\r\n", BAD),
    "a length beside chunks": (
        b"Host: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        BAD,
    ),
    "chunks beside a length": (
        b"Host: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        BAD,
    ),
    "compressed chunks": (b"Host: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", UNKNOWN),
    "no chunk at the end": (b"Host: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", BAD),
    "chunks twice": (b"Host: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n", BAD),
    "two transfer codings": (
        b"Host: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
        BAD,
    ),
    "identity": (b"Host: a\r\nTransfer-Encoding: identity\r\n\r\n", BAD),
    "a misspelt coding": (b"Host: a\r\nTransfer-Encoding: xchunked\r\n\r\n", BAD),
    "a vertical tab before the coding": (b"Host: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", BAD),
    "a folded line": (b"Host: a\r\nX: y\r\n z\r\n\r\n", BAD),
    "a space before the colon": (b"Host : a\r\n\r\n", BAD),
    "no name": (b"Host: a\r\n: x\r\n\r\n", BAD),
    "no colon": (b"Host: a\r\nX\r\n\r\n", BAD),
    "a NUL": (b"Host: a\r\nX: \0\r\n\r\n", BAD),
    "a bare line feed": (b"Host: a\r\nX: y\nZ: 1\r\n\r\n", BAD),
    "a bare carriage return": (b"Host: a\r\nX: y\rZ: 1\r\n\r\n", BAD),
    "line feeds alone": (b"Host: a\n\n", BAD),
    "101 lines": (b"Host: a\r\n" + b"X: y\r\n" * 100 + b"\r\n", LARGE),
    "a long line": (b"Host: a\r\nX: " + b"y" * HEAD_BYTES_MAX + b"\r\n\r\n", LARGE),
    "a line without end": (b"Host: a\r\nX: " + b"y" * HEAD_BYTES_MAX, LARGE),
}
STARTS: dict[str, tuple[bytes, tuple[int, str]]] = {
    "HTTP/2": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", VERSION),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", VERSION),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", VERSION),
    "HTTP/0.9": (b"GET /\r\n\r\n", BAD),
    "another protocol": (b"GET / RTSP/1.0\r\nHost: a\r\n\r\n", BAD),
    "chunks in HTTP/1.0": (
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        BAD,
    ),
    "an unknown method": (b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n", UNKNOWN),
    "a tunnel": (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", UNKNOWN),
    "a method in small letters": (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", UNKNOWN),
    "a method that is not a token": (b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    "a tab": (b"GET /\t HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    "a space in the path": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    "a path that is not ASCII": (b"GET /\xed\x95\x9c HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    "no path": (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    "another scheme": (b"GET ftp://a/b HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    "a long path": (b"GET /" + b"a" * HEAD_BYTES_MAX + b" HTTP/1.1\r\nHost: a\r\n\r\n", LARGE),
    "empty lines": (b"\r\n" * 20 + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", BAD),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", BAD),
}
CHUNKS: dict[str, bytes] = {
    "a size that is not a number": b"x\r\n",
    "a signed size": b"+1\r\nx\r\n0\r\n\r\n",
    "a size with 0x": b"0x1\r\nx\r\n0\r\n\r\n",
    "a space behind the size": b"1 \r\nx\r\n0\r\n\r\n",
    "no size": b"\r\nx\r\n0\r\n\r\n",
    "a chunk longer than its size": b"1\r\nxy\r\n0\r\n\r\n",
    "a bare line feed behind the size": b"1\nx\r\n0\r\n\r\n",
    "a bare line feed behind the chunk": b"1\r\nx\n0\r\n\r\n",
    "a size of 20 digits": b"f" * 20 + b"\r\n",
    "an extension without end": b"1;" + b"a" * 5_000,
    "a trailer that is none": b"0\r\nno trailer\r\n\r\n",
    "a trailer with a NUL": b"0\r\nX: \0\r\n\r\n",
    "trailers without end": b"0\r\n" + b"X: y\r\n" * 5_000,
}


def refused(served: Served, stream: bytes) -> tuple[int, str]:
    """The answer to a stream that must be refused; the request behind it is not read."""
    with wired(served.url) as wire:
        wire.send(stream)
        answer = wire.answer()
        assert answer.headers["connection"] == "close"
        assert wire.rest() == b""
        return answer.problem


@pytest.mark.parametrize("case", HEADS)
def test_a_bad_head_is_refused(edge: Served, case: str) -> None:
    head, problem = HEADS[case]
    assert refused(edge, b"GET /health/live HTTP/1.1\r\n" + head) == problem


@pytest.mark.parametrize("case", STARTS)
def test_a_bad_request_line_is_refused(edge: Served, case: str) -> None:
    start, problem = STARTS[case]
    assert refused(edge, start) == problem


@pytest.mark.parametrize("case", CHUNKS)
def test_invalid_chunks_are_refused(edge: Served, case: str) -> None:
    head = b"POST /v1/guests HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert refused(edge, head + CHUNKS[case]) == BAD


def test_a_body_above_every_limit_is_refused_before_it_is_read(edge: Served) -> None:
    head = b"POST /v1/guests HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
    assert refused(edge, head) == (413, "malformed_request")
    head = b"POST /v1/guests HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert refused(edge, head + b"fffff\r\n") == (413, "malformed_request")


def test_a_refusal_contains_the_request_id(edge: Served) -> None:
    stream = request("POST", "/", X_Request_Id="my-own-id", Transfer_Encoding="chunked") + b"x\r\n"
    with wired(edge.url) as wire:
        wire.send(stream)
        assert wire.answer().headers["x-request-id"] == "my-own-id"


def test_unusual_but_valid_requests_are_answered(edge: Served) -> None:
    host = b"Host: [::1]:8000\r\n"
    allowed = [
        b"\r\n\r\nGET /health/live HTTP/1.1\r\n" + host + b"\r\n",
        b"GET http://elsewhere/health/live HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /health/live?a=b#c HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /health/live HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nhOsT:\t a_b.example:1 \t\r\nX:\r\nY: \xff\xfe\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\n" + host + b"X: y\r\n" * 99 + b"\r\n",
        b"GET /health/live HTTP/1.1\r\n" + host + b"Content-Length: 3\r\n\r\nabc",
        b"GET /health/live HTTP/1.1\r\n" + host + b"Transfer-Encoding: Chunked\r\n\r\n"
        b'3;a="b"\r\nabc\r\n0\r\nX: y\r\n\r\n',
        b"GET /health/live HTTP/1.0\r\n\r\n",
    ]
    for stream in allowed:
        with wired(edge.url) as wire:
            wire.send(stream)
            assert wire.answer().status == 200, stream
