"""Parsers for the text of a setting: `.env` lines, addresses, rates, lists."""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from reservation.config.redis_address import InvalidAddress, parse_redis_url
from reservation.domain.rate_limit import Rate
from reservation.domain.text import LINES

__all__ = ["PREFIX", "Rate", "Reader", "SettingsError", "read_dotenv", "refusal", "variable_of"]

#: Prefix of every variable.
PREFIX: Final = "RESERVATION_"

#: Maximum number of worker processes. Beyond it Redis' single thread saturates long before they do.
WORKERS_MAX: Final = 256

#: Largest `.env` that is read; a page of settings is 2 kB, a larger file is something else.
_DOTENV_CHARS_MAX: Final = 64 * 1024

#: Maximum digits of a number: the largest allowed has six, so that a longer one gets a range error.
_DIGITS_MAX: Final = 9

_SECONDS: Final = {"s": 1, "min": 60, "h": 3600}
#: At most seven digits: 9,999,999 a second is beyond the capacity of one Redis thread.
_RATE = re.compile(r"([1-9][0-9]{0,6})/(s|min|h)")
_KEY_PREFIX = re.compile(r"[A-Za-z0-9_-]{1,32}")
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*")
_CREDENTIAL = re.compile(r"[!-~]{1,512}")

#: The bits before the IPv4 address in an IPv4-mapped one.
_MAPPED_BITS: Final = 96

#: The file system's root, from which the CPU quota is read.
ROOT: Final = Path("/")
_GROUPS: Final = "sys/fs/cgroup"

#: Variables that Kubernetes sets in each pod for a Service whose name starts with the prefix: names
#: of no setting, and `..._PORT` with an address, which may be the name of a setting.
_SERVICE_LINK = re.compile(
    PREFIX + r"([A-Z0-9_]+_)?"
    r"(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")

#: Parses one field's value from the given settings, by field name; absent means its default.
Reader = Callable[[str, Mapping[str, str]], Any]


class SettingsError(Exception):
    """A setting is invalid: one sentence with its name and the allowed values, never its value."""


def variable_of(name: str) -> str:
    """The environment variable of a field."""
    return PREFIX + name.upper()


def refusal(name: str, allowed: str) -> SettingsError:
    """The error for a field with an invalid value."""
    return SettingsError(f"{variable_of(name)} must be {allowed}")


def is_service_link(variable: str, value: str) -> bool:
    """Whether Kubernetes set this variable for a Service: it is not a setting of this service."""
    if _SERVICE_LINK.fullmatch(variable) is not None:
        return True
    return variable.endswith("_PORT") and _SERVICE_ADDRESS.fullmatch(value) is not None


def read_dotenv(path: Path) -> dict[str, str]:
    """`NAME=value` lines; comments, `export` and quotes as in shells, no expansion."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            content = file.read(_DOTENV_CHARS_MAX + 1)
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read as text") from error
    if len(content) > _DOTENV_CHARS_MAX:
        raise SettingsError(f"{path} is longer than {_DOTENV_CHARS_MAX} characters")
    values: dict[str, str] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, value = _dotenv_pair(line.strip(), where=f"{path} line {number}")
            values[name] = value
    return values


def _dotenv_pair(line: str, *, where: str) -> tuple[str, str]:
    name, equals, value = line.removeprefix("export ").partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name.isidentifier():
        raise SettingsError(f"{where} must be NAME=value")
    if value[:1] in {'"', "'"}:
        quoted, closing, rest = value[1:].partition(value[0])
        if not closing or (rest.strip() and not rest.strip().startswith("#")):
            raise SettingsError(f"{where} must close the quote of its value")
        return name, quoted
    return name, re.split(r"(?:^|\s)#", value, maxsplit=1)[0].strip()


def text(name: str, given: Mapping[str, str]) -> str:
    """A key or a secret, or empty."""
    value = given.get(name, "")
    # A byte order mark or a line end copied along would be sent as part of the key.
    if value and not _CREDENTIAL.fullmatch(value):
        raise refusal(name, "1 to 512 printable ASCII characters without spaces")
    return value


def text_or(default: str) -> Reader:
    """A key with a default."""

    def read(name: str, given: Mapping[str, str]) -> str:
        return text(name, given) or default

    return read


def texts(name: str, given: Mapping[str, str]) -> tuple[str, ...]:
    """Keys, comma-separated."""
    keys = tuple(text(name, {name: part}) for part in _parts(name, given))
    if name in given and not keys:
        raise refusal(name, "at least one key")
    return keys


def words(name: str, given: Mapping[str, str]) -> tuple[str, ...]:
    """Names of the service's own, comma-separated; their consumer validates them."""
    return tuple(_parts(name, given))


