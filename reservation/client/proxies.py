"""Whether requests to an address may use the proxy from the environment."""

import ipaddress
from urllib.parse import urlsplit

__all__ = ["uses_proxies"]


def uses_proxies(url: str) -> bool:
    """False for loopback addresses: no proxy can reach this machine's own.

    Desktops set `ALL_PROXY` for everything, in forms that httpx does not support, too.
    """
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True
