"""The request-head parser: other strict parsers read each head that it accepts alike."""

import random

import h11
import pytest

from api.http.connection.head import (
    BODY_BYTES_MAX,
    CHUNKED,
    HEAD_ENDS,
    Head,
    RequestRefused,
    read_head,
)
from api.http.routes.admin_sales import SALE_BYTES_MAX
from tests.http.connection.streams import draw

CHANGES = (b"", b"\r", b"\n", b"\r\n", b"\0", b":", b" ", b"\t", b"\xff", b",", b"7", b"close")


def heads() -> list[bytes]:
    """Heads of generated requests, intact and damaged."""
    found: list[bytes] = []
    for seed in range(600):
        choice = random.Random(seed)
        head = bytearray(draw(seed).data.partition(HEAD_ENDS)[0])
        found.append(bytes(head))
        at = choice.randrange(len(head))
        head[at : at + choice.randint(0, 2)] = choice.choice(CHANGES)
        found.append(bytes(head))
    return found


def read(head: bytes) -> Head | None:
    try:
        return read_head(head)
    except RequestRefused:
        return None


def test_each_accepted_head_parses_as_in_h11() -> None:
    taken = 0
    for head in heads():
        mine = read(head)
        if mine is None:
            continue
        theirs = h11.Connection(h11.SERVER)
        theirs.receive_data(head + HEAD_ENDS)
        try:
            event = theirs.next_event()
        except h11.RemoteProtocolError:
            # h11 accepts no bytes above ASCII in a value; RFC 9110 does.
            assert not head.isascii(), head
            continue
        assert isinstance(event, h11.Request), head
        assert mine.method == event.method
        assert event.target.endswith(mine.target)
        # h11 writes the coding's name in lower case.
        assert [name for name, _ in mine.headers] == [name for name, _ in event.headers], head
        assert (mine.length == CHUNKED) == ((b"transfer-encoding", b"chunked") in event.headers)
        taken += 1
    assert taken > 600


def test_the_body_limit_covers_the_largest_route_limit() -> None:
    assert BODY_BYTES_MAX >= SALE_BYTES_MAX


@pytest.mark.parametrize(
    ("connection", "keep_alive"),
    [
        (b"", True),
        (b"Connection: keep-alive\r\n", True),
        (b"Connection: Close\r\n", False),
        (b"Connection: Upgrade, close\r\n", False),
        (b"Connection: close\r\nConnection: Upgrade\r\n", False),
        (b"Connection: closed\r\n", True),
    ],
)
def test_any_connection_header_can_close_the_connection(
    connection: bytes, *, keep_alive: bool
) -> None:
    for version, may_stay in ((b"1.1", True), (b"1.0", False)):
        head = b"GET / HTTP/" + version + b"\r\n" + connection + b"Host: h"
        assert read_head(head).keep_alive == (keep_alive and may_stay)


def test_cached_header_names_are_still_validated() -> None:
    read_head(b"GET / HTTP/1.1\r\nHost: h\r\nX-New: y")
    for line in (b"X-New", b"X-New : y", b" X-New: y", b"Host", b"X-New y: z"):
        assert read(b"GET / HTTP/1.1\r\nHost: h\r\n" + line) is None, line
