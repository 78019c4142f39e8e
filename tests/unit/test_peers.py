"""Whose address counts: what proxies of ours say, and nothing that a caller can."""

from pathlib import Path

import pytest
from litestar.connection import ASGIConnection

from api.auth import Peers
from reservation.settings import Settings

PROXIES = "10.0.0.0/8,2001:db8::/32"


@pytest.mark.parametrize(
    ("peer", "lines", "address"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["192.0.2.7, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        # A proxy that adds a line of its own below the caller's.
        ("10.0.0.1", ["192.0.2.7", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["192.0.2.7", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("2001:db8::1", ["2001:4860::8"], "2001:4860::8"),
        ("10.0.0.1", [], "10.0.0.1"),
    ],
)
def test_the_rightmost_address_that_no_proxy_of_ours_put_there(
    tmp_path: Path, peer: str, lines: list[str], address: str
) -> None:
    environ = {"RESERVATION_TRUSTED_PROXIES": PROXIES, "RESERVATION_DATA_DIR": str(tmp_path)}
    peers = Peers(Settings.load(environ, None))
    headers = [(b"x-forwarded-for", line.encode()) for line in lines]
    scope = {"type": "http", "headers": headers, "client": (peer, 1)}
    assert peers.address(ASGIConnection(scope)) == address  # type: ignore[arg-type]
