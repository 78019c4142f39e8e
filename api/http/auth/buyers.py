"""Buyers' identity: their JWT, verified by the shop's keys or secret, and cached."""

import re
from typing import Any, Final

import jwt

from api.http.auth.bearer import Connection, bearer_of
from api.http.auth.hs256 import Hs256Verifier
from api.http.auth.jwks import ALGORITHMS, PublishedKeys
from api.http.auth.jwt_claims import ClaimRules
from api.http.auth.token_cache import TokenCache
from reservation.config.settings import Settings
from reservation.domain.errors import Unauthenticated
from reservation.domain.ids import BUYER_ID

__all__ = ["Buyers"]

_BUYER_ID = re.compile(BUYER_ID)
#: Longer than any sensible JWT; not worth a signature check.
_JWT_CHARS_MAX: Final = 4_096


class Buyers:
    """Verifies buyers' tokens and caches valid ones until they expire."""

    def __init__(self, settings: Settings) -> None:
        rules = ClaimRules.of(settings)
        by_keys = settings.jwks_url and settings.auth != "guest"
        self._rules = rules
        self._keys = PublishedKeys(settings.jwks_url) if by_keys else None
        self._keys_generation = 0
        self._secret = Hs256Verifier(settings.jwt_secret, rules)
        self._cache = TokenCache()

    async def buyer(self, connection: Connection) -> str:
        """The buyer's id.

        Raises:
            Unauthenticated: no token, or not one of ours.
            Unavailable: the shop's keys cannot be fetched.
        """
        token = bearer_of(connection)
        if token is None:
            raise Unauthenticated
        return self.buyer_of_cached(token) or await self.verified(token)

    def buyer_of_cached(self, token: str) -> str | None:
        """The buyer of a valid token, or None if verification has to wait for I/O.

        Raises:
            Unauthenticated: the token is not one of ours.
        """
        if self._keys is not None:
            return self._known(token, self._keys)
        return self._cache.buyer(token) or self._verified_by_secret(token)

    async def verified(self, token: str) -> str:
        """The buyer of a valid token, once the shop's keys are there.

        Raises:
            Unauthenticated: the token is not one of ours.
            Unavailable: the shop's keys cannot be fetched.
        """
        if self._keys is not None:
            return await self._verified_by_key(token, self._keys)
        return self._verified_by_secret(token)

    def _known(self, token: str, keys: PublishedKeys) -> str | None:
        """The buyer of a cached token whose verifying keys are still fresh."""
        if not keys.fresh:
            return None
        if keys.generation != self._keys_generation:
            self._keys_generation = keys.generation
            self._cache.forget()
        return self._cache.buyer(token)

    async def _verified_by_key(self, token: str, keys: PublishedKeys) -> str:
        _refuse_oversized(token)
        try:
            key = await keys.key_for(token)
            claims = self._rules.decode(token, key, [*ALGORITHMS])
        except (jwt.PyJWTError, ValueError) as error:
            raise Unauthenticated from error
        return self._keep(token, claims["sub"], float(claims["exp"]))

    def _verified_by_secret(self, token: str) -> str:
        _refuse_oversized(token)
        try:
            subject, ends_at = self._secret.verified(token)
        except (jwt.PyJWTError, ValueError) as error:
            raise Unauthenticated from error
        return self._keep(token, subject, ends_at)

    def _keep(self, token: str, subject: Any, ends_at: float) -> str:
        """Cache the buyer of a valid token until the token expires."""
        if not isinstance(subject, str) or _BUYER_ID.fullmatch(subject) is None:
            raise Unauthenticated(
                "The `sub` claim must be 1 to 128 printable ASCII characters without spaces or "
                "braces."
            )
        self._cache.keep(token, subject, ends_at)
        return subject


def _refuse_oversized(token: str) -> None:
    if len(token) > _JWT_CHARS_MAX:
        raise Unauthenticated
