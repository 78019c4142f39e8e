"""Who is calling: buyers by JWT, operators by key, and the address behind trusted proxies."""

import asyncio
import hmac
import ipaddress
import math
import re
import secrets
import time
from typing import Any, Final

import httpx
import jwt
import msgspec
import structlog
from jwt.types import Options
from litestar.connection import ASGIConnection

from api.remembered import Remembered
from api.shared_secret import SharedSecret
from reservation.domain.errors import Forbidden, MalformedRequest, RateLimited, Unauthenticated
from reservation.domain.ids import BUYER_ID
from reservation.domain.rate import Limiter
from reservation.settings import Settings

__all__ = [
    "Buyers",
    "Connection",
    "Guests",
    "Operators",
    "Peers",
    "bearer_in",
    "bearer_of",
    "new_guest_id",
]

log = structlog.get_logger(__name__)

Connection = ASGIConnection[Any, Any, Any, Any]

_BEARER: Final = "bearer "
_BUYER_ID = re.compile(BUYER_ID)
_OPERATOR = re.compile(r"[ -~]{1,100}")
#: Longer than any sensible JWT; not worth a signature check.
_JWT_CHARS_MAX: Final = 4_096
_GUEST_SECONDS: Final = 30 * 24 * 3600
_GUEST_AUDIENCE: Final = "reservation-guest"
#: 80 bits: of a thousand million guests no two have the same but by a chance of one in a million.
_GUEST_ID_BYTES: Final = 10
#: How long the shop's published keys are believed, and how soon an unknown key may ask again.
_JWKS_SECONDS: Final = 600.0
_JWKS_RETRY_SECONDS: Final = 10.0
_JWKS_BYTES_MAX: Final = 256 * 1024
#: Asymmetric only: a published key must never verify a token that was "signed" with it as a secret.
_JWKS_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "ES256", "ES384", "EdDSA")


#: A provider gives one customer at least a /64, who may use every address in it.
_IPV6_BITS_COUNTED: Final = 64
_WITH_PORT = re.compile(r"(\[(?P<bracketed>[^\]]*)\]|(?P<v4>[0-9.]+))(:[0-9]{1,5})?")


def bearer_of(connection: Connection) -> str | None:
    """The bearer token of a request, if it carries one."""
    return bearer_in(connection.headers.get("authorization", ""))


def bearer_in(authorization: str) -> str | None:
    """The bearer token in a header's value."""
    if authorization[: len(_BEARER)].lower() != _BEARER:
        return None
    return authorization[len(_BEARER) :].strip() or None


class Buyers:
    """Verifies buyers' tokens and remembers the good ones until they end."""

    def __init__(self, settings: Settings) -> None:
        self._guests = settings.auth == "guest"
        self._jwks = _PublishedKeys(settings.jwks_url) if settings.jwks_url else None
        self._asks_for_keys = self._jwks is not None and not self._guests
        self._options: Options = {"require": ["sub", "exp"], "verify_aud": self._guests}
        audience = _GUEST_AUDIENCE if self._guests else None
        self._secret = SharedSecret(settings.jwt_secret, audience=audience, options=self._options)
        self._remembered = Remembered()

    async def buyer(self, connection: Connection) -> str:
        """The buyer's id.

        Raises:
            Unauthenticated: no token, or none of ours.
        """
        token = bearer_of(connection)
        if token is None:
            raise Unauthenticated
        return self._remembered.buyer(token) or await self._verified(token)

    def at_once(self, token: str) -> str | None:
        """The buyer of a good token, or None where that cannot be told without waiting.

        Raises:
            Unauthenticated: the token is none of ours.
        """
        buyer_id = self._remembered.buyer(token)
        if buyer_id is None and not self._asks_for_keys:
            return self._verified_by_secret(token)
        return buyer_id

    async def _verified(self, token: str) -> str:
        if self._jwks is None or self._guests:
            return self._verified_by_secret(token)
        _refuse_long(token)
        try:
            key = await self._jwks.key_for(token)
            claims = jwt.decode(token, key, algorithms=[*_JWKS_ALGORITHMS], options=self._options)
        except (jwt.PyJWTError, ValueError) as error:
            raise Unauthenticated from error
        return self._keep(token, claims.get("sub"), float(claims["exp"]))

    def _verified_by_secret(self, token: str) -> str:
        _refuse_long(token)
        try:
            subject, ends_at = self._secret.verified(token)
        except (jwt.PyJWTError, ValueError) as error:
            raise Unauthenticated from error
        return self._keep(token, subject, ends_at)

    def _keep(self, token: str, subject: Any, ends_at: float) -> str:
        """Remember whose a good token is until it ends."""
        if not isinstance(subject, str) or _BUYER_ID.fullmatch(subject) is None:
            raise Unauthenticated("The token's subject is not a buyer's id.")
        self._remembered.keep(token, subject, ends_at)
        return subject


