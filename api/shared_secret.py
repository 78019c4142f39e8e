"""Buyers' tokens that are signed with a shared secret (HS256), verified in microseconds.

PyJWT decides on every header that was not seen yet and on every token that is not plainly good; a
token under a header that it took before, with a right signature and ordinary claims, needs no more
than one HMAC and one look at its claims.
"""

import hmac
import time
from typing import Any, Final

import jwt
import msgspec
from jwt.types import Options

from reservation.domain import base64url
from reservation.domain.macs import Mac

__all__ = ["SharedSecret"]

#: Headers that are remembered: an issuer writes all of its own alike.
_HEADERS_MAX: Final = 16


class _Claims(msgspec.Struct):
    """Claims as they ordinarily are; others are PyJWT's to judge."""

    sub: str
    exp: int
    aud: str | None = None
    iat: int | None = None
    nbf: int | None = None
    jti: str | None = None


class SharedSecret:
    """Verifies tokens.

    Args:
        secret: what they are signed with.
        audience: whom they must be for; None where that is not looked at.
        options: what PyJWT must require.
    """

    def __init__(self, secret: str, *, audience: str | None, options: Options) -> None:
        self._secret = secret
        self._mac = Mac(secret.encode())
        self._audience = audience
        self._options = options
        self._headers: set[bytes] = set()
        self._decoder = msgspec.json.Decoder(_Claims)

    def verified(self, token: str) -> tuple[Any, float]:
        """Whose a good token is, as it says, and when it ends, in Unix seconds.

        Raises:
            jwt.PyJWTError: it is not good.
            ValueError: it is no token.
        """
        signed, _, signature = token.encode().rpartition(b".")
        header, _, payload = signed.partition(b".")
        if header in self._headers and hmac.compare_digest(
            base64url.encoded(self._mac.digest(signed)), signature
        ):
            plain = self._plain(payload)
            if plain is not None:
                return plain.sub, plain.exp
        claims = jwt.decode(
            token,
            self._secret,
            algorithms=["HS256"],
            audience=self._audience,
            options=self._options,
        )
        if len(self._headers) < _HEADERS_MAX:
            self._headers.add(header)
        return claims.get("sub"), float(claims["exp"])

    def _plain(self, payload: bytes) -> _Claims | None:
        """The claims of a token that leaves nothing to judge, or None."""
        try:
            claims = self._decoder.decode(base64url.decode(payload))
        except (ValueError, msgspec.MsgspecError):
            return None
        now = int(time.time())
        begun = (claims.nbf or 0) <= now and (claims.iat or 0) <= now
        for_us = self._audience is None or claims.aud == self._audience
        return claims if begun and for_us and claims.exp > now else None
