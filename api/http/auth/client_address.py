"""Client addresses, behind trusted proxies too: the key of the limits per address."""

import ipaddress
import re
from typing import Final

from api.http.auth.bearer import Connection
from reservation.config.settings import Settings

__all__ = ["ClientAddressResolver"]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: A provider assigns a customer at least a /64, and the customer may use every address in it.
_IPV6_BITS_COUNTED: Final = 64
_WITH_PORT = re.compile(r"(\[(?P<bracketed>[^\]]*)\]|(?P<v4>[0-9.]+))(:[0-9]{1,5})?")


class ClientAddressResolver:
    """The client address; forwarding headers are trusted only from the configured proxies."""

    def __init__(self, settings: Settings) -> None:
        self._proxies = [ipaddress.ip_network(text) for text in settings.trusted_proxies]

    def address(self, connection: Connection) -> str:
        """The address under which the caller is counted; empty if there is none.

        IPv4 is counted as it is, IPv6 by its /64. A malformed hop counts for the proxy that sent
        it, so a caller cannot choose its own key in a limiter.
        """
        peer = self._peer(connection)
        return "" if peer is None else _counted_as(peer)

    def remote(self, connection: Connection) -> str:
        """The same; empty for loopback addresses: local proxies and developers."""
        peer = self._peer(connection)
        return "" if peer is None or peer.is_loopback else _counted_as(peer)

    def _peer(self, connection: Connection) -> _Address | None:
        """The rightmost address that is not one of our proxies."""
        peer = _address(connection.client.host) if connection.client else None
        # A proxy may append its own header line: all lines together are one list.
        forwarded = ",".join(connection.headers.getall("x-forwarded-for", []))
        hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
        while hops and peer is not None and any(peer in network for network in self._proxies):
            hop = _address(hops.pop())
            if hop is None:
                break
            peer = hop
        return peer


def _address(text: str) -> _Address | None:
    """An address, with or without a port, brackets or a zone; None for any other text.

    Azure's gateway adds the port to IPv4 addresses, others write IPv6 as `[2001:db8::1]:443`.
    """
    match = _WITH_PORT.fullmatch(text)
    try:
        found = ipaddress.ip_address(match["bracketed"] or match["v4"] if match else text)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address):
        # A dual-stack socket or proxy reports IPv4 callers in this form.
        return found.ipv4_mapped or ipaddress.IPv6Address(int(found))
    return found


def _counted_as(address: _Address) -> str:
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.IPv6Network((int(address), _IPV6_BITS_COUNTED), strict=False))