def _parts(name: str, given: Mapping[str, str]) -> list[str]:
    parts = [part.strip() for part in given.get(name, "").split(",")]
    return [part for part in parts if part]


def directory(name: str, given: Mapping[str, str]) -> Path:
    """A path, made absolute at once so that a change of directory does not affect it."""
    try:
        return Path(given.get(name, "var")).expanduser().absolute()
    except RuntimeError as error:
        raise refusal(name, "a path whose ~ resolves to a home directory") from error


def whole_number(least: int, most: int, default: Callable[[], int]) -> Reader:
    """A number within bounds."""

    def read(name: str, given: Mapping[str, str]) -> int:
        value = given.get(name)
        if value is None:
            return default()
        digits = value.isascii() and value.isdecimal() and len(value) <= _DIGITS_MAX
        if not (digits and least <= int(value) <= most):
            raise refusal(name, f"a whole number from {least} to {most}")
        return int(value)

    return read


def cores() -> int:
    """The CPUs available to this process: fewer than the machine's under a cpuset or a quota."""
    allowed = getattr(os, "sched_getaffinity", None)
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    return min(count, quota_of_cpus(ROOT) or count, WORKERS_MAX)


def quota_of_cpus(root: Path) -> int | None:
    """The whole CPUs of the control group's quota, at least one; None without a quota.

    Of one CPU and a half, half is left to the worker and the stores. The quota of each
    group above ours applies too.
    """
    quotas = [quota for path in _cpu_groups(root) if (quota := _quota(path)) is not None]
    return max(1, int(min(quotas))) if quotas else None


