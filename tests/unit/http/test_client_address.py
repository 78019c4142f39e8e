"""The client address: headers of trusted proxies count, headers of a client do not."""

from pathlib import Path

import pytest
from litestar.connection import ASGIConnection

from api.http.auth.client_address import ClientAddressResolver
from reservation.config.settings import Settings

PROXIES = "10.0.0.0/8,2001:db8::/32"
MAPPED = "::ffff:10.0.0.0/104,2001:db8::/32"


@pytest.mark.parametrize("proxies", [PROXIES, MAPPED])
@pytest.mark.parametrize(
    ("peer", "lines", "address"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["192.0.2.7, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        # A proxy that appends its own line below the client's.
        ("10.0.0.1", ["192.0.2.7", "198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["192.0.2.7", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        ("2001:db8::1", ["2001:4860::8"], "2001:4860::/64"),
        # With a port, as Azure's application gateway writes it.
        ("10.0.0.1", ["203.0.113.8:50001"], "203.0.113.8"),
        ("10.0.0.1", ["198.51.100.1, 10.0.0.4:4000"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:4860::8]:443"], "2001:4860::/64"),
        ("10.0.0.1", ["[2001:4860::8]"], "2001:4860::/64"),
        # IPv4 in IPv6, as a dual-stack socket or proxy writes it.
        ("10.0.0.1", ["198.51.100.1, ::ffff:10.0.0.5"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        # One line of a provider's customer, in any spelling.
        ("10.0.0.1", ["2001:4860:0:7:1::9"], "2001:4860:0:7::/64"),
        ("10.0.0.1", ["2001:4860:0:7:FFFF:1:2:3"], "2001:4860:0:7::/64"),
        ("10.0.0.1", ["2001:4860:0:8::1"], "2001:4860:0:8::/64"),
        ("10.0.0.1", ["fe80::1%eth0"], "fe80::/64"),
        # A hop without an address counts as its sender.
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, " + "a" * 8_000], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, _hidden, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", ["203.0.113.008"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.8:99999999"], "10.0.0.1"),
        ("10.0.0.1", ["[]"], "10.0.0.1"),
        ("testclient", ["198.51.100.1"], ""),
        ("10.0.0.1", [], "10.0.0.1"),
    ],
)
def test_the_client_is_the_rightmost_untrusted_address(
    tmp_path: Path, proxies: str, peer: str, lines: list[str], address: str
) -> None:
    environ = {"RESERVATION_TRUSTED_PROXIES": proxies, "RESERVATION_DATA_DIR": str(tmp_path)}
    peers = ClientAddressResolver(Settings.load(environ, None))
    headers = [(b"x-forwarded-for", line.encode()) for line in lines]
    scope = {"type": "http", "headers": headers, "client": (peer, 1)}
    assert peers.address(ASGIConnection(scope)) == address  # type: ignore[arg-type]
