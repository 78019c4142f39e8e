"""Caller identity: buyers by JWT, operators by key, and client addresses behind trusted proxies."""

import hmac
import ipaddress
import math
import re
import secrets
import time
from typing import Any, Final

import jwt
import structlog
from litestar.connection import ASGIConnection

from api.http.auth.hs256 import Hs256Verifier
from api.http.auth.jwks import ALGORITHMS, PublishedKeys
from api.http.auth.jwt_claims import GUEST_AUDIENCE, ClaimRules
from api.http.auth.token_cache import TokenCache
from reservation.config.settings import Settings
from reservation.domain.errors import Forbidden, MalformedRequest, RateLimited, Unauthenticated
from reservation.domain.ids import BUYER_ID
from reservation.domain.rate_limit import Limiter, Rate

__all__ = [
    "Buyers",
    "ClientAddressResolver",
    "Connection",
    "Guests",
    "Operators",
    "bearer_in",
    "bearer_of",
    "new_guest_id",
]

log = structlog.get_logger(__name__)

Connection = ASGIConnection[Any, Any, Any, Any]
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_BEARER: Final = "bearer "
_BUYER_ID = re.compile(BUYER_ID)
_OPERATOR = re.compile(r"[ -~]{1,100}")
#: Longer than any sensible JWT; not worth a signature check.
_JWT_CHARS_MAX: Final = 4_096
#: Wrong operator keys from one address before it gets 429, and log lines about them.
_FAILED_SIGN_INS: Final = Rate(300, 60)
_SIGN_IN_LINES: Final = Rate(5, 1)
_GUEST_SECONDS: Final = 30 * 24 * 3600
#: 80 bits: among a thousand million guests the chance of a collision is one in a million.
_GUEST_ID_BYTES: Final = 10


#: A provider assigns a customer at least a /64, and the customer may use every address in it.
_IPV6_BITS_COUNTED: Final = 64
_WITH_PORT = re.compile(r"(\[(?P<bracketed>[^\]]*)\]|(?P<v4>[0-9.]+))(:[0-9]{1,5})?")


def bearer_of(connection: Connection) -> str | None:
    """The bearer token of a request, if it carries one."""
    return bearer_in(connection.headers.get("authorization", ""))


def bearer_in(authorization: str) -> str | None:
    """The bearer token in an Authorization header's value."""
    if authorization[: len(_BEARER)].lower() != _BEARER:
        return None
    return authorization[len(_BEARER) :].strip() or None


class Buyers:
    """Verifies buyers' tokens and caches valid ones until they expire."""

    def __init__(self, settings: Settings) -> None:
        rules = ClaimRules.of(settings)
        by_keys = settings.jwks_url and settings.auth != "guest"
        self._rules = rules
        self._keys = PublishedKeys(settings.jwks_url) if by_keys else None
        self._keys_generation = 0
        self._secret = Hs256Verifier(settings.jwt_secret, rules)
        self._remembered = TokenCache()

    async def buyer(self, connection: Connection) -> str:
        """The buyer's id.

        Raises:
            Unauthenticated: no token, or not one of ours.
            Unavailable: the shop's keys cannot be fetched.
        """
        token = bearer_of(connection)
        if token is None:
            raise Unauthenticated
        if self._keys is None:
            return self._remembered.buyer(token) or self._verified_by_secret(token)
        return self._known(token, self._keys) or await self._verified_by_key(token, self._keys)

    def at_once(self, token: str) -> str | None:
        """The buyer of a valid token, or None if verification has to wait for I/O.

        Raises:
            Unauthenticated: the token is not one of ours.
        """
        if self._keys is not None:
            return self._known(token, self._keys)
        return self._remembered.buyer(token) or self._verified_by_secret(token)

    def _known(self, token: str, keys: PublishedKeys) -> str | None:
        """The buyer of a cached token whose verifying keys are still fresh."""
        if not keys.fresh:
            return None
        if keys.generation != self._keys_generation:
            self._keys_generation = keys.generation
            self._remembered.forget()
        return self._remembered.buyer(token)

    async def _verified_by_key(self, token: str, keys: PublishedKeys) -> str:
        _refuse_long(token)
        try:
            key = await keys.key_for(token)
            claims = self._rules.decode(token, key, [*ALGORITHMS])
        except (jwt.PyJWTError, ValueError) as error:
            raise Unauthenticated from error
        return self._keep(token, claims["sub"], float(claims["exp"]))

    def _verified_by_secret(self, token: str) -> str:
        _refuse_long(token)
        try:
            subject, ends_at = self._secret.verified(token)
        except (jwt.PyJWTError, ValueError) as error:
            raise Unauthenticated from error
        return self._keep(token, subject, ends_at)

    def _keep(self, token: str, subject: Any, ends_at: float) -> str:
        """Cache the buyer of a valid token until the token expires."""
        if not isinstance(subject, str) or _BUYER_ID.fullmatch(subject) is None:
            raise Unauthenticated(
                "The token's sub must be a string of 1 to 128 printable ASCII characters"
                " without spaces and braces."
            )
        self._remembered.keep(token, subject, ends_at)
        return subject


