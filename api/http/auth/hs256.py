"""Verifies buyers' tokens signed with a shared secret (HS256) in microseconds.

PyJWT verifies tokens with an unknown header or unusual claims. A token with a known header, a valid
signature and ordinary claims takes one HMAC and one decode of its claims.
"""

import hmac
import time
from typing import Any, Final

import msgspec

from api.http.auth.jwt_claims import LEEWAY_SECONDS, ClaimRules
from reservation.domain import base64url
from reservation.domain.hmac_sha256 import Mac

__all__ = ["Hs256Verifier"]

#: Cached headers: an issuer's tokens all have the same one.
_HEADERS_MAX: Final = 16


class _Claims(msgspec.Struct):
    """The verified claims in their ordinary types; PyJWT handles all others."""

    sub: str
    exp: int
    aud: str | None = None
    iss: str | None = None
    nbf: int | None = None


class Hs256Verifier:
    """Verifies tokens.

    Args:
        secret: the shared signing secret.
        rules: requirements on the claims.
    """

    def __init__(self, secret: str, rules: ClaimRules) -> None:
        self._secret = secret
        self._mac = Mac(secret.encode())
        self._rules = rules
        self._headers: set[bytes] = set()
        self._decoder = msgspec.json.Decoder(_Claims)

    def verified(self, token: str) -> tuple[Any, float]:
        """Subject and expiry, in Unix seconds, of a valid token.

        Raises:
            jwt.PyJWTError: it is not valid.
            ValueError: it is not a token.
        """
        signed, _, signature = token.encode().rpartition(b".")
        header, _, payload = signed.partition(b".")
        if header in self._headers and hmac.compare_digest(
            base64url.encoded(self._mac.digest(signed)), signature
        ):
            plain = self._plain(payload)
            if plain is not None:
                return plain.sub, plain.exp
        claims = self._rules.decode(token, self._secret, ["HS256"])
        if len(self._headers) < _HEADERS_MAX:
            self._headers.add(header)
        return claims["sub"], float(claims["exp"])

    def _plain(self, payload: bytes) -> _Claims | None:
        """The claims of a token that needs no further checks, or None."""
        try:
            claims = self._decoder.decode(base64url.decode(payload))
        except (ValueError, msgspec.MsgspecError):
            return None
        rules, now = self._rules, int(time.time())
        valid = (
            (claims.nbf or 0) <= now + LEEWAY_SECONDS
            and claims.exp > now - LEEWAY_SECONDS
            and rules.allows_audience(claims.aud)
            and rules.issuer in (None, claims.iss)
        )
        return claims if valid else None