def _refuse_long(token: str) -> None:
    if len(token) > _JWT_CHARS_MAX:
        raise Unauthenticated


class _PublishedKeys:
    """The shop's public keys, fetched at most every ten seconds."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")
        self._lock = asyncio.Lock()

    async def key_for(self, token: str) -> jwt.PyJWK:
        key_id = str(jwt.get_unverified_header(token).get("kid", ""))
        if self._must_fetch(key_id):
            # Whoever comes while the keys are under way waits for them, and looks again then.
            async with self._lock:
                if self._must_fetch(key_id):
                    await self._fetch()
        key = self._keys.get(key_id)
        if key is None:
            raise Unauthenticated("The token is signed with a key that the shop does not publish.")
        return key

    def _must_fetch(self, key_id: str) -> bool:
        age = time.monotonic() - self._fetched_at
        return age > (_JWKS_SECONDS if key_id in self._keys else _JWKS_RETRY_SECONDS)

    async def _fetch(self) -> None:
        try:
            async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
                answer = await client.get(self._url)
            answer.raise_for_status()
            if len(answer.content) > _JWKS_BYTES_MAX:
                raise ValueError("too large")
            found = jwt.PyJWKSet.from_dict(msgspec.json.decode(answer.content))
        except (httpx.HTTPError, jwt.PyJWTError, msgspec.MsgspecError, ValueError) as error:
            # The keys at hand stay good; an unknown one is refused.
            log.warning("jwks_not_fetched", reason=type(error).__name__)
            return
        finally:
            self._fetched_at = time.monotonic()
        self._keys = {key.key_id: key for key in found.keys if key.key_id}


def new_guest_id() -> str:
    """An id for a guest, short, for three keys of each hold spell it. It is no secret."""
    return f"g-{secrets.token_urlsafe(_GUEST_ID_BYTES)}"


class Guests:
    """Gives out buyers' tokens where the shop has none of its own."""

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
            "aud": _GUEST_AUDIENCE,
        }
        return buyer_id, jwt.encode(claims, self._secret, algorithm="HS256")


class Operators:
    """Knows operators by the admin key, and who of them it is by `X-Operator`."""

    def __init__(self, settings: Settings, buyers: Buyers) -> None:
        self._key = settings.admin_api_key.encode()
        self._name_required = settings.production
        self._buyers = buyers

    async def check(self, connection: Connection) -> None:
        """Let operators pass.

        Raises:
            Unauthenticated: no key, or a wrong one.
            Forbidden: a buyer's token.
        """
        given = (bearer_of(connection) or "").encode()
        if hmac.compare_digest(given, self._key):
            return
        try:
            await self._buyers.buyer(connection)
        except Unauthenticated:
            raise Unauthenticated("The operator's key is needed.") from None
        raise Forbidden("A buyer's token does not open the operator's endpoints.")

    def name(self, connection: Connection) -> str:
        """Who does it, kept with every change.

        Raises:
            MalformedRequest: absent in production, or no name.
        """
        name = connection.headers.get("x-operator", "")
        if not name and not self._name_required:
            return "operator"
        if _OPERATOR.fullmatch(name) is None:
            raise MalformedRequest("X-Operator says who does this: 1-100 printable characters.")
        return name


class Peers:
    """The caller's address; headers are believed only from proxies that the settings name."""

    def __init__(self, settings: Settings) -> None:
        self._proxies = [ipaddress.ip_network(text) for text in settings.trusted_proxies]

    def address(self, connection: Connection) -> str:
        """The rightmost address that no proxy of ours put there, as callers are counted.

        IPv4 counts as it is, IPv6 by its /64. A hop that is no address counts for the proxy that
        sent it, so that no caller chooses its own key in a limiter.
        """
        peer = _address(connection.client.host) if connection.client else None
        # A proxy may add a line of its own below the one that came: all of them are one list.
        forwarded = ",".join(connection.headers.getall("x-forwarded-for", []))
        hops = [hop.strip() for hop in forwarded.split(",") if hop.strip()]
        while hops and peer is not None and any(peer in network for network in self._proxies):
            hop = _address(hops.pop())
            if hop is None:
                break
            peer = hop
        return "" if peer is None else _counted_as(peer)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An address, with or without a port, brackets or a zone; None for any other text.

    Azure's gateway adds the port to IPv4 addresses, others write IPv6 as `[2001:db8::1]:443`.
    """
    match = _WITH_PORT.fullmatch(text)
    try:
        found = ipaddress.ip_address(match["bracketed"] or match["v4"] if match else text)
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address):
        # A dual-stack socket or proxy shows IPv4 callers so.
        return found.ipv4_mapped or ipaddress.IPv6Address(int(found))
    return found


def _counted_as(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.IPv6Network((int(address), _IPV6_BITS_COUNTED), strict=False))
