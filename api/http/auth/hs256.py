"""Buyers' tokens that are signed with a shared secret (HS256), verified in microseconds.

PyJWT decides on every header that was not seen yet and on every token that is not plainly good; a
token under a header that it took before, with a right signature and ordinary claims, needs no more
than one HMAC and one look at its claims.
"""

import hmac
import time
from typing import Any, Final

import msgspec

from api.http.auth.jwt_claims import LEEWAY_SECONDS, ClaimRules
from reservation.domain import base64url
from reservation.domain.hmac_sha256 import Mac

__all__ = ["Hs256Verifier"]

#: Headers that are remembered: an issuer writes all of its own alike.
_HEADERS_MAX: Final = 16


class _Claims(msgspec.Struct):
    """The claims that are judged, in their ordinary types; PyJWT judges others."""

    sub: str
    exp: int
    aud: str | None = None
    iss: str | None = None
    nbf: int | None = None


class Hs256Verifier:
    """Verifies tokens.

    Args:
        secret: what they are signed with.
        rules: what their claims must meet.
    """

    def __init__(self, secret: str, rules: ClaimRules) -> None:
        self._secret = secret
        self._mac = Mac(secret.encode())
        self._rules = rules
        self._headers: set[bytes] = set()
        self._decoder = msgspec.json.Decoder(_Claims)

    def verified(self, token: str) -> tuple[Any, float]:
        """Subject and end, in Unix seconds, of a token that is valid.

        Raises:
            jwt.PyJWTError: it is not valid.
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
        claims = self._rules.decode(token, self._secret, ["HS256"])
        if len(self._headers) < _HEADERS_MAX:
            self._headers.add(header)
        return claims["sub"], float(claims["exp"])

    def _plain(self, payload: bytes) -> _Claims | None:
        """The claims of a token that leaves nothing to judge, or None."""
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
