"""Operators: the rights of each role, the form of their keys and of their names."""

import hashlib
import re
import secrets
import unicodedata
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final
from urllib.parse import unquote_to_bytes

import msgspec

from reservation.domain.text import TEXT

__all__ = [
    "KEY_PREFIX",
    "NAME_CHARS_MAX",
    "RIGHTS",
    "Operator",
    "Right",
    "Role",
    "digest_of_key",
    "name_in_header",
    "new_key",
    "valid_name",
]


class Right(StrEnum):
    """The right that an operator endpoint requires; every endpoint declares exactly one."""

    #: Reads sales, orders, refunds, audits and metrics.
    READ = "read"
    #: Releases, resolves and refunds a single order.
    ORDERS = "orders"
    #: Changes sales, stock and queues, and refunds a whole sale.
    SALES = "sales"
    #: Manages the endpoints that receive webhooks.
    WEBHOOKS = "webhooks"
    #: Creates, lists and revokes operators' keys.
    KEYS = "keys"


class Role(StrEnum):
    """The role of an operator's key. The values are stored: add members, never change one."""

    VIEWER = "viewer"
    SUPPORT = "support"
    MANAGER = "manager"
    OWNER = "owner"


#: The rights of each role: the only table of them.
RIGHTS: Final[Mapping[Role, frozenset[Right]]] = MappingProxyType(
    {
        Role.VIEWER: frozenset({Right.READ}),
        Role.SUPPORT: frozenset({Right.READ, Right.ORDERS}),
        Role.MANAGER: frozenset({Right.READ, Right.ORDERS, Right.SALES}),
        Role.OWNER: frozenset(Right),
    }
)


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """An authenticated operator."""

    role: Role
    #: The name of the operator's key; None for the admin API key, with which each request names its
    #: operator in `X-Operator`.
    name: str | None = None


#: Begins each key, so that secret scanners find a published one.
KEY_PREFIX: Final = "rsvk_"
_KEY_BYTES: Final = 32

NAME_CHARS_MAX: Final = 100
_TEXT: Final = re.compile(TEXT)
#: Halves of characters, as from an environment variable that is not UTF-8.
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_ASCII: Final = re.compile(r"[ -~]+")
#: The beginning of an extended value of RFC 8187 without a language.
_EXTENDED: Final = "utf-8''"
_ENCODED: Final = re.compile(r"(?:%[0-9A-Fa-f]{2}|[A-Za-z0-9!#$&+.^_`|~-])+")


def new_key() -> str:
    """A new key of 256 random bits."""
    return KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of_key(key: str) -> str:
    """The SHA-256 of a key, in hex: the only form that is stored.

    A key has 256 random bits, so no slow hash is needed against guesses.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def valid_name(text: str) -> str | None:
    """An operator's name in any language, in Unicode's composed form; None if it is not a name."""
    name = unicodedata.normalize("NFC", text)
    fits = 1 <= len(name) <= NAME_CHARS_MAX and name == name.strip()
    is_text = _TEXT.fullmatch(name) and not _SURROGATES.search(name)
    return name if fits and is_text else None


def name_in_header(value: str) -> str | None:
    """The name in an `X-Operator` header; None if it is not a name.

    The header is printable ASCII, or percent-encoded UTF-8 in the form of RFC 8187:
    ``UTF-8''%EA%B9%80``.
    """
    if value[: len(_EXTENDED)].lower() != _EXTENDED:
        return valid_name(value) if _ASCII.fullmatch(value) else None
    encoded = value[len(_EXTENDED) :]
    if _ENCODED.fullmatch(encoded) is None:
        return None
    try:
        return valid_name(unquote_to_bytes(encoded).decode("utf-8"))
    except UnicodeDecodeError:
        return None
