"""The shop's published signing keys (JWKS, RFC 7517): fetches, filters and refreshes them."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import httpx
import jwt
import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from reservation.domain.errors import Unauthenticated, Unavailable

__all__ = ["ALGORITHMS", "PublishedKeys"]

log = structlog.get_logger(__name__)

#: Asymmetric only: a published key must never verify a token that was "signed" with it as a secret.
ALGORITHMS: Final = ("RS256", "RS384", "RS512", "ES256", "ES384", "EdDSA")
#: Interval between fetches after a success, and after a failure or an unknown key id.
FRESH_SECONDS: Final = 600.0
RETRY_SECONDS: Final = 10.0
#: Older keys are not used: a key that the shop has withdrawn must not stay valid because the
#: identity provider is unreachable.
STALE_SECONDS: Final = 3600.0
#: Deadline for the whole fetch, including a body that arrives a byte at a time.
_FETCH_SECONDS: Final = 5.0
_BYTES_MAX: Final = 256 * 1024
_RSA_BITS_MIN: Final = 2048


class _KeySet(msgspec.Struct):
    keys: list[dict[str, Any]]


class PublishedKeys:
    """The key set of one URL.

    Args:
        url: of the key set.
        monotonic: a clock in seconds that never goes back.
    """

    def __init__(self, url: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._monotonic = monotonic
        self._keys: dict[str, tuple[jwt.PyJWK, dict[str, Any]]] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._lock = asyncio.Lock()
        #: Incremented by each fetch that finds a key withdrawn or replaced: tokens verified before
        #: it must be verified again.
        self.generation = 0

    @property
    def fresh(self) -> bool:
        """Whether cached verifications are valid without reading the keys."""
        now = self._monotonic()
        if now - self._fetched_at <= FRESH_SECONDS:
            return True
        # While the provider is unreachable it is polled every few seconds, not at each request.
        return now - self._tried_at <= RETRY_SECONDS and now - self._fetched_at <= STALE_SECONDS

    async def key_for(self, token: str) -> jwt.PyJWK:
        """The key that a token names in its header.

        Raises:
            jwt.PyJWTError: the header cannot be read.
            Unauthenticated: the shop publishes no such key.
            Unavailable: unknown, because the keys could not be fetched.
        """
        key_id = str(jwt.get_unverified_header(token).get("kid", ""))
        if self._must_fetch(key_id):
            # Requests that arrive during a fetch wait for it, and check again.
            async with self._lock:
                if self._must_fetch(key_id):
                    await self._fetch()
        now = self._monotonic()
        if now - self._fetched_at > STALE_SECONDS:
            raise Unavailable(
                "The shop's signing keys are unavailable.", retryAfter=round(RETRY_SECONDS)
            )
        found = self._keys.get(key_id)
        if found is not None:
            return found[0]
        if self._tried_at > self._fetched_at:
            # It may be a new key that this process could not fetch.
            raise Unavailable(
                "The shop's signing keys are unavailable.", retryAfter=round(RETRY_SECONDS)
            )
        raise Unauthenticated("The token's signing key is not in the shop's key set.")

    def _must_fetch(self, key_id: str) -> bool:
        now = self._monotonic()
        if now - self._tried_at <= RETRY_SECONDS:
            return False
        return key_id not in self._keys or now - self._fetched_at > FRESH_SECONDS

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(_FETCH_SECONDS):
                document = msgspec.json.decode(await self._read(), type=_KeySet)
            found = _usable(document.keys)
        except (httpx.HTTPError, msgspec.MsgspecError, ValueError, TimeoutError) as error:
            self._tried_at = self._monotonic()
            log.warning("jwks_fetch_failed", reason=f"{type(error).__name__}: {error}")
            return
        self._tried_at = self._fetched_at = self._monotonic()
        if any(
            key_id not in found or found[key_id][1] != document
            for key_id, (_, document) in self._keys.items()
        ):
            self.generation += 1
        self._keys = found

    async def _read(self) -> bytes:
        async with (
            httpx.AsyncClient(timeout=_FETCH_SECONDS, trust_env=False) as client,
            client.stream("GET", self._url) as answer,
        ):
            answer.raise_for_status()
            content = bytearray()
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > _BYTES_MAX:
                    raise ValueError(f"the key set is larger than {_BYTES_MAX} bytes")
            return bytes(content)


def _usable(keys: list[dict[str, Any]]) -> dict[str, tuple[jwt.PyJWK, dict[str, Any]]]:
    """The keys of a set that may verify a signature, and their documents, by id.

    Raises:
        ValueError: there are none.
    """
    found: dict[str, tuple[jwt.PyJWK, dict[str, Any]]] = {}
    for document in keys:
        try:
            key = jwt.PyJWK(document)
        except jwt.PyJWTError:
            # Keys for other uses, or of types newer than the library; the others stay usable.
            continue
        if key.key_id and _may_verify(key):
            found[str(key.key_id)] = key, document
    if not found:
        raise ValueError("the key set has no usable signing key")
    return found


def _may_verify(key: jwt.PyJWK) -> bool:
    if key.algorithm_name not in ALGORITHMS or key.public_key_use not in (None, "sig"):
        return False
    if isinstance(key.key, RSAPublicKey) and key.key.key_size < _RSA_BITS_MIN:
        log.warning("jwks_key_too_short", key_id=key.key_id, bits=key.key.key_size)
        return False
    return True