def _refuse_long(token: str) -> None:
    if len(token) > _JWT_CHARS_MAX:
        raise Unauthenticated


def new_guest_id() -> str:
    """A guest's id: short, because three keys of each hold contain it, and not secret."""
    return f"g-{secrets.token_urlsafe(_GUEST_ID_BYTES)}"


class Guests:
    """Issues buyer tokens where the shop has none of its own."""

    def __init__(self, settings: Settings) -> None:
        self._secret = settings.jwt_secret
        self._limiter = Limiter(settings.guest_rate) if settings.guest_rate else None
        self.open = settings.auth == "guest"

    def new(self, address: str) -> tuple[str, str]:
        """A new buyer's id and token.

        Raises:
            RateLimited: too many from this address.
        """
        if self._limiter is not None:
            wait = self._limiter.wait(address, time.monotonic())
            if wait:
                raise RateLimited(retryAfter=max(1, math.ceil(wait)))
        buyer_id = new_guest_id()
        now = int(time.time())
        claims = {
            "sub": buyer_id,
            "iat": now,
            "exp": now + _GUEST_SECONDS,
            "aud": GUEST_AUDIENCE,
        }
        return buyer_id, jwt.encode(claims, self._secret, algorithm="HS256")


class Operators:
    """Authenticates operators by the admin key; `X-Operator` names the person."""

    def __init__(self, settings: Settings, buyers: Buyers, peers: "ClientAddressResolver") -> None:
        self._key = settings.admin_api_key.encode()
        self._name_required = settings.production
        self._buyers = buyers
        self._peers = peers
        self._failures = Limiter(_FAILED_SIGN_INS)
        self._lines = Limiter(_SIGN_IN_LINES)

    async def check(self, connection: Connection) -> None:
        """Admit operators.

        The right key is accepted from any address, even one that has sent many wrong keys.

        Raises:
            Unauthenticated: no key, or a wrong one.
            RateLimited: too many wrong ones from this address.
            Forbidden: a buyer's token.
        """
        given = bearer_of(connection) or ""
        if hmac.compare_digest(given.encode(), self._key):
            return
        try:
            await self._buyers.buyer(connection)
        except Unauthenticated:
            if given:
                self._count_failure(connection)
            raise Unauthenticated("The operator's key is needed.") from None
        raise Forbidden("A buyer's token does not open the operator's endpoints.")

    def _count_failure(self, connection: Connection) -> None:
        address, now = self._peers.address(connection), time.monotonic()
        wait = self._failures.wait(address, now)
        if not self._lines.wait("", now):
            log.warning("operator_sign_in_failed", address=address, blocked=bool(wait))
        if wait:
            raise RateLimited(retryAfter=max(1, math.ceil(wait))) from None

    def name(self, connection: Connection) -> str:
        """The operator's name, recorded with every change.

        Raises:
            MalformedRequest: absent in production, or malformed.
        """
        name = connection.headers.get("x-operator", "")
        if not name and not self._name_required:
            return "operator"
        if _OPERATOR.fullmatch(name) is None:
            raise MalformedRequest("X-Operator says who does this: 1-100 printable characters.")
        return name


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
        # A proxy may append a header line of its own: all lines together are one list.
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
