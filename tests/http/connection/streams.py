"""Draws byte streams of requests: good, unusual, contradictory, and with requests in their bodies.

A stream is what one client sends on one connection. Each request of it carries its own id,
which its answer must carry back. A body may hold a request under an id that begins with
`smuggled`: no answer anywhere may carry that.
"""

import random
from collections.abc import Iterator

import msgspec

__all__ = ["Stream", "draw", "segments"]

#: Answered by the service without a credential; each with the status that it gives.
PATHS = (
    ("GET", "/health/live", 200),
    ("GET", "/v1/nothing?a=b%20c", 404),
    ("POST", "/v1/nothing", 404),
    ("POST", "/v1/payments/toss/webhooks", 200),
    ("POST", "/v1/sales/nothing/reservations", 401),
    ("PUT", "/v1/admin/sales/nothing", 401),
    ("DELETE", "/v1/sales", 405),
    ("GET", "http://edge/health/live", 200),
)
OFFERS: tuple[tuple[str, ...], ...] = (
    ("Connection: Upgrade", "Upgrade: websocket"),
    ("Connection: upgrade", "Upgrade: anything/1"),
    ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARA"),
    ("Expect: 100-continue",),
    ("Expect: 100-continue", "Connection: Upgrade", "Upgrade: y"),
    ("TE: trailers", "Trailer: Authorization"),
    (),
    (),
    (),
)
TRAILERS = (b"", b"X-Request-Id: smuggled-trailer\r\nAuthorization: Bearer x\r\n", b"X: y\r\n")
#: Header lines that make any request one that must be refused; in front of a request in the body.
CONFLICTS = (
    "Content-Length: 5\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 5",
    "Content-Length: 5\r\nContent-Length: 0",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, identity",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding:\x0bchunked",
    "Content-Length: +5",
    "Content-Length: 5, 5",
    "Content-Length : 5",
    "X: y\r\n folded: z",
    "X: a\x00b",
    "Host: another",
    "no colon",
)
STARTS = (
    "GET /health/live HTTP/2.0",
    "GET /health/live HTTP/1.9",
    "GET  /health/live HTTP/1.1",
    "GET /health/live",
    "BREW /health/live HTTP/1.1",
    "G\x01T /health/live HTTP/1.1",
)


class Stream(msgspec.Struct, frozen=True):
    """One client's bytes."""

    data: bytes
    #: The answers that it must get, in order: id and status.
    answers: list[tuple[str, int]]
    #: Whether one refusal follows them, and the connection ends there.
    refused: bool
    #: Ids of the requests for a path of the operators.
    inward: frozenset[str]


def draw(seed: int) -> Stream:
    """The stream of this number."""
    choice = random.Random(seed)
    answers: list[tuple[str, int]] = []
    parts: list[bytes] = []
    inward: set[str] = set()
    count = choice.randint(1, 5)
    refused = choice.random() < 0.3
    for number in range(count):
        its_id = f"own-{seed:06d}-{number}"
        last = number == count - 1 and not refused
        data, status = _good(choice, its_id, last=last)
        parts.append(data)
        answers.append((its_id, status))
        if data.startswith(b"PUT /v1/admin"):
            inward.add(its_id)
    if refused:
        parts.append(_bad(choice, f"own-{seed:06d}-x"))
        # On its way already. A proxy that forgives more than the service may answer it.
        parts.append(
            f"GET /v1/nothing HTTP/1.1\r\nHost: edge\r\nX-Request-Id: own-{seed:06d}-y".encode()
        )
        parts.append(b"\r\n\r\n")
    return Stream(b"".join(parts), answers, refused, frozenset(inward))


def segments(data: bytes, seed: int) -> Iterator[bytes]:
    """The same bytes, cut at random: in one piece, in a few, or in many."""
    choice = random.Random(seed)
    longest = choice.choice((len(data) + 1, 400, 60, 7))
    while data:
        length = choice.randint(1, longest)
        yield data[:length]
        data = data[length:]


def _smuggled(choice: random.Random) -> bytes:
    method = choice.choice(("GET /health/live", "POST /v1/payments/toss/webhooks"))
    ends = choice.choice((b"\r\n\r\n", b"\r\nX: "))
    number = choice.randrange(10**6)
    return f"{method} HTTP/1.1\r\nHost: edge\r\nX-Request-Id: smuggled-{number:06d}".encode() + ends


def _body(choice: random.Random) -> bytes:
    return choice.choice(
        (
            b"",
            b"{}",
            b'{"items":[{"sku":"a","quantity":1}],"amount":1000}',
            b"\r\n" * choice.randint(1, 40) + _smuggled(choice),
            _smuggled(choice),
            b"0\r\n\r\n" + _smuggled(choice),
            b"x" * choice.randint(1, 9_000),
        )
    )


def _good(choice: random.Random, its_id: str, *, last: bool) -> tuple[bytes, int]:
    method, target, status = choice.choice(PATHS)
    offer = list(choice.choice(OFFERS))
    if last:
        offer = [line for line in offer if not line.startswith("Connection")]
        offer.append("Connection: close")
    body = b"" if method == "GET" and choice.random() < 0.7 else _body(choice)
    if not body:
        # nginx waits for no body, and passes no expectation on, where none is declared.
        offer = [line for line in offer if not line.startswith("Expect")]
    lines = [f"{method} {target} HTTP/1.1", "Host: edge", f"X-Request-Id: {its_id}", *offer]
    lines.append("Content-Type: application/json")
    choice.shuffle(tail := lines[1:])
    lines[1:] = tail
    if body and choice.random() < 0.5:
        lines.append("Transfer-Encoding: chunked")
        body = _chunked(choice, body)
    elif body or method != "GET":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body, status


def _chunked(choice: random.Random, body: bytes) -> bytes:
    parts: list[bytes] = []
    while body:
        length = choice.randint(1, len(body))
        extension = choice.choice((b"", b"", b";a=b"))
        parts.append(b"%x%b\r\n%b\r\n" % (length, extension, body[:length]))
        body = body[length:]
    return b"".join(parts) + b"0\r\n" + choice.choice(TRAILERS) + b"\r\n"


def _bad(choice: random.Random, its_id: str) -> bytes:
    if choice.random() < 0.4:
        return f"{choice.choice(STARTS)}\r\nHost: edge\r\nX-Request-Id: {its_id}\r\n\r\n".encode()
    conflict = choice.choice(CONFLICTS)
    head = f"POST /v1/nothing HTTP/1.1\r\nHost: edge\r\nX-Request-Id: {its_id}\r\n{conflict}"
    return head.encode("latin-1") + b"\r\n\r\n" + choice.choice((b"0\r\n\r\n", b"hello", b""))