def _cpu_groups(root: Path) -> list[Path]:
    """The folders of our control group and of those above it, in either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found: list[Path] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = PurePosixPath(path.lstrip("/"))
        mounted = root / _GROUPS / controllers
        # A version 1 container shows the host's path; its own group is then the mounted root.
        found += [mounted / part for part in (group, *group.parents)]
    return found


def _quota(group: Path) -> float | None:
    """CPUs by the quota of this group alone."""
    for name in ("cpu.max", "cpu.cfs_quota_us"):
        try:
            text = (group / name).read_text(encoding="utf-8")
            if name == "cpu.cfs_quota_us":
                text += (group / "cpu.cfs_period_us").read_text(encoding="utf-8")
            quota, period = map(int, text.split())
        except (OSError, ValueError):
            # No such file, or `max`: no quota.
            continue
        return quota / period if quota > 0 and period > 0 else None
    return None


def one_of(*allowed: str) -> Reader:
    """One of several words; the first is the default."""

    def read(name: str, given: Mapping[str, str]) -> str:
        value = given.get(name, allowed[0])
        if value not in allowed:
            raise refusal(name, " or ".join(allowed))
        return value

    return read


def switch(*, default: bool) -> Reader:
    """`on` or `off`."""

    def read(name: str, given: Mapping[str, str]) -> bool:
        value = given.get(name, "on" if default else "off")
        if value not in ("on", "off"):
            raise refusal(name, "on or off")
        return value == "on"

    return read


def zero_or_one(name: str, given: Mapping[str, str]) -> bool:
    """`1` or `0`, the default."""
    value = given.get(name, "0")
    if value not in ("0", "1"):
        raise refusal(name, "0 or 1")
    return value == "1"


def key_prefix(name: str, given: Mapping[str, str]) -> str:
    """The text before the hash tag of every key, so without braces and colons."""
    value = given.get(name, "rsv")
    if not _KEY_PREFIX.fullmatch(value):
        raise refusal(name, "1 to 32 of A-Z a-z 0-9 - _")
    return value


def rate(default: Rate) -> Reader:
    """`20/s`, `60/min`, `100/h`, or `0` for no limit."""

    def read(name: str, given: Mapping[str, str]) -> Rate | None:
        value = given.get(name)
        if value is None:
            return default
        if value == "0":
            return None
        match = _RATE.fullmatch(value)
        if match is None:
            raise refusal(name, "a rate such as 20/s or 60/min, or 0 for no limit")
        return Rate(int(match[1]), _SECONDS[match[2]])

    return read


def host(name: str, given: Mapping[str, str]) -> str:
    """The address to listen on."""
    value = given.get(name, "127.0.0.1")
    if not (_is_ip_address(value) or _HOST_NAME.fullmatch(value)):
        raise refusal(name, "an IP address or a host name, without a scheme or a port")
    return value


def _is_ip_address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def networks(name: str, given: Mapping[str, str]) -> tuple[str, ...]:
    """Networks, comma-separated; an address is a network of one."""
    try:
        return tuple(str(_network(part)) for part in _parts(name, given))
    except ValueError as error:
        raise refusal(name, "IP addresses or networks such as 10.0.0.0/8") from error


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """A network; a network of IPv4-mapped addresses becomes the IPv4 network."""
    network = ipaddress.ip_network(text, strict=False)
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= _MAPPED_BITS:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.ip_network((mapped, network.prefixlen - _MAPPED_BITS))
    return network


def _split(value: str) -> SplitResult | None:
    """The parts of an address, or None if it is invalid (a bad port, a broken IPv6 host)."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return None
    plain = value.isascii() and value.isprintable() and " " not in value
    return parts if plain and port != 0 else None


def web_address(name: str, given: Mapping[str, str]) -> str:
    """An http address without a trailing slash, or empty."""
    value = given.get(name, "")
    if value and not _is_web_address(value):
        raise refusal(name, "an http:// or https:// address without user, query or fragment")
    return value.rstrip("/")


def _is_web_address(value: str) -> bool:
    parts = _split(value)
    if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname:
        return False
    return "@" not in parts.netloc and "?" not in value and "#" not in value


def shown(length_max: int) -> Reader:
    """Text that a page shows, in any language; never a control character but line feeds."""

    def read(name: str, given: Mapping[str, str]) -> str:
        value = given.get(name, "")
        if len(value) > length_max or not re.search(LINES, value):
            raise refusal(name, f"at most {length_max} characters without control characters")
        return value

    return read


def origins(name: str, given: Mapping[str, str]) -> tuple[str, ...]:
    """Browsers' origins, comma-separated; never a wildcard."""
    found = tuple(part.rstrip("/") for part in _parts(name, given))
    for origin in found:
        if not _is_web_address(origin) or urlsplit(origin).path:
            raise refusal(name, "origins such as https://shop.example, comma-separated; no *")
    return found


def redis_url(name: str, given: Mapping[str, str]) -> str:
    """The address of Redis, or empty."""
    value = given.get(name, "")
    if value:
        try:
            parse_redis_url(value)
        except InvalidAddress as error:
            raise refusal(name, str(error)) from error
    return value


def default_ack_replicas(url: str) -> int:
    """The replicas that must acknowledge a change, unless set: one behind Sentinel or a cluster."""
    return int(url.startswith(("redis+sentinel://", "redis+cluster://")))


def database_url(name: str, given: Mapping[str, str]) -> str:
    """The address of PostgreSQL, or empty; the host may be in the query (`?host=/run/...`)."""
    value = given.get(name, "")
    parts = _split(value)
    if value and (parts is None or parts.scheme != "postgresql"):
        raise refusal(name, "postgresql://USER:PASSWORD@HOST:PORT/DATABASE")
    return value
