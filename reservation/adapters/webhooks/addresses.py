"""Which addresses a webhook may be sent to.

Operators name the endpoints, so a webhook could otherwise call the service's own network, or the
metadata service of the cloud (server-side request forgery). Every address that a name resolves to
must be allowed, and the connection is made to the addresses that were checked.
"""

import asyncio
import re
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

__all__ = ["GuardedResolver", "RefusedAddress", "check_url", "is_allowed"]

URL_CHARS_MAX: Final = 2_000
Address = IPv4Address | IPv6Address

#: Never allowed: metadata services, link-local, unspecified, multicast and reserved addresses.
_NEVER: Final = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "169.254.0.0/16",
        "100.100.100.200/32",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/128",
        "100::/64",
        "2001::/23",
        "2001:db8::/32",
        "3fff::/20",
        "5f00::/16",
        "64:ff9b:1::/48",
        "fd00:ec2::254/128",
        "fe80::/10",
        "fec0::/10",
        "ff00::/8",
    )
)
#: Allowed with RESERVATION_WEBHOOK_ALLOW_PRIVATE=1.
_PRIVATE: Final = tuple(
    ip_network(text)
    for text in (
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "::1/128",
        "fc00::/7",
    )
)
#: IPv6 addresses that contain an IPv4 address, and the number of bits behind it.
_EMBEDDED: Final = (
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("::/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("2002::/16"), 80),
)
#: The last label of a host that resolvers read as a number: `2130706433`, `0x7f.1`, `017700000001`.
_NUMERIC: Final = re.compile(r"(?:^|\.)(?:0x[0-9a-f]*|[0-9]+)\.?$", re.IGNORECASE)


class RefusedAddress(OSError):
    """The endpoint's URL or address is not allowed."""


def is_allowed(address: Address, *, allow_private: bool) -> bool:
    """Whether webhooks may be sent to this address."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        for network, shift in _EMBEDDED:
            # The loopback address of IPv6 is among the compatible ones.
            if address in network and address != IPv6Address("::1"):
                inner = IPv4Address(int(address) >> shift & 0xFFFF_FFFF)
                return is_allowed(inner, allow_private=allow_private)
    if any(address in network for network in _NEVER):
        return False
    if any(address in network for network in _PRIVATE):
        return allow_private
    return address.is_global


def check_url(text: str, *, allow_private: bool) -> URL:
    """The URL of an endpoint; its host is not resolved yet.

    Raises:
        RefusedAddress: it is malformed or not allowed; the message is a sentence.
    """
    if len(text) > URL_CHARS_MAX or not text.isascii() or not text.isprintable():
        raise RefusedAddress(
            f"The URL must have at most {URL_CHARS_MAX} printable ASCII characters."
        )
    try:
        url = URL(text)
        host, _ = url.host, url.port
    except ValueError as error:
        raise RefusedAddress("The URL is malformed.") from error
    if url.scheme not in (("https", "http") if allow_private else ("https",)) or not host:
        raise RefusedAddress("The URL must begin with https://.")
    if url.user is not None or url.password is not None or url.fragment or "\\" in text:
        raise RefusedAddress("The URL must not have a user, a password, a fragment or a backslash.")
    check_host(host, allow_private=allow_private)
    return url


def check_host(host: str, *, allow_private: bool) -> None:
    """Check a host that is an address; names are checked when they are resolved.

    Raises:
        RefusedAddress: the address is not allowed, or in a form that resolvers read differently.
    """
    try:
        address = ip_address(host)
    except ValueError:
        if _NUMERIC.search(host) or "%" in host or ":" in host:
            raise RefusedAddress("The URL's host is not an address in the usual form.") from None
        return
    if not is_allowed(address, allow_private=allow_private):
        raise RefusedAddress("The URL's address is not allowed for webhooks.")


class GuardedResolver(AbstractResolver):
    """Resolves a host for one connection, and refuses it if any of its addresses is not allowed."""

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """The addresses of the host, all of them allowed.

        Raises:
            RefusedAddress: an address is not allowed.
            OSError: the host has no address.
        """
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, family=family
        )
        results: list[ResolveResult] = []
        for kind, _, protocol, _, place in found:
            text = str(place[0])
            if not is_allowed(ip_address(text), allow_private=self._allow_private):
                raise RefusedAddress(f"{host} resolves to an address that is not allowed.")
            results.append(
                ResolveResult(
                    hostname=host,
                    host=text,
                    port=port,
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        if not results:
            raise OSError(f"{host} has no address")
        return results

    async def close(self) -> None:
        """Nothing to close."""
