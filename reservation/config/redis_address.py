"""Parses the address of Redis: a single server, a master behind Sentinel, or a cluster."""

import re
from enum import StrEnum
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

__all__ = ["AddressKind", "HostPort", "InvalidAddress", "RedisAddress", "parse_redis_url"]

#: A server or a sentinel.
HostPort = tuple[str, int]

_FORMS: Final = (
    "redis://HOST:PORT, rediss://HOST:PORT, unix:///PATH, "
    "redis+sentinel://HOST:PORT[,HOST:PORT...]/SERVICE or "
    "redis+cluster://HOST:PORT[,HOST:PORT...]"
)
_PORTS: Final = {"redis+sentinel": 26379, "redis+cluster": 6379}
_PORT_MAX: Final = 65_535
_DATABASE_MAX: Final = 9_999
_HOST: Final = re.compile(
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?)"
    r"(?::(?P<port>[0-9]{1,5}))?"
)
#: Sentinel's rule for names of masters.
_SERVICE: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TLS_OPTIONS: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SENTINEL_OPTIONS: Final = ("sentinel_user", "sentinel_password")


class AddressKind(StrEnum):
    """The kinds of a Redis address."""

    SERVER = "server"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class InvalidAddress(ValueError):
    """The text is not a valid address; the message states the requirement and omits the text."""


class RedisAddress(msgspec.Struct, frozen=True, kw_only=True):
    """An address of Redis."""

    kind: AddressKind
    #: As given; a single server's address is parsed by redis-py.
    url: str
    #: The sentinels, or the first nodes of a cluster; empty for a single server.
    hosts: tuple[HostPort, ...] = ()
    #: The sentinels' name of the master.
    service: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    #: redis-py's TLS options; None without TLS.
    tls: dict[str, str] | None = None


def parse_redis_url(url: str) -> RedisAddress:
    """Parse an address.

    Raises:
        InvalidAddress: the message states the requirement.
    """
    if not (url.isascii() and url.isprintable() and " " not in url):
        raise InvalidAddress(_FORMS)
    scheme, colon, _ = url.partition("://")
    if not colon or scheme not in _PORTS:
        return _single_server(url)
    return _several_servers(url, scheme)


def _single_server(url: str) -> RedisAddress:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidAddress(_FORMS) from error
    remote = parts.scheme in {"redis", "rediss"} and bool(parts.hostname)
    local = parts.scheme == "unix" and parts.path.startswith("/")
    if not (remote or local) or port == 0:
        raise InvalidAddress(_FORMS)
    return RedisAddress(kind=AddressKind.SERVER, url=url)


def _several_servers(url: str, scheme: str) -> RedisAddress:
    sentinel = scheme == "redis+sentinel"
    rest, _, query = url.removeprefix(f"{scheme}://").partition("?")
    if "#" in url:
        raise InvalidAddress(f"without a fragment (#): {_FORMS}")
    place, _, path = rest.partition("/")
    credentials, at, hosts = place.rpartition("@")
    username, _, password = credentials.partition(":")
    options = _options(query, (*_TLS_OPTIONS, *(_SENTINEL_OPTIONS if sentinel else ())))
    service, database = _service(path) if sentinel else ("", 0)
    if not sentinel and path.strip("/") not in ("", "0"):
        raise InvalidAddress("a cluster's address without a database: it has only database 0")
    return RedisAddress(
        kind=AddressKind.SENTINEL if sentinel else AddressKind.CLUSTER,
        url=url,
        hosts=tuple(_host_port(part, _PORTS[scheme]) for part in hosts.split(",")),
        service=service,
        database=database,
        username=unquote(username) or None if at else None,
        password=unquote(password) or None if at else None,
        sentinel_username=options.get("sentinel_user"),
        sentinel_password=options.get("sentinel_password"),
        tls=_tls(options),
    )


def _host_port(text: str, default: int) -> HostPort:
    match = _HOST.fullmatch(text)
    if match is None:
        raise InvalidAddress(f"hosts as HOST:PORT, comma-separated: {_FORMS}")
    port = int(match["port"] or default)
    if not 0 < port <= _PORT_MAX:
        raise InvalidAddress(f"ports from 1 to {_PORT_MAX}")
    return match["host"].strip("[]"), port


def _service(path: str) -> tuple[str, int]:
    name, _, database = path.partition("/")
    if not name:
        raise InvalidAddress(
            "a Sentinel address that ends with its service name: "
            "redis+sentinel://HOST:PORT[,HOST:PORT...]/SERVICE"
        )
    if not _SERVICE.fullmatch(name):
        raise InvalidAddress("a service name of letters, digits and . _ -")
    if database and not (database.isdecimal() and int(database) <= _DATABASE_MAX):
        raise InvalidAddress("a database number after the service name")
    return name, int(database or 0)


def _options(query: str, allowed: tuple[str, ...]) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, strict_parsing=True) if query else []
    except ValueError as error:
        raise InvalidAddress("options as NAME=VALUE, joined by &") from error
    found = dict(pairs)
    if len(found) != len(pairs) or not found.keys() <= {"tls", *allowed}:
        raise InvalidAddress(f"each option at most once, out of tls, {', '.join(allowed)}")
    if found.get("tls", "false") not in ("true", "false"):
        raise InvalidAddress("tls=true or tls=false")
    return found


def _tls(options: dict[str, str]) -> dict[str, str] | None:
    given = {name: options[name] for name in _TLS_OPTIONS if name in options}
    if options.get("tls") == "true":
        return given
    if given:
        raise InvalidAddress(f"tls=true together with {', '.join(given)}")
    return None
